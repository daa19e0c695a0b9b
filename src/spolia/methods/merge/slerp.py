"""Spherical interpolation: walk from one model to another along the arc between them, tensor by tensor.

Shoemake, SIGGRAPH 1985, doi:10.1145/325165.325242, on each tensor flattened.

    slerp(t; a, b) = sin((1-t) W)/sin W * a + sin(t W)/sin W * b,    cos W = <a, b> / (|a| |b|)

The vectors themselves are combined, not their directions, so between unlike norms the norm does not change linearly.
Where the angle is too small for the formula, or a norm is zero, the interpolation is linear.

| formula | here |
|---|---|
| a | the base when there is one, else the first expert |
| b | the (other) expert |
| t | `settings.t`: 0 gives a, 1 gives b |

Data touched: none. The dot products are summed in fp64, so the angle is exact to fp32 even between close fine-tunes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


PIECE = 1 << 16  # elements held in fp64 at a time


class Slerp(MergeSettings):
    """Settings of `slerp`."""

    base: ClassVar[str] = "optional"
    experts: ClassVar[tuple[int, int | None]] = (1, 2)
    base_counts: ClassVar[bool] = True

    t: float = setting(
        0.5, "place on the arc: 0 is the first model (the base, if given), 1 the other", source="midpoint"
    )
    dot_threshold: float = setting(
        1 - 1e-9, "linear interpolation above this |cosine|", source="where the formula loses fp32's digits", ge=0, le=1
    )

    @property
    def elementwise(self) -> bool:
        return False


def slerp(stack: Stack, settings: Slerp) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each. A tensor that only one model has is copied."""
    if len(stack.experts) + (stack.base is not None) == 1:
        for block in stack.blocks():
            yield block, block.experts[0] if block.base is None else block.base
        return
    share = _shares(_cosine(stack), settings)
    for block in stack.blocks():
        a, b = _ends(block)
        if share is None:
            yield block, torch.lerp(a, b, settings.t)
        else:
            yield block, a.mul_(share[0]).add_(b, alpha=share[1])


def _ends(block: Block) -> tuple[Tensor, Tensor]:
    if block.base is not None:
        return block.base, block.experts[0]
    return block.experts[0], block.experts[1]


def _cosine(stack: Stack) -> float | None:
    """Cosine of the angle between the two flattened tensors; None where one of them is zero."""
    aa = bb = ab = 0.0
    for block in stack.blocks():
        for a, b in zip(*(end.split(PIECE) for end in _ends(block)), strict=True):
            a, b = a.double(), b.double()
            aa, bb, ab = aa + float(a @ a), bb + float(b @ b), ab + float(a @ b)
    norms = math.sqrt(aa) * math.sqrt(bb)
    return max(-1.0, min(1.0, ab / norms)) if norms > 0 else None


def _shares(cosine: float | None, settings: Slerp) -> tuple[float, float] | None:
    """Factors of a and b on the arc; None where the interpolation is linear."""
    if cosine is None or abs(cosine) > min(settings.dot_threshold, 1 - 1e-12):  # on one line there is no arc
        return None
    angle = math.acos(cosine)
    return math.sin((1 - settings.t) * angle) / math.sin(angle), math.sin(settings.t * angle) / math.sin(angle)
