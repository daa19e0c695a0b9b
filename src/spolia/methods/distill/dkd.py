"""DKD, decoupled distillation: what the teacher says of the label and what it says of the rest, weighted apart.

For classifiers whose teacher is so sure of the label that KD hides how it orders the rest. Zhao et al., Decoupled Knowledge
Distillation, CVPR 2022, arXiv 2203.08679.

    L = ce CE(s, y) + w(progress) T^2 [ alpha KL(b^T || b^S) + beta KL(phat^T || phat^S) ],    b = (p_y, 1 - p_y)

phat is the softmax over all classes but the label y, everything at temperature T; w grows from 0 to 1. KD is alpha = 1 and
beta = 1 - p_y^T.

| paper | here |
|---|---|
| TCKD, NCKD | terms `target`, `others` |
| alpha, beta, T | `settings.alpha`, `beta`, `temperature` |
| warm-up of 20 epochs in 240 | `warmup`, a share of the training |

Data touched: inputs and labels. Departures: computed from log-softmax and the log-sum-exp of the other classes, where the
published code takes the log of a softmax that can be 0 and subtracts 1000 from the label's logit; the warm-up grows with
every step, where theirs grows with every epoch, the first of which counts as one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.divergence import other_kl, target_kl
from spolia.core.settings import Settings, setting
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_ZHAO = "Zhao et al. 2022, CIFAR-100"


class Dkd(Settings):
    """Settings of `dkd`."""

    temperature: float = setting(4.0, "T, by which logits are divided", source=_ZHAO, gt=0)
    alpha: float = setting(1.0, "weight of the label against the rest", source=_ZHAO, ge=0)
    beta: float = setting(8.0, "weight of the rest among themselves; published pairs have 0.5 to 8", source=_ZHAO, ge=0)
    ce: float = setting(1.0, "weight of the labels' cross-entropy", source=_ZHAO, ge=0)
    warmup: float = setting(
        20 / 240,
        "share of the training over which both weights grow from 0: 20 of 240 epochs",
        source=_ZHAO,
        ge=0,
        le=1,
    )


def dkd(settings: Dkd | None = None) -> Objective:
    """The objective; its terms are `target` and `others`. Labels are needed."""
    settings = settings or Dkd()
    return Objective(lambda seen: decoupled(seen, settings, settings.temperature), ce=settings.ce, labelled=True)


def decoupled(seen: Seen, settings: Dkd, temperature: float | Tensor) -> dict[str, Tensor]:
    """Both terms [...], at any temperature."""
    assert seen.labels is not None
    grown = min(seen.progress / settings.warmup, 1.0) if settings.warmup else 1.0
    logits = (seen.student.logits, seen.teacher.logits, seen.labels, temperature)
    return {
        "target": grown * settings.alpha * target_kl(*logits),
        "others": grown * settings.beta * other_kl(*logits),
    }
