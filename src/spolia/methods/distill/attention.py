"""Attention transfer: the student looks where the teacher looks, layer by layer.

For convolutional networks, or tokens, of any two widths. Zagoruyko & Komodakis, Paying More Attention to Attention, ICLR
2017, arXiv 1612.03928.

    L = ce CE(s, y) + weight sum_sites mean_places (Q^S / |Q^S| - Q^T / |Q^T|)^2,    Q = mean over channels of |A|^p

| paper | here |
|---|---|
| A, F_sum^p | feature, `core.features.attention_map` before it is divided by its length |
| beta | `settings.weight` |
| p | `settings.power` |

Data touched: inputs, and their labels unless `ce` is 0 or none are given. The mean over places, and the weight with it, are
the published code's; the paper writes a sum and beta / 2. Maps of two sizes are averaged to the smaller.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.features import attention_distance
from spolia.core.settings import setting
from spolia.methods.distill.objective import Objective, Seen
from spolia.methods.distill.sites import Sites

if TYPE_CHECKING:
    from torch import Tensor

_TABLES = "mdistiller, CIFAR-100"


class Attention(Sites):
    """Settings of `attention`."""

    weight: float = setting(1000.0, "weight of the maps' distance", source=_TABLES, ge=0)
    power: float = setting(2.0, "p, to which values are raised", source=_TABLES, gt=0)
    ce: float = setting(1.0, "weight of the labels' cross-entropy", source=_TABLES, ge=0)


def attention(settings: Attention) -> Objective:
    """The objective; its term is `attention`."""

    def terms(seen: Seen) -> dict[str, Tensor]:
        pairs = zip(seen.student.features, seen.teacher.features, strict=True)
        apart = [attention_distance(ours, theirs, settings.power) for ours, theirs in pairs]
        return {"attention": settings.weight * sum(apart[1:], apart[0])}

    return Objective(terms, ce=settings.ce, taps=settings.pairs("attention"))
