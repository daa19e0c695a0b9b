"""Relations of samples to each other, and of classes: what a student may copy of a teacher without copying any output.

Here one axis of samples is left: student [n, d], teacher [n, e], the loss of every sample [n] or, where it belongs to the
batch alone, a scalar. Half precision is computed in fp32.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.divergence import wide
from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-12  # of a squared distance, as published: nearer points count as one


def pearson(x: Tensor, y: Tensor, axis: int, epsilon: float = 1e-8) -> Tensor:
    """Correlation along `axis`; 0 where either is constant. Of n samples x C classes: [n] along 1, [C] along 0."""
    x, y = wide(x), wide(y)
    x, y = x - x.mean(axis, keepdim=True), y - y.mean(axis, keepdim=True)
    return (x * y).sum(axis) / (x.norm(dim=axis) * y.norm(dim=axis) + epsilon)


def distances(points: Tensor) -> Tensor:
    """Euclidean distances of n points, over the mean of those that are not 0: [n, n]. Of one point: 0."""
    x = wide(points)
    squared = (x.unsqueeze(0) - x.unsqueeze(1)).square().sum(-1)
    far = squared > _TINY
    length = torch.where(far, squared.clamp(min=_TINY).sqrt(), 0.0)
    return length / (length.sum() / far.sum().clamp(min=1)).clamp(min=_TINY)


def cosines(points: Tensor) -> Tensor:
    """cos of the angle at i between the ways to j and to k: [n, n, n] as [i, j, k]; 0 where two points coincide."""
    x = wide(points)
    ways = x.unsqueeze(0) - x.unsqueeze(1)  # [i, j, d]
    squared = ways.square().sum(-1, keepdim=True)
    unit = torch.where(squared > _TINY, ways * squared.clamp(min=_TINY).rsqrt(), 0.0)
    return unit @ unit.mT


def huber(x: Tensor, y: Tensor) -> Tensor:
    """(x - y)^2 / 2 up to a distance of 1, from there on |x - y| - 1/2; element by element."""
    return torch.nn.functional.smooth_l1_loss(x, y, reduction="none")


def sample_gram(p: Tensor, q: Tensor) -> Tensor:
    """sum_j (<p_i, p_j> - <q_i, q_j>)^2 of every sample i of distributions [n, C]: [n]."""
    return (q @ q.mT - p @ p.mT).square().sum(-1)


def class_gram(p: Tensor, q: Tensor, kept: Tensor | None = None) -> Tensor:
    """Squared differences of both sides' class by class products, over C: a scalar. `kept` [C]: classes that count."""
    apart = (q.mT @ q - p.mT @ p).square()
    return (apart if kept is None else apart[:, kept]).sum() / p.shape[-1]
