"""What images recovered from a classifier are held to, beside being recognised: priors and a disagreement, tensors only.

    bn(x)  = sum over batch norms of |mean - running mean| + |variance - running variance|    (Euclidean, not squared)
    tv(x)  = sum over four neighbours of |x - its neighbour|;       l2(x) = |x - 1/2|
    adv(x) = -mean of [both say the same] KL(teacher || student)

Yin et al., Dreaming to Distill, CVPR 2020, arXiv 1912.08795. Variances divide by the count, as batch norms normalise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.divergence import kl
from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

Kd = Literal["kl", "legacy"]


@contextmanager
def statistics_gap(norms: Sequence[nn.Module]) -> Iterator[Callable[[], Tensor | float]]:
    """Inside, each call of the yielded function gives bn(x) of what passed these layers since the last one.

    Differentiable, and right under vmap when called in the mapped function. The hooks are taken off on leaving.
    """
    gaps: list[Tensor] = []

    def hook(layer: Any, inputs: tuple[Tensor, ...]) -> None:
        x = inputs[0]
        over = [0, *range(2, x.dim())]
        mean = x.mean(over)
        var = (x - mean.view(1, -1, *[1] * (x.dim() - 2))).square().mean(over)
        gaps.append(length(mean - layer.running_mean) + length(var - layer.running_var))

    def read() -> Tensor | float:
        found = sum(gaps) if gaps else 0.0
        gaps.clear()
        return found

    handles = [layer.register_forward_pre_hook(hook) for layer in norms]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def total_variation(x: Tensor) -> Tensor:
    """tv of images [n, c, h, w], all of them as one vector: right, below, and both diagonals."""
    right, below = x[..., :, 1:] - x[..., :, :-1], x[..., 1:, :] - x[..., :-1, :]
    down, up = x[..., 1:, 1:] - x[..., :-1, :-1], x[..., 1:, :-1] - x[..., :-1, 1:]
    return length(right) + length(below) + length(down) + length(up)


def off_grey(x: Tensor) -> Tensor:
    """l2 of images in 0 … 1, all of them as one vector."""
    return length(x - 0.5)


def length(x: Tensor) -> Tensor:
    """Euclidean length of all elements; its gradient at 0 is 0, not NaN."""
    square = x.square().sum()
    zero = square == 0
    return torch.where(zero, 0.0, torch.where(zero, 1.0, square).sqrt())


def disagreement(student: Tensor, teacher: Tensor, form: Kd = "kl") -> Tensor:
    """adv of logits [n, classes]. `legacy`: what published codes compute, see `distillation`; the student is a constant."""
    agree = (student.argmax(1) == teacher.argmax(1)).to(teacher.dtype)
    if form == "legacy":
        return -(agree * _inner(student.detach(), teacher)).mean()
    return -(agree * kl(student, teacher)).mean()


def distillation(student: Tensor, teacher: Tensor, form: Kd = "kl") -> Tensor:
    """Mean KL(teacher || student) of logits [n, classes].

    `legacy`: probabilities given where their logarithms belong, and a mean over classes too: sum_c p_t (log p_t - p_s) / C.
    Its gradient in the student is that of -<p_t, p_s> / C: least where the student is sure of the teacher's first class.
    """
    if form == "legacy":
        return _inner(student, teacher).mean() / student.shape[1]
    return kl(student, teacher).mean()


def _inner(student: Tensor, teacher: Tensor) -> Tensor:
    log_p = teacher.log_softmax(1)
    return (log_p.exp() * (log_p - student.softmax(1))).sum(1)
