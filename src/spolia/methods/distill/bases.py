"""The losses that a rank term may be added to, as one field of its settings."""

from __future__ import annotations

from typing import Any

from spolia.core.settings import Settings
from spolia.methods.distill.attention import Attention, attention
from spolia.methods.distill.ctkd import Ctkd, ctkd
from spolia.methods.distill.dist import Dist, dist
from spolia.methods.distill.dkd import Dkd, dkd
from spolia.methods.distill.fitnets import Fitnets, fitnets
from spolia.methods.distill.kd import Kd, kd
from spolia.methods.distill.lskd import Lskd, lskd
from spolia.methods.distill.mlkd import Mlkd, mlkd
from spolia.methods.distill.nested import one_of
from spolia.methods.distill.nkd import Nkd, nkd
from spolia.methods.distill.objective import Objective
from spolia.methods.distill.rkd import Rkd, rkd

_MADE_BY: dict[type[Settings], Any] = {
    Kd: kd,
    Dkd: dkd,
    Dist: dist,
    Nkd: nkd,
    Lskd: lskd,
    Mlkd: mlkd,
    Ctkd: ctkd,
    Rkd: rkd,
    Fitnets: fitnets,
    Attention: attention,
}
Base: Any = one_of({kind.__name__.lower(): kind for kind in _MADE_BY})
"""Type of a settings field: `base: dkd`, or `base: {name: dkd, beta: 2}`."""


def objective_of(settings: Settings) -> Objective:
    """The objective that the settings of any of these losses mean."""
    return _MADE_BY[type(settings)](settings)
