"""MLKD, multi-level logit distillation: predictions, relations of samples and relations of classes, at five temperatures.

For images, each seen in a weak and a strong augmentation. Jin, Wang, Lin, Multi-Level Logit Distillation, CVPR 2023,
doi:10.1109/CVPR52729.2023.02325.

    L = ce [CE(weak) + CE(strong)] + alpha sum_T { mean_b m_b KL_b(weak) + mean_b KL_b(strong)
        + mean_b m_b sum_j (G^T - G^S)_bj^2   (both views)  + sum_ab n_b (H^T - H^S)_ab^2 / C   (n = 1 for the strong view) }
    G = p p^T [B, B],   H = p^T p [C, C],   p = softmax(. / T),   KL carries T^2

m marks the samples, n the classes, that the teacher is at most median sure of, on the weak view.

| paper | here |
|---|---|
| instance, batch, class level | terms `kd`, `batch`, `class` |
| augmented temperatures | `settings.temperature` and `more` |

Data touched: inputs in two augmentations, and their labels unless `ce` is 0 or none are given. Logits are [2, ..., C], weak
first; the loss is [2, ...], of which the mean is L: every term of one view stands there twice. A sample carries its own row
of the batch level and the whole of the class level. The published code reduces its losses before the masks, so that these
are a constant factor near a half; gives the strong view's KL the weak logits at T = 2 and 6; and throws the strong view's
relations away. Here masks select and both views count; `compat: true` is the loss as their code computes it. Where it would
divide a masked class relation by C^2 once more, had its masks worked, we do not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import field_validator

from spolia.core.divergence import kl, standardized
from spolia.core.lazy import torch
from spolia.core.relations import class_gram, sample_gram
from spolia.core.settings import Settings, setting
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_JIN = "Jin et al. 2023, CIFAR-100"
_WEAK_ALWAYS = (2.0, 6.0)  # temperatures at which the published code takes the weak logits for the strong


class Mlkd(Settings):
    """Settings of `mlkd`."""

    temperature: float = setting(4.0, "T, by which logits are divided", source=_JIN, gt=0)
    more: tuple[float, ...] = setting((2.0, 3.0, 5.0, 6.0), "further temperatures", source=_JIN)
    alpha: float = setting(0.9, "weight of every term", source=_JIN, ge=0)
    ce: float = setting(0.1, "weight of the labels' cross-entropy, of each view", source=_JIN, ge=0)
    standardize: bool = setting(
        False, "whether the KL terms see z-scores; lskd sets it", source="Sun et al. 2024, arXiv 2403.01427"
    )
    compat: bool = setting(False, "the loss as the published code computes it, with its slips", source="our choice")

    @field_validator("more")
    @classmethod
    def _hot(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(heat > 0 for heat in value):
            raise ValueError("temperatures are above 0")
        return value


def mlkd(settings: Mlkd | None = None) -> Objective:
    """The objective; its terms are `kd`, `batch`, `class`. Logits [2, ..., C]: a weak and a strong view."""
    settings = settings or Mlkd()
    return Objective(lambda seen: _terms(seen, settings), ce=2 * settings.ce, views=2)


def _terms(seen: Seen, settings: Mlkd) -> dict[str, Tensor]:
    shape = seen.student.logits.shape[:-1]
    student, teacher = (out.logits.flatten(1, -2) for out in (seen.student, seen.teacher))  # [2, n, C]
    kept = None if seen.kept is None else seen.kept.flatten(1).all(0).nonzero().squeeze(-1)
    if kept is not None:
        student, teacher = student[:, kept], teacher[:, kept]
    levels = (_published if settings.compat else _levels)(student, teacher, settings)
    if kept is not None:
        zeros = student.new_zeros(2, shape[1:].numel())
        levels = {name: zeros.index_copy(1, kept, term) for name, term in levels.items()}
    return {name: 2 * settings.alpha * term.reshape(shape) for name, term in levels.items()}


def _levels(student: Tensor, teacher: Tensor, settings: Mlkd) -> dict[str, Tensor]:
    """Each level [2, n], summed over the temperatures."""
    unsure, rare = (mask.to(student.dtype) for mask in _masks(teacher[0]))
    both = torch.stack([unsure, torch.ones_like(unsure)])
    found = dict.fromkeys(("kd", "batch", "class"), torch.zeros_like(both))
    for temperature in (settings.temperature, *settings.more):
        found["kd"] = found["kd"] + both * _instances(student, teacher, temperature, settings)
        p, q = (student / temperature).softmax(-1), (teacher / temperature).softmax(-1)
        found["batch"] = found["batch"] + unsure * torch.stack([sample_gram(p[v], q[v]) for v in (0, 1)])
        of_classes = torch.stack([class_gram(p[0], q[0], rare > 0), class_gram(p[1], q[1])])
        found["class"] = found["class"] + of_classes.unsqueeze(1)
    return found


def _published(student: Tensor, teacher: Tensor, settings: Mlkd) -> dict[str, Tensor]:
    """As the published code: batch means first, then the mean of the mask; no relations of the strong view."""
    unsure, rare = (mask.to(student.dtype).mean() for mask in _masks(teacher[0]))
    found = dict.fromkeys(("kd", "batch", "class"), student.new_zeros(2))
    for i, temperature in enumerate((settings.temperature, *settings.more)):
        weak, strong = _instances(student, teacher, temperature, settings).mean(1)
        named_strong = weak if i and temperature in _WEAK_ALWAYS else strong
        found["kd"] = found["kd"] + torch.stack([unsure * weak, named_strong])
        p, q = (student[0] / temperature).softmax(-1), (teacher[0] / temperature).softmax(-1)
        nothing = torch.zeros_like(weak)
        found["batch"] = found["batch"] + torch.stack([unsure * sample_gram(p, q).mean(), nothing])
        found["class"] = found["class"] + torch.stack([rare * class_gram(p, q), nothing])
    return {name: term.unsqueeze(1).expand(2, student.shape[1]) for name, term in found.items()}


def _instances(student: Tensor, teacher: Tensor, temperature: float, settings: Mlkd) -> Tensor:
    if settings.standardize:
        student, teacher = standardized(student), standardized(teacher)
    return kl(student, teacher, temperature)


def _masks(weak: Tensor) -> tuple[Tensor, Tensor]:
    """Samples [n] and classes [C] that the teacher is at most median sure of, from its logits [n, C]."""
    p = weak.softmax(-1)
    sure, often = p.amax(-1), p.sum(0)
    return sure <= _median(sure), often <= _median(often)


def _median(x: Tensor) -> Tensor:
    """Half-way between the middle two; no limit on the number, which torch.quantile has."""
    ordered = x.sort().values
    return (ordered[(len(x) - 1) // 2] + ordered[len(x) // 2]) / 2 if len(x) else x.sum()
