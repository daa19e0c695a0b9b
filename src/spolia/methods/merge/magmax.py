"""MagMax: of all task vectors keep, element by element, the largest change. A cheap merge for tasks learned in turn.

Marczak et al., MagMax: Leveraging model merging for seamless continual learning, ECCV 2024, arXiv 2407.06322.

    tau[p] = tau_k[p],   k = argmax_i |tau_i[p]|;     theta = theta_0 + lambda * tau

| paper | here |
|---|---|
| theta_0 | `block.base` |
| tau_i | row i of `block.deltas()` |
| lambda | `settings.scale` |

The paper fine-tunes each expert from the one before it; any fine-tunes of one base will do. Where two changes of
unlike sign are equally large the positive one is kept, so the order of the experts does not matter. Data touched: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


class MagMax(MergeSettings):
    """Settings of `magmax`."""

    vectors: ClassVar[bool] = True

    scale: float = setting(0.5, "lambda, factor of the merged task vector", source="Marczak et al. 2024")

    @property
    def elementwise(self) -> bool:
        return True


def magmax(stack: Stack, settings: MagMax) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    for block in stack.blocks():
        assert block.base is not None
        deltas = block.deltas()
        high, low = deltas.amax(0), deltas.amin(0)
        yield block, block.base.add_(torch.where(high >= low.neg(), high, low), alpha=settings.scale)
