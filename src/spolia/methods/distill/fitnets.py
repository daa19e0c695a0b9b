"""FitNets: a layer of the student is led by a layer of the teacher, its hint, through a small regressor.

For students that are deeper and thinner than their teacher. Romero et al., FitNets: Hints for Thin Deep Nets, ICLR 2015,
arXiv 1412.6550.

    L = ce CE(s, y) + weight sum_sites mean (r(feature^S) - feature^T)^2,    r learned with the student

| paper | here |
|---|---|
| hint and guided layer | `settings.teacher_sites`, `student_sites` |
| regressor r | `learned`: a linear map of the channels for each pair of sites |

Data touched: inputs, and their labels unless `ce` is 0 or none are given. Departures: hints and labels are fitted together,
as in the tables the weight is from (mdistiller), where the paper fits the hints first; the regressor is linear, 1 x 1 on
feature maps, without normalisation; maps of two sizes are averaged to the smaller.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spolia.core.divergence import wide
from spolia.core.features import hint, projected, width_of
from spolia.core.lazy import torch
from spolia.core.seeds import entropy
from spolia.core.settings import setting
from spolia.methods.distill.objective import Objective, Outputs, Seen
from spolia.methods.distill.sites import Sites

if TYPE_CHECKING:
    from torch import Tensor

_TABLES = "mdistiller, CIFAR-100"


class Fitnets(Sites):
    """Settings of `fitnets`."""

    weight: float = setting(100.0, "weight of the hints", source=_TABLES, ge=0)
    ce: float = setting(1.0, "weight of the labels' cross-entropy", source=_TABLES, ge=0)


def fitnets(settings: Fitnets) -> Objective:
    """The objective; its term is `hint`. Call `begun` with the outputs of one batch before the optimiser is made."""

    def terms(seen: Seen) -> dict[str, Tensor]:
        pairs = zip(seen.student.features, seen.teacher.features, strict=True)
        apart = [
            hint(projected(wide(ours), seen.learned[f"hint.{i}.weight"], seen.learned[f"hint.{i}.bias"]), theirs)
            for i, (ours, theirs) in enumerate(pairs)
        ]
        return {"hint": settings.weight * sum(apart[1:], apart[0])}

    return Objective(terms, ce=settings.ce, taps=settings.pairs("fitnets"), begin=_regressors)


def _regressors(student: Outputs, teacher: Outputs, seed: int) -> dict[str, Tensor]:
    """Weight [teacher's width, student's width] and bias of each pair, PyTorch's own start for a linear layer."""
    made = {}
    for i, (ours, theirs) in enumerate(zip(student.features, teacher.features, strict=True)):
        source = torch.Generator().manual_seed(entropy(seed, "fitnets", i) % 2**63)
        bound = 1 / math.sqrt(width_of(ours))
        for name, shape in (("weight", (width_of(theirs), width_of(ours))), ("bias", (width_of(theirs),))):
            drawn = torch.empty(shape).uniform_(-bound, bound, generator=source)
            made[f"hint.{i}.{name}"] = drawn.to(ours.device).requires_grad_()
    return made
