"""Weighted average of fine-tuned weights, for anyone whose experts grew from one base and stayed close to it.

Wortsman et al., Model soups, ICML 2022, arXiv 2203.05482.

    theta = sum_k w_k theta_k / sum_k w_k

| paper | here |
|---|---|
| theta_k | row k of `block.experts` |
| w_k (uniform soup: 1) | `settings.weight` |

Data touched: none. Departure: `normalize=False` leaves out the division, as recipes elsewhere allow.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


class Average(MergeSettings):
    """Settings of `average`."""

    base: ClassVar[str] = "unused"

    weight: PerModel = setting(1.0, "share of each expert", source="uniform soup, Wortsman et al. 2022")
    normalize: bool = setting(True, "divide by the sum of the weights", source="uniform soup, Wortsman et al. 2022")

    @property
    def elementwise(self) -> bool:
        return True


def average(stack: Stack, settings: Average) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    weights = each(settings.weight, len(stack.experts))
    total = sum(weights) if settings.normalize else 1.0
    share = torch.tensor([w / total for w in weights], dtype=stack.dtype)  # [experts]
    for block in stack.blocks():
        yield block, torch.mv(block.experts.t(), share)
