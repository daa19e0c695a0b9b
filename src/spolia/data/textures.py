"""Stripes to tell apart: 24 classes made on the spot, for which good features help a lot and raw pixels do not.

    image = sigmoid( sin(2 pi f (x cos t + y sin t) + phase) + clutter + 0.8 noise )

A class is one of 8 orientations t (varied by 0.06 rad) and 3 frequencies f; the phase is uniform; the clutter is 3 x 3
Gaussian noise, enlarged. Images of a class share no pixel pattern, so that neighbours in pixels are neighbours by chance.
"""

from __future__ import annotations

import math

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.parts.classes import ClassSet

SIZE, TURNS, FREQUENCIES = 12, 8, (0.12, 0.20, 0.30)  # pixels, orientations, cycles a pixel
CLASSES = TURNS * len(FREQUENCIES)
_VARIED, _NOISE = 0.06, 0.8


def texture_classes(each: int = 200, seed: int = 0) -> ClassSet:
    """24 classes of `each` images, fp32 [n, 1, 12, 12] in 0 … 1. Superclasses are the frequencies."""
    draws = generator(seed, "textures")
    kinds = [(turn, f) for f in FREQUENCIES for turn in range(TURNS)]
    made = np.concatenate([_images(turn * math.pi / TURNS, f, each, draws) for turn, f in kinds])
    names = [f"{180 * turn / TURNS:g} degrees, {f:g} a pixel" for turn, f in kinds]
    labels = np.repeat(np.arange(len(kinds)), each)
    above = [f"{f:g} a pixel" for _, f in kinds]
    return ClassSet.of(torch.from_numpy(made).unsqueeze(1), labels, names, superclasses=above, where="textures")


def _images(turn: float, frequency: float, count: int, draws: np.random.Generator) -> np.ndarray:
    """fp32 [count, size, size]"""
    y, x = np.mgrid[:SIZE, :SIZE]
    own = (turn + _VARIED * draws.standard_normal(count))[:, None, None]
    phase = 2 * math.pi * draws.random(count)[:, None, None]
    stripes = np.sin(2 * math.pi * frequency * (x * np.cos(own) + y * np.sin(own)) + phase)
    coarse = torch.from_numpy(draws.standard_normal((count, 1, 3, 3)))
    clutter = torch.nn.functional.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear")[:, 0].numpy()
    noise = _NOISE * draws.standard_normal((count, SIZE, SIZE))
    return (1 / (1 + np.exp(-(stripes + clutter + noise)))).astype(np.float32)
