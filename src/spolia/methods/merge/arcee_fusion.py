"""Arcee Fusion: take over those of a fine-tune's changes that stand out, and keep the base everywhere else.

Arcee's MergeKit, Goddard et al. 2024, arXiv 2403.13257; the method came with its code in 2025.

    I = |x - b| * KL,   KL of a row = sum p log(p / q),   p = softmax(x) + 1e-8,  q = softmax(b) + 1e-8
    theta = x where I >= median + 1.5 (q_3/4 - q_1/4),    b elsewhere

| formula | here |
|---|---|
| b, x | `block.base`, the expert |
| row | last dimension; a vector is one row |
| 1.5 | `settings.spread` |
| median, quartiles | of I over the tensor: the elements at place floor(q (n - 1)) in ascending order |

KL is not of any output distribution: it is how unevenly a row of weights has changed. Departures: the quantiles are
exact, where mergekit samples a million elements of larger tensors; KL is summed in fp64 and cannot be negative, where
fp32 loses most of its digits between close fine-tunes. Four reads. Data touched: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import torch
from spolia.core.select import cuts
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor

_EPS = 1e-8


class ArceeFusion(MergeSettings):
    """Settings of `arcee_fusion`."""

    experts: ClassVar[tuple[int, int | None]] = (1, 1)

    spread: float = setting(
        1.5, "interquartile ranges above the median at which a change stands out", source="Goddard et al. 2024, code"
    )

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        return 2 / max(shape[-1], 1) if len(shape) > 1 else 0.0  # one fp64 number a row


def arcee_fusion(stack: Stack, settings: ArceeFusion) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    row = max(stack.row, 1)
    divergence = torch.empty(stack.numel // row, 1, dtype=torch.float64)  # one piece: many small ones split the heap
    for block in stack.blocks(whole_rows=True):
        divergence[block.start // row : block.stop // row] = _divergence(block, row)

    def importance(block: Block) -> Tensor:
        assert block.base is not None
        rows = (block.experts[0] - block.base).abs_().view(-1, stack.row)
        return rows.mul_(divergence[block.start // row : block.stop // row].to(rows.dtype)).view(-1)

    threshold = _threshold(stack, importance, settings.spread)
    for block in stack.blocks(whole_rows=True):
        assert block.base is not None
        found = importance(block)
        mixed = torch.where(found >= threshold, block.experts[0], block.base)
        yield block, mixed.masked_fill_(found.isnan(), torch.nan)  # a broken model must show


def _divergence(block: Block, row: int) -> Tensor:
    """KL of each row: fp64 [rows, 1]."""
    assert block.base is not None
    p = block.experts[0].view(-1, row).double().softmax(1).add_(_EPS)
    q = block.base.view(-1, row).double().softmax(1).add_(_EPS)
    return torch.div(p, q, out=q).log_().mul_(p).sum(1, keepdim=True).clamp_(min=0)


def _threshold(stack: Stack, importance: Callable[[Block], Tensor], spread: float) -> float:
    """Median plus `spread` interquartile ranges of the importance."""
    n = stack.numel
    ranks = [n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]  # 1 is the largest

    def sweep(count: Callable[[Tensor, Tensor], None], totals: Tensor) -> None:
        for block in stack.blocks(whole_rows=True):
            count(importance(block).unsqueeze(0), totals)

    low, median, high = (cut.value for cut in cuts(sweep, [ranks], stack.dtype)[0])
    return median + spread * (high - low)
