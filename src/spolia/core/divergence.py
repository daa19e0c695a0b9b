"""Divergences: how far a student's outputs are from a teacher's, for every sample, on tensors alone.

    divergence(student logits [..., C], teacher logits [..., C]) -> loss of every sample [...]

All leading axes are samples: images [batch], tokens [batch, tokens]. Half precision is computed in fp32, fp64 stays; from
log-softmax throughout, so that finite logits give finite losses and gradients. Gradients reach both sides: whoever wants
the teacher left alone detaches it. `temperature` divides the logits and every such loss carries the factor T^2, which
keeps its gradient's size (Hinton et al. 2015, arXiv 1503.02531); it may be a tensor, a scalar or [..., 1].

Labels are [...]; where one is below 0 (-100 of language models) a loss that takes labels is 0, and `mean` leaves it out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

from spolia.core import outputs
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    Divergence = Callable[[Tensor, Tensor], Tensor]


# --- between distributions -------------------------------------------------------------------------------------------


def kl(student: Tensor, teacher: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), in nats: [...]."""
    log_q, log_p = _logs(student, teacher, temperature)
    return _squared(temperature) * expected(log_p, log_p, log_q)


def reverse_kl(student: Tensor, teacher: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 KL(softmax(student / T) || softmax(teacher / T)): [...]. It leaves out modes rather than covering them all."""
    log_q, log_p = _logs(student, teacher, temperature)
    return _squared(temperature) * expected(log_q, log_q, log_p)


def jensen_shannon(student: Tensor, teacher: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 times the mean of both distributions' KL from their mixture: [...], symmetric, at most T^2 log 2."""
    log_q, log_p = (x.clamp(min=-1e30) for x in _logs(student, teacher, temperature))  # -inf has no mixture
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return _squared(temperature) * (expected(log_p, log_p, log_m) + expected(log_q, log_q, log_m)) / 2


def soft_cross_entropy(student: Tensor, teacher: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """-T^2 sum_c p_c log q_c, p the teacher's: [...]. KL plus the teacher's entropy."""
    log_q, log_p = _logs(student, teacher, temperature)
    return -_squared(temperature) * expected(log_p, log_q)


# --- between logits --------------------------------------------------------------------------------------------------


def mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the last axis of the squared differences: [...]."""
    check_pair(student, teacher)
    return (wide(student) - wide(teacher)).square().mean(-1)


def l1(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean over the last axis of the absolute differences: [...]."""
    check_pair(student, teacher)
    return (wide(student) - wide(teacher)).abs().mean(-1)


def standardized(logits: Tensor, epsilon: float = 1e-7) -> Tensor:
    """(x - mean) / (epsilon + deviation) of every logit vector, n - 1 in the deviation: [..., C].

    A constant vector gives 0, and the gradient of x - mean: it has no scale to divide by.
    """
    x = wide(logits)
    centred = x - x.mean(-1, keepdim=True)
    variance = centred.square().sum(-1, keepdim=True) / max(x.shape[-1] - 1, 1)
    return centred / (epsilon + variance.masked_fill(variance == 0, 1.0).sqrt())


# --- with labels -----------------------------------------------------------------------------------------------------


def cross_entropy(student: Tensor, labels: Tensor) -> Tensor:
    """-log q of the label, in nats: [...]."""
    check_labels(student, labels)
    return outputs.cross_entropy(wide(student), labels)


def target_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 KL between the pairs (p of the label, p of all else): [...]. TCKD of Zhao et al. 2022, arXiv 2203.08679."""
    (log_q, _), (log_p, _) = _split(student, teacher, labels, temperature)
    return _counting(_squared(temperature) * expected(log_p, log_p, log_q), labels)


def other_kl(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """T^2 KL between the softmaxes over all classes but the label: [...]. NCKD of Zhao et al. 2022.

    kl = target_kl + (1 - p of the label) other_kl, p the teacher's.
    """
    (_, log_q), (_, log_p) = _split(student, teacher, labels, temperature)
    return _counting(_squared(temperature) * expected(log_p, log_p, log_q), labels)


def target_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """-p log q of the label: [...]. First term of NKD, Yang et al. 2023, arXiv 2303.13005; least where q = 1."""
    check_pair(student, teacher, labels)
    return outputs.cross_entropy(wide(teacher), labels).neg().exp() * cross_entropy(student, labels)


def other_cross_entropy(student: Tensor, teacher: Tensor, labels: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Cross-entropy, times T^2, of the softmaxes over all classes but the label: [...]. Second term of NKD."""
    (_, log_q), (_, log_p) = _split(student, teacher, labels, temperature)
    return _counting(-_squared(temperature) * expected(log_p, log_q), labels)


# --- reducing --------------------------------------------------------------------------------------------------------


def mean(losses: Tensor, labels: Tensor | None = None) -> Tensor:
    """The mean over the samples whose label is not below 0, over all without labels; 0 where there is none."""
    if labels is None:
        return losses.sum() / max(losses.numel(), 1)
    kept = (labels >= 0).expand(losses.shape)
    return losses.masked_fill(~kept, 0.0).sum() / kept.sum().clamp(min=1)


# --- what all of them share ------------------------------------------------------------------------------------------


def wide(x: Tensor) -> Tensor:
    """fp16 and bf16 as fp32; anything else as it is."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x


def check_pair(student: Tensor, teacher: Tensor, labels: Tensor | None = None) -> None:
    """SpoliaError unless both are floating point and of one shape, and there is a label for each of their samples."""
    if student.shape != teacher.shape:
        what = f"the student's outputs are {list(student.shape)}, the teacher's {list(teacher.shape)}"
        raise SpoliaError(what, where="divergence", mend="give both the same samples and classes, in one order")
    for owner, x in (("student", student), ("teacher", teacher)):
        if not x.is_floating_point() or x.dim() == 0 or x.shape[-1] == 0:
            what = f"the {owner}'s outputs are {x.dtype} {list(x.shape)}".replace("torch.", "")
            raise SpoliaError(what, where="divergence", mend="give logits [..., classes], floating point")
    if labels is not None:
        check_labels(student, labels)


def check_labels(logits: Tensor, labels: Tensor) -> None:
    """SpoliaError unless `labels` are class numbers, one for each of the samples."""
    if labels.shape != logits.shape[:-1]:
        what = f"labels are {list(labels.shape)}, logits {list(logits.shape)}"
        raise SpoliaError(what, where="labels", mend="one class number for each sample: the logits' shape but the last")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        what = f"labels are {labels.dtype}".replace("torch.", "")
        raise SpoliaError(what, where="labels", mend="class numbers, int64; below 0 is not counted")
    on_cpu = labels.device.type == "cpu"  # elsewhere looking would wait for the device, whose gather looks by itself
    if on_cpu and labels.numel() and int(labels.max()) >= logits.shape[-1]:
        what = f"label {int(labels.max())} of {logits.shape[-1]} classes"
        raise SpoliaError(what, where="labels", mend="classes are counted from 0")


def expected(log_p: Tensor, log_a: Tensor, log_b: Tensor | None = None) -> Tensor:
    """sum_c p_c (a_c - b_c), from logarithms: [...]. What has p = 0 counts as 0, also where a or b is infinite."""
    p = log_p.exp()
    values = log_a if log_b is None else log_a - log_b
    return (p * values.masked_fill(p == 0, 0.0)).sum(-1)


def _logs(student: Tensor, teacher: Tensor, temperature: float | Tensor) -> tuple[Tensor, Tensor]:
    check_pair(student, teacher)
    return _cooled(student, temperature).log_softmax(-1), _cooled(teacher, temperature).log_softmax(-1)


def _cooled(logits: Tensor, temperature: float | Tensor) -> Tensor:
    x = wide(logits)
    return x if isinstance(temperature, float | int) and temperature == 1 else x / temperature


def _squared(temperature: float | Tensor) -> float | Tensor:
    """T^2, for losses [...]."""
    if isinstance(temperature, float | int) or temperature.dim() == 0:
        return temperature * temperature
    return temperature.squeeze(-1).square()


def _split(
    student: Tensor, teacher: Tensor, labels: Tensor, temperature: float | Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Of both sides log (p of the label, p of all else) [..., 2], and log p among all else [..., C], 0 at the label."""
    check_pair(student, teacher, labels)
    if student.shape[-1] < 2:
        raise SpoliaError(
            "there is one class", where="divergence", mend="what is left without the label needs a second"
        )
    place = labels.clamp(min=0).unsqueeze(-1)
    hit = torch.zeros(student.shape, dtype=torch.bool, device=student.device).scatter_(-1, place, True)
    return _side(_cooled(student, temperature), place, hit), _side(_cooled(teacher, temperature), place, hit)


def _side(x: Tensor, place: Tensor, hit: Tensor) -> tuple[Tensor, Tensor]:
    own = x.gather(-1, place)
    others = x.masked_fill(hit, -math.inf)
    rest = others.logsumexp(-1, keepdim=True)
    pair = torch.cat([own, rest], -1).log_softmax(-1)  # no 1 - p, which is 0 when the teacher is sure
    return pair, (others - rest).masked_fill(hit, 0.0)


def _counting(losses: Tensor, labels: Tensor) -> Tensor:
    return losses.masked_fill(labels < 0, 0.0)
