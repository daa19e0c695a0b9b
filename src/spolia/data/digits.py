"""Real images without a download: 1,797 scanned digits of 8x8 pixels, carried by scikit-learn.

Alpaydin & Kaynak, Optical recognition of handwritten digits, UCI repository, 1998, doi:10.24432/C50P49; its test part.

A domain shows all of them in one way, so domains are tasks with the same labels and different inputs. The splits go by
image: whatever the domain, an image that one split holds is in no other.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

DOMAINS = ("upright", "turned", "inverted", "permuted", "mirrored", "noisy")
SIZES = {"base": 300, "train": 700, "validation": 197, "test": 600}  # 1,797 in all
NOISE = 0.3  # standard deviation of the noisy domain, where ink runs from -1 to 1


@dataclass(frozen=True)
class Split:
    """Images x [n, 64] in -1 (paper) … 1 (ink), labels y [n] in 0 … 9, and which of the 1,797 images they are."""

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.y)


@dataclass(frozen=True)
class Splits:
    """One domain: `base` for the model that experts start from, `train` for the expert, two to choose and to judge."""

    base: Split
    train: Split
    validation: Split
    test: Split


def digits(domain: str, seed: int = 0) -> Splits:
    """The four splits of `domain`. The seed says which image is in which split, for every domain alike."""
    if domain not in DOMAINS:
        raise SpoliaError(f"no digits domain is called `{domain}`", where="domain", mend=did_you_mean(domain, DOMAINS))
    images, labels = _scans()
    x = _shown(images, domain)
    order = torch.from_numpy(generator(seed, "digits", "split").permutation(len(labels)))
    parts = order.split(list(SIZES.values()))
    return Splits(*(Split(x[part], labels[part], part) for part in parts))


def _shown(images: Tensor, domain: str) -> Tensor:
    """All images in the manner of `domain`. [n, 8, 8] -> [n, 64]"""
    flat = images.flatten(1)
    match domain:
        case "turned":  # a quarter turn to the left
            return torch.rot90(images, 1, (1, 2)).flatten(1)
        case "inverted":
            return -flat
        case "permuted":  # one fixed order of the pixels, the same for every image and seed
            return flat[:, torch.from_numpy(generator(0, "digits", "permuted").permutation(64))]
        case "mirrored":
            return images.flip(2).flatten(1)
        case "noisy":  # one fixed noise for each image, the same for every seed
            noise = generator(0, "digits", "noisy").standard_normal(tuple(flat.shape), dtype="float32")
            return flat + NOISE * torch.from_numpy(noise)
    return flat


@cache
def _scans() -> tuple[Tensor, Tensor]:
    """All images [1797, 8, 8] in -1 … 1 and their labels [1797]."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise SpoliaError(
            "the digits come with scikit-learn, which is not installed",
            where="pool.source digits",
            mend="pip install 'spolia[digits]'",
        ) from None
    bunch: Any = load_digits()
    images = torch.from_numpy(bunch.images).float() / 8 - 1
    return images, torch.from_numpy(bunch.target).long()
