"""PCB-Merging: let the weights compete, within their expert by size and between experts by agreement, and merge winners.

For experts of one base that disturb each other when added. Du et al., Parameter Competition Balancing for Model Merging,
NeurIPS 2024, arXiv 2410.02396. Over the whole model, for each of K experts:

    a_k = |tau_k| clamped to its [clip, 1 - clip] quantiles
    s_k = exp(K minmax(a_k)^2) tanh(tau_k sum_j tau_j)
    b_k = minmax(max(s_k, the (1 - r) quantile of s_k))             in 0 .. 1
    theta = theta_0 + lambda sum_k w_k b_k sign(tau_k) a_k / sum_k b_k

| paper | here |
|---|---|
| intra-balancing, inter-balancing | the two factors in `_scores` |
| r | `settings.density` |
| lambda, lambda_k | `settings.scale`, `settings.weight` |

Data touched: none; the paper searches lambda_k in 0.8 .. 1.3 on labelled validation data. Three variants are published;
this is the file at the root of the repository, in which the sum of tau is not clamped. Departures: quantiles and extremes
come from histograms of the stream (exact, see core/select); the scores are computed as exp(K (minmax^2 - 1)) tanh, the
same up to a factor that min-max removes, so that many experts do not overflow; an expert whose scores are all equal (an
unchanged one) has no say, where the published code divides by zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import torch
from spolia.core.select import Count, cuts
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import BLOCK, Block, Stack
from spolia.methods.merge.sparsifiers import Model

if TYPE_CHECKING:
    from torch import Tensor

_CODE = "Du et al. 2024, code"


class Pcb(MergeSettings):
    """Settings of `pcb`."""

    vectors: ClassVar[bool] = True

    density: float = setting(0.1, "r, share of each expert's weights that win", source=_CODE, gt=0, le=1)
    weight: PerModel = setting(1.0, "lambda_k, factor of each task vector", source=f"{_CODE}: start of its search")
    scale: float = setting(1.0, "lambda, factor of the merged task vector", source=f"{_CODE}: start of its search")
    clip: float = setting(
        1e-4, "share of the smallest and of the largest changes that is clamped", source=_CODE, ge=0, lt=0.5
    )

    @property
    def elementwise(self) -> bool:
        return True


@dataclass(frozen=True)
class Survey:
    """Per expert of the pool: the limits of |tau|, and the least winning and the highest score. Each [experts]."""

    low: Tensor
    high: Tensor
    threshold: Tensor
    top: Tensor


def survey(model: Model, settings: Pcb) -> Survey:
    """Quantiles and extremes of the whole model, in four sweeps (six if fewer scores than r of an expert are positive)."""
    dtype, experts = model.dtype(), len(model.sizes)
    found = cuts(model.sweep, [[*_limits(n, settings.clip), 1] for n in model.sizes], dtype)
    if not all(math.isfinite(row[-1].value) for row in found):
        model.each(_blame)
    low, high = (torch.tensor([row[end].value for row in found], dtype=dtype) for end in (0, 1))

    def sweep(sign: float) -> Callable[[Count, Tensor], None]:
        def over(count: Count, totals: Tensor) -> None:
            model.sweep(
                lambda deltas, own: count(_scores(deltas, low, high, experts).mul_(sign).clamp_(min=0), own), totals
            )

        return over

    ranks = [n - _index(n, 1 - settings.density) for n in model.sizes]  # from the top
    positive = cuts(sweep(1.0), [[rank, 1] for rank in ranks], dtype)
    threshold = [row[0].value for row in positive]
    top = [row[1].value for row in positive]
    if not all(threshold):  # some lie at or below zero: look at the magnitudes there
        lowest = [[n - rank + 1, n] for n, rank in zip(model.sizes, ranks, strict=True)]
        negative = cuts(sweep(-1.0), lowest, dtype)
        threshold = [t or -row[0].value for t, row in zip(threshold, negative, strict=True)]
        top = [t or -row[1].value for t, row in zip(top, negative, strict=True)]
    return Survey(low, high, torch.tensor(threshold, dtype=dtype), torch.tensor(top, dtype=dtype))


def pcb(stack: Stack, settings: Pcb, survey: Survey) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    low, high, threshold, top = (
        t[stack.places].to(stack.dtype) for t in (survey.low, survey.high, survey.threshold, survey.top)
    )
    spread = (top - threshold).unsqueeze(1)  # [experts, 1]
    weight = torch.tensor(each(settings.weight, len(stack.experts)), dtype=stack.dtype).unsqueeze(1)
    for block in stack.blocks():
        deltas = block.deltas()
        scores = _scores(deltas, low, high, len(survey.low))
        shares = torch.maximum(scores, threshold.unsqueeze(1)).sub_(threshold.unsqueeze(1))
        shares.div_(spread.where(spread > 0, torch.inf))
        clamped = deltas.abs()
        for row, least, most in zip(clamped, low.tolist(), high.tolist(), strict=True):
            row.clamp_(least, most)
        mix = clamped.mul_(deltas.sign_()).mul_(shares).mul_(weight).sum(0).div_(shares.sum(0).clamp_(min=1e-12))
        assert block.base is not None
        yield block, block.base.add_(mix, alpha=settings.scale)


def _blame(stack: Stack) -> None:
    for start in range(0, stack.numel, BLOCK):
        stack.blame(start, min(start + BLOCK, stack.numel))


def _scores(deltas: Tensor, low: Tensor, high: Tensor, experts: int) -> Tensor:
    """exp(K (minmax(|tau|)^2 - 1)) tanh(tau sum tau): [experts, n]."""
    size = deltas.abs()
    for row, least, most in zip(size, low.tolist(), high.tolist(), strict=True):
        row.clamp_(least, most).sub_(least).div_(most - least if most > least else math.inf)
    intra = size.square_().sub_(1).mul_(experts).exp_()
    return (deltas * deltas.sum(0)).tanh_().mul_(intra)


def _index(n: int, share: float) -> int:
    """The published code's place of a quantile among n sorted values."""
    return min(max(int(n * share), 0), n - 1)


def _limits(n: int, clip: float) -> list[int]:
    """Ranks, from the top, of the two limits."""
    return [n - _index(n, clip), n - min(max(int(n * (1 - clip) - 1), 0), n - 1)]
