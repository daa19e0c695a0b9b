"""NearSwap: take over the other model's values where they are close, and go no further than t towards them elsewhere.

alchemonaut, BoreanGale-70B, model card, 2024; as a method in Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257.

    w = clip(t / |x - b|, 0, 1),   theta = w x + (1 - w) b      which is      theta = clip(x, b - t, b + t)

| formula | here |
|---|---|
| b | `block.base`, the model that most is kept of |
| x | the expert |
| t | `settings.t`, in the unit of the weights |

At t = 0 the base comes out, at a large t the expert. For two models that share no history it is a cautious blend.
Departure: computed as the clip on the right, which is exact. Data touched: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


class NearSwap(MergeSettings):
    """Settings of `nearswap`."""

    experts: ClassVar[tuple[int, int | None]] = (1, 1)

    t: float = setting(
        0.001, "largest change of a weight", source="BoreanGale-70B, model card", unit="of weights", ge=0
    )

    @property
    def elementwise(self) -> bool:
        return True


def nearswap(stack: Stack, settings: NearSwap) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    for block in stack.blocks():
        assert block.base is not None
        low, high = block.base - settings.t, block.base + settings.t
        yield block, torch.minimum(torch.maximum(block.experts[0], low), high)
