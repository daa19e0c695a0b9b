"""Domains of a stream made from one data set: fixed orders of the pixels, fixed angles. For `stream.domain_incremental`.

All are drawn from the seed alone, so that training, testing and the untrained baseline see the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Change


def permutations(count: int, size: int, *, seed: int = 0, first: bool = True) -> dict[str, Change | None]:
    """`count` fixed orders of the `size` numbers of an input. `first`: the first domain is permuted too."""
    made: dict[str, Change | None] = {}
    for t in range(count):
        if t == 0 and not first:
            made["as they are"] = None
            continue
        order = torch.from_numpy(generator(seed, "stream", "permutation", t).permutation(size))

        def change(x: Tensor, order: Tensor = order) -> Tensor:
            return x.flatten(1).index_select(1, order.to(x.device)).view(x.shape)

        made[f"permutation {t + 1}"] = change
    return made


def rotations(count: int, *, most: float = 180.0, seed: int = 0) -> dict[str, Change | None]:
    """`count` fixed angles, uniform in 0 … `most` degrees, for images [n, (c,) h, w]; zeros come in from outside."""
    angles = [float(generator(seed, "stream", "angle", t).uniform(0, most)) for t in range(count)]
    return {f"{angle:.1f} degrees": _Rotation(math.radians(angle)) for angle in angles}


@dataclass(frozen=True)
class _Rotation:
    """Turns images to the left, between pixels linearly; uint8 stays uint8."""

    angle: float

    def __call__(self, x: Tensor) -> Tensor:
        images = (x if x.dim() == 4 else x.unsqueeze(1)).float()
        height, width = images.shape[-2:]
        cosine, sine = math.cos(self.angle), math.sin(self.angle)
        turn = [[cosine, -sine * height / width, 0.0], [sine * width / height, cosine, 0.0]]
        maps = torch.tensor(turn, device=x.device).expand(len(images), 2, 3)
        grid = torch.nn.functional.affine_grid(maps, list(images.shape), align_corners=False)
        turned = torch.nn.functional.grid_sample(images, grid, align_corners=False).view(x.shape)
        return turned.to(x.dtype) if x.is_floating_point() else turned.round().to(x.dtype)
