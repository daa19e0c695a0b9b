"""EMR-Merging: elect one change for all, and give each expert a mask and one factor that turn it back into its own.

For experts of one base, used with the task known: the merged model with an expert's mask and factor comes close to the
expert, at one bit a weight (see `spolia.attach`). The merged model by itself is no good compromise. Huang et al.,
NeurIPS 2024, arXiv 2405.17461.

    gamma = sign(sum_k tau_k)  (minus where the sum is zero)
    tau_u = gamma max{ |tau_k| : sign(tau_k) = gamma }                  theta = theta_0 + tau_u
    M_k = [ tau_k tau_u > 0 ],   c_k = sum |tau_k| / sum |M_k tau_u|     of task k: theta_0 + c_k M_k tau_u

| paper | here |
|---|---|
| Elect | `_elected` |
| Mask | `masks` |
| Rescale | `rescalers`, sums over the whole model |

Data touched: none. Departure: the sums run over elements; the published code adds up each tensor's mean instead, in which
a bias counts as much as a matrix (`rescale: tensors`). Elected values are differences that some expert has, so a bf16
model holds them without loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack
from spolia.methods.merge.sparsifiers import Model

if TYPE_CHECKING:
    from torch import Tensor


class Emr(MergeSettings):
    """Settings of `emr`."""

    masked: ClassVar[bool] = True

    rescale: Literal["elements", "tensors"] = setting(
        "elements",
        "what an expert's factor is summed over: elements, or the means of tensors as in the published code",
        source="Huang et al. 2024",
    )

    @property
    def elementwise(self) -> bool:
        return True


def emr(stack: Stack, settings: Emr) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor, the base plus the elected change: [n] each."""
    for block in stack.blocks():
        assert block.base is not None
        yield block, block.base.add_(_elected(block.deltas()))


def masks(stack: Stack, settings: Emr) -> Iterator[tuple[Block, Tensor]]:
    """Which elements of the elected change each expert keeps: blocks with bool [experts, n]."""
    for block in stack.blocks():
        deltas = block.deltas()
        yield block, _kept(deltas, _elected(deltas))


def rescalers(model: Model, settings: Emr) -> list[float]:
    """c_k of every expert, in one sweep; 1 where nothing changed."""
    experts = len(model.sizes)

    def norms(stack: Stack) -> tuple[list[float], list[float]]:
        before, after = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
        for block in stack.blocks():
            deltas = block.deltas()
            elected = _elected(deltas)
            before[stack.places] += deltas.abs().sum(1, dtype=torch.float64)
            agreeing = deltas.sign_().mul_(elected.sign()).clamp_(min=0)
            after[stack.places] += agreeing.mul_(elected.abs_()).sum(1, dtype=torch.float64)
        size = stack.numel if settings.rescale == "tensors" else 1
        return (before / max(size, 1)).tolist(), (after / max(size, 1)).tolist()

    found = list(model.each(norms).values())
    sums = [[math.fsum(pair[side][k] for pair in found) for side in (0, 1)] for k in range(experts)]
    return [before / after if after > 0 else 1.0 for before, after in sums]


def _elected(deltas: Tensor) -> Tensor:
    """tau_u [n] of task vectors [experts, n]."""
    one = torch.ones((), dtype=deltas.dtype)
    sign = torch.copysign(one, 0 - deltas.sum(0)).neg_()  # 0 - 0 is +0, so that a sum of zero gives minus
    return (deltas * sign).clamp_(min=0).amax(0).mul_(sign)


def _kept(deltas: Tensor, elected: Tensor) -> Tensor:
    return (deltas.sign() * elected.sign()) > 0  # the product of the values could underflow
