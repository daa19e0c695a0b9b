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

from pydantic import model_validator

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import Block, Stack
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


class Average(MergeSettings):
    """Settings of `average`."""

    base: ClassVar[str] = "unused"

    weight: PerModel = setting(1.0, "share of each expert", source="uniform soup, Wortsman et al. 2022")
    normalize: bool = setting(True, "divide by the sum of the weights", source="uniform soup, Wortsman et al. 2022")

    @model_validator(mode="after")
    def _weights_have_a_sum(self) -> Average:
        weights = (self.weight,) if isinstance(self.weight, int | float) else self.weight
        if self.normalize and abs(sum(weights)) < 1e-8:
            raise ValueError("weight: the weights sum to zero and cannot be divided by; set normalize to false")
        return self

    @property
    def elementwise(self) -> bool:
        return True


def average(stack: Stack, settings: Average) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    weights = each(settings.weight, len(stack.experts))
    total = sum(weights) if settings.normalize else 1.0
    if abs(total) < 1e-8:
        what = f"the weights of the experts that have `{stack.name}` sum to zero"
        raise SpoliaError(what, where="settings.weight", mend="change a weight, or set normalize to false")
    share = torch.tensor([w / total for w in weights], dtype=stack.dtype)  # [experts]
    for block in stack.blocks():
        yield block, torch.mv(block.experts.t(), share)
