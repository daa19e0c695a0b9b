"""KD, knowledge distillation: the student learns the teacher's softened distribution beside the labels.

For anyone who has a trained classifier or language model and wants a smaller one. Hinton, Vinyals, Dean, Distilling the
Knowledge in a Neural Network, 2015, arXiv 1503.02531.

    L = ce CE(s, y) + alpha T^2 KL(softmax(t / T) || softmax(s / T))

| paper | here |
|---|---|
| z, v | `student`, `teacher` logits [..., C] |
| T | `settings.temperature` |
| weight of the soft targets, of the labels | `alpha`, `ce` |

Data touched: inputs, and their labels unless `ce` is 0 or none are given. Defaults are those of the CIFAR-100 tables that the
other losses of this room are compared on (mdistiller). `divergence` is ours: with language models the reverse KL is in use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from spolia.core import divergence
from spolia.core.settings import Settings, setting
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_TABLES = "mdistiller, CIFAR-100"


class Kd(Settings):
    """Settings of `kd`."""

    temperature: float = setting(4.0, "T, by which logits are divided", source=_TABLES, gt=0)
    alpha: float = setting(0.9, "weight of the divergence, which carries T^2", source=_TABLES, ge=0)
    ce: float = setting(0.1, "weight of the labels' cross-entropy", source=_TABLES, ge=0)
    divergence: Literal["kl", "reverse_kl", "jensen_shannon"] = setting(
        "kl",
        "from teacher to student, from student to teacher, or both from their mixture",
        source="Hinton et al. 2015",
    )


def kd(settings: Kd | None = None) -> Objective:
    """The objective; its term is `kd`. Teacher logits may come from a cache."""
    settings = settings or Kd()
    return Objective(lambda seen: {"kd": soft(seen, settings, settings.temperature)}, ce=settings.ce)


def soft(seen: Seen, settings: Kd, temperature: float | Tensor) -> Tensor:
    """alpha T^2 KL of every sample [...], at any temperature."""
    apart = {
        "kl": divergence.kl,
        "reverse_kl": divergence.reverse_kl,
        "jensen_shannon": divergence.jensen_shannon,
    }[settings.divergence]
    return settings.alpha * apart(seen.student.logits, seen.teacher.logits, temperature)
