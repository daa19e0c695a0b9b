"""Task arithmetic: add what each expert learned to the base, or subtract what it should forget.

Ilharco et al., Editing models with task arithmetic, ICLR 2023, arXiv 2212.04089.

    theta = theta_0 + lambda * sum_k w_k tau_k,    tau_k = theta_k - theta_0

| paper | here |
|---|---|
| theta_0 | `block.base` |
| tau_k | row k of `block.deltas()` |
| lambda | `settings.scale` |
| negation | a negative `weight` or `scale` |

Data touched: none; the paper tunes lambda on validation data, 0.3 is its choice for eight tasks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


class TaskArithmetic(MergeSettings):
    """Settings of `task_arithmetic`."""

    vectors: ClassVar[bool] = True

    weight: PerModel = setting(1.0, "factor of each task vector; negative unlearns", source="Ilharco et al. 2023")
    scale: float = setting(0.3, "lambda, factor of the summed task vectors", source="Yang et al. 2024 for eight tasks")
    normalize: bool = setting(False, "divide the sum by the sum of the weights", source="Ilharco et al. 2023")

    @property
    def elementwise(self) -> bool:
        return True


def task_arithmetic(stack: Stack, settings: TaskArithmetic) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    weights = each(settings.weight, len(stack.experts))
    total = sum(weights) if settings.normalize and abs(sum(weights)) >= 1e-8 else 1.0
    factor = torch.tensor([settings.scale * w / total for w in weights], dtype=stack.dtype)  # [experts]
    for block in stack.blocks():
        assert block.base is not None
        yield block, torch.addmv(block.base, block.deltas().t(), factor)
