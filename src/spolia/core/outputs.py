"""What a classifier's outputs say of themselves: entropies of softmax distributions, from logits.

Logits are [batch, classes] or [batch, tokens, classes]; everything is computed from log-softmax, so it is finite with a
finite gradient at any finite logits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


def entropy(logits: Tensor) -> Tensor:
    """H of every distribution, in nats: [...]."""
    log_p = logits.log_softmax(-1)
    return -(log_p.exp() * log_p).sum(-1)


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """-log p of the label [...], in nats: [...]. A label below 0 (-100 of language models) counts as nothing."""
    picked = logits.log_softmax(-1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return torch.where(labels < 0, 0.0, -picked)


def mean_distribution(logits: Tensor) -> Tensor:
    """Sum of the softmax distributions over everything but the classes, fp64: [classes]. Divide by their number."""
    return logits.detach().double().softmax(-1).reshape(-1, logits.shape[-1]).sum(0)


def diversity(logits: Tensor, mean: Tensor) -> Tensor:
    """-sum_c p_c log mean_c of every distribution [...]: it averages to H(mean), and so does its gradient.

    H of a mean is no mean of anything; with `mean` held fixed this is its tangent, which micro-batches may share out.
    """
    tiny = torch.finfo(logits.dtype).tiny
    return -(logits.softmax(-1) * mean.to(logits.dtype).clamp(min=tiny).log()).sum(-1)


def flatness(distribution: Tensor) -> float:
    """H of a distribution [classes] over log C: 1 where all classes are alike, 0 where one has everything."""
    if len(distribution) < 2:
        return 1.0
    p = distribution.double()
    return float(-(p * p.clamp(min=torch.finfo(p.dtype).tiny).log()).sum()) / math.log(len(p))
