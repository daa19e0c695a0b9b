"""NKD, normalised distillation: the label's probability and the normalised rest as two cross-entropies.

For classifiers, as a plain replacement of KD. Yang et al., From Knowledge Distillation to Self-Knowledge Distillation: A
Unified Approach with Normalized Loss and Customized Soft Labels, ICCV 2023, arXiv 2303.13005.

    L = ce CE(s, y) - p_y^T log p_y^S - gamma T^2 sum_{i != y} phat_i^T log phat_i^S

p is at temperature 1; phat, the softmax over all classes but the label, at T. A cross-entropy, not a KL: its least value is
not 0.

| paper | here |
|---|---|
| T_t, S_t | probability of the label, in term `target` |
| N(T_i), N(S_i) | phat, in term `others` |
| lambda, gamma | temperature, `settings.gamma` |

Data touched: inputs and labels. Departure: log-softmax throughout.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.divergence import other_cross_entropy, target_cross_entropy
from spolia.core.settings import Settings, setting
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_YANG = "Yang et al. 2023, ImageNet"


class Nkd(Settings):
    """Settings of `nkd`."""

    temperature: float = setting(1.0, "T of the classes other than the label", source=_YANG, gt=0)
    gamma: float = setting(1.5, "weight of the classes other than the label", source=_YANG, ge=0)
    ce: float = setting(1.0, "weight of the labels' cross-entropy", source=_YANG, ge=0)


def nkd(settings: Nkd | None = None) -> Objective:
    """The objective; its terms are `target` and `others`. Labels are needed."""
    settings = settings or Nkd()
    return Objective(lambda seen: normalised(seen, settings, settings.temperature), ce=settings.ce, labelled=True)


def normalised(seen: Seen, settings: Nkd, temperature: float | Tensor) -> dict[str, Tensor]:
    """Both terms [...], at any temperature."""
    assert seen.labels is not None
    student, teacher, labels = seen.student.logits, seen.teacher.logits, seen.labels
    return {
        "target": target_cross_entropy(student, teacher, labels),
        "others": settings.gamma * other_cross_entropy(student, teacher, labels, temperature),
    }
