"""A head without weights: a class is the mean of its few examples (Snell et al. 2017, arXiv 1703.05175)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def distances(support: Tensor, labels: Tensor, query: Tensor, scale: float = 1.0, root: bool = True) -> Tensor:
    """-scale |q - c_k|^2, with `root` over sqrt(d): features [items, d], labels [items], query [m, d] to logits [m, ways]."""
    y = torch.nn.functional.one_hot(labels).to(support.dtype)
    means = y.t() @ support / y.sum(0).unsqueeze(1)
    return to_means(query, means, scale, root)


def to_means(query: Tensor, means: Tensor, scale: float = 1.0, root: bool = True) -> Tensor:
    """The same to means [ways, d] that are there."""
    square = query.square().sum(1, keepdim=True) - 2 * query @ means.t() + means.square().sum(1)
    return -square.clamp(min=0) * (scale / (query.shape[1] ** 0.5 if root else 1.0))
