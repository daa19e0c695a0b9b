"""TALL masks and Consensus TA: find which summed weights each task uses, to take a task out again or to drop the selfish.

For experts of one base. `consensus_ta` gives one model without the weights that fewer than k tasks use. `tall_masks` gives
the plain sum and one mask an expert, one bit a weight, that brings the expert nearly back once the task is known (see
`spolia.attach`). Wang et al., Localizing Task Information, ICML 2024, arXiv 2405.07813.

    tau = sum_t tau_t,     m_t = [ |tau_t| > lambda_t |tau - tau_t| ]
    tall_masks     theta = theta_0 + tau;  of task t: theta_0 + m_t tau
    consensus_ta   theta = theta_0 + alpha [ sum_t m_t >= k ] tau

| paper | here |
|---|---|
| tau (of task arithmetic) | `deltas.sum(0)` |
| lambda_t | `settings.threshold` |
| k, alpha | `settings.active`, `settings.scale` |

Data touched: none; the paper chooses lambda_t for each task among 0.2 .. 0.6, and alpha, on validation data. Departure:
tau is the sum; the paper also takes TIES for it. One port subtracts task vectors from the base's weights instead of the
expert's; the form above is that of the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import np, torch
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor

_WANG = "Wang et al. 2024"


class TallMasks(MergeSettings):
    """Settings of `tall_masks`."""

    masked: ClassVar[bool] = True

    threshold: PerModel = setting(
        0.4, "lambda_t: higher keeps fewer weights for the expert", source=f"middle of 0.2 to 0.6, {_WANG}"
    )

    @property
    def elementwise(self) -> bool:
        return True


class ConsensusTa(TallMasks):
    """Settings of `consensus_ta`."""

    masked: ClassVar[bool] = False
    vectors: ClassVar[bool] = True

    active: int = setting(
        2, "k: tasks that must use a weight; 0 keeps all, more than there are none", source=_WANG, ge=0
    )
    scale: float = setting(0.3, "alpha, factor of the merged task vector", source="as task_arithmetic")


def tall_masks(stack: Stack, settings: TallMasks) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor, the base plus all task vectors: [n] each."""
    for block in stack.blocks():
        assert block.base is not None
        yield block, block.base.add_(block.deltas().sum(0))


def consensus_ta(stack: Stack, settings: ConsensusTa) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    for block in stack.blocks():
        assert block.base is not None
        deltas = block.deltas()
        total = deltas.sum(0)
        agreed = _margin(deltas, total, settings).sign_().clamp_(min=0).sum(0) >= settings.active
        np.multiply(total.numpy(), agreed.numpy(), out=total.numpy())  # four times faster than torch's
        yield block, block.base.add_(total, alpha=settings.scale)


def masks(stack: Stack, settings: TallMasks) -> Iterator[tuple[Block, Tensor]]:
    """Which elements of the merged change each expert keeps: blocks with bool [experts, n]."""
    for block in stack.blocks():
        deltas = block.deltas()
        yield block, _margin(deltas, deltas.sum(0), settings) > 0


def _margin(deltas: Tensor, total: Tensor, settings: TallMasks) -> Tensor:
    """Above 0 where m_t is 1, for every expert: [experts, n]. A difference is 0 only between equals, so none is lost."""
    threshold = torch.tensor(each(settings.threshold, len(deltas)), dtype=deltas.dtype).unsqueeze(1)
    return deltas.abs().sub_((total - deltas).abs_().mul_(threshold))
