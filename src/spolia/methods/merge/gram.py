"""Inner products of the models' tensors: enough for every merge that is a linear combination of the models.

The vectors are the experts' tensors, or their task vectors where the stack has a base. K of them have a K x K Gram
matrix; sums in fp64, one read, K^2 numbers, whatever the size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


PIECE = 1 << 15  # elements of each model held in fp64 at a time: they stay in the cache


def vectors(block: Block) -> Tensor:
    """Task vectors where there is a base, else the experts themselves: [experts, n], in the place of `experts`."""
    return block.experts if block.base is None else block.deltas()


def gram(stack: Stack) -> Tensor:
    """Inner products of the whole tensors: fp64 [experts, experts]."""
    total = torch.zeros(len(stack.experts), len(stack.experts), dtype=torch.float64)
    for block in stack.blocks():
        for piece in vectors(block).split(PIECE, dim=1):
            wide = piece.double()
            total.addmm_(wide, wide.t())
    return total


def row_grams(rows: Tensor) -> Tensor:
    """Inner products of each row of a block: [experts, rows, n] -> fp64 [rows, experts, experts]."""
    wide = rows.double().transpose(0, 1)
    return torch.bmm(wide, wide.transpose(1, 2))


def combine(stack: Stack, shares: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """The base, if any, plus each vector times its share [experts]: merged blocks [n]."""
    factor = shares.to(stack.dtype)
    for block in stack.blocks():
        mix = torch.mv(vectors(block).t(), factor)
        yield block, mix if block.base is None else mix.add_(block.base)


def combine_rows(block: Block, rows: Tensor, shares: Tensor) -> Tensor:
    """The same for one block of whole rows, [experts, rows, n] with shares [rows, experts]: merged [rows * n]."""
    mix = (rows * shares.t().unsqueeze(2).to(rows.dtype)).sum(0).view(-1)
    return mix if block.base is None else mix.add_(block.base)
