"""CTKD, curriculum temperature: a temperature that is learned against the student, from easy to hard.

For whoever does not want to search for T. Li et al., Curriculum Temperature for Knowledge Distillation, AAAI 2023,
arXiv 2211.16231.

    T = least + span sigmoid(theta),    theta goes up the base loss's slope: its gradient is multiplied by
    lambda = -(1 - cos(pi min(progress / ramp, 1))) / 2,    from 0 at the start to -1

| paper | here |
|---|---|
| T_pred, global | `learned["theta"]`, 1 at the start |
| tau_init, tau_range | `settings.least`, `span` |
| lambda, over 10 epochs of 240 | `ramp`, a share of the training |
| alpha_1, alpha_2 | weights of the base |

Data touched: that of the base. The base's own temperature is not used; its factor T^2 stays in the graph, as published.
Departures: lambda moves with every step, where theirs moves with every epoch; the temperature of each instance, from a
small network on both logits, is not offered.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.settings import Settings, setting
from spolia.methods.distill.dkd import Dkd, decoupled
from spolia.methods.distill.kd import Kd, soft
from spolia.methods.distill.nested import one_of
from spolia.methods.distill.nkd import Nkd, normalised
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_LI = "Li et al. 2023, CIFAR-100"
_Base: Any = one_of({"kd": Kd, "dkd": Dkd, "nkd": Nkd})


class Ctkd(Settings):
    """Settings of `ctkd`."""

    base: _Base = setting("kd", "loss whose temperature is learned: kd, dkd, nkd", source=_LI, validate_default=True)
    least: float = setting(1.0, "lowest temperature", source=_LI, gt=0)
    span: float = setting(20.0, "how far above it the temperature can go", source=_LI, ge=0)
    start: float = setting(1.0, "theta at the start: T = 15.6", source=_LI)
    ramp: float = setting(
        10 / 240, "share of the training over which lambda goes to -1: 10 of 240 epochs", source=_LI, ge=0, le=1
    )


def ctkd(settings: Ctkd | None = None) -> Objective:
    """The base's objective; `learned` holds theta, which the optimiser must have beside the student's parameters."""
    settings = settings or Ctkd()
    theta = torch.tensor(settings.start, dtype=torch.float32).requires_grad_()
    base = settings.base

    def terms(seen: Seen) -> dict[str, Tensor]:
        temperature = _reversed(_temperature(seen.learned["theta"], settings), reversal(seen.progress, settings.ramp))
        temperature = temperature.to(seen.student.logits)
        if isinstance(base, Dkd):
            return decoupled(seen, base, temperature)
        if isinstance(base, Nkd):
            return normalised(seen, base, temperature)
        return {"kd": soft(seen, base, temperature)}

    return Objective(terms, ce=base.ce, labelled=not isinstance(base, Kd), learned={"theta": theta})


def reversal(progress: float, ramp: float) -> float:
    """lambda, 0 to -1: what theta's gradient is multiplied by."""
    reached = min(progress / ramp, 1.0) if ramp else 1.0
    return -(1 - math.cos(math.pi * reached)) / 2


def _temperature(theta: Tensor, settings: Ctkd) -> Tensor:
    return settings.least + settings.span * theta.sigmoid()


def _reversed(x: Tensor, factor: float) -> Tensor:
    """x, whose gradient is multiplied by `factor`."""
    return x.detach() + factor * (x - x.detach())
