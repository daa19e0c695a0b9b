"""How alike several answers to one query are, and how alike they would be by chance.

Answers are logits [views, queries, classes]: of one learner after several versions of one support. Read them beside
accuracy: who always says the same is consistent.
"""

from __future__ import annotations

from itertools import combinations
from statistics import fmean
from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

CONSISTENCY, COSINE, JS, AGREEMENT = "consistency", "logit cosine", "JS divergence", "agreement"
FLOOR = ", floor"


def consistency(logits: Tensor) -> dict[str, float]:
    """Four measures, averaged over queries.

    consistency: cosine of the probabilities to their mean, that of the paper of meta self-distillation; flat answers
    raise it. logit cosine: of centred logits, over pairs of views; 0 where these are independent. JS divergence: of all
    views, in nats. agreement: share of pairs whose largest logit is the same.
    """
    logits = logits.detach().double()
    p, top = logits.softmax(-1), logits.argmax(-1)
    centred = torch.nn.functional.normalize(logits - logits.mean(-1, keepdim=True), dim=-1)
    pairs = list(combinations(range(len(logits)), 2))
    return {
        CONSISTENCY: to_mean(p),
        COSINE: fmean(float((centred[a] * centred[b]).sum(-1).mean()) for a, b in pairs),
        JS: max(0.0, float((_entropy(p.mean(0)) - _entropy(p).mean(0)).mean())),  # rounding can fall below 0
        AGREEMENT: fmean(float((top[a] == top[b]).double().mean()) for a, b in pairs),
    }


def to_mean(outputs: Tensor) -> float:
    """Cosine of outputs [views, queries, classes] to their mean over views, averaged."""
    return float(torch.nn.functional.cosine_similarity(outputs, outputs.mean(0, keepdim=True), dim=-1).mean())


def floor(logits: Tensor, draws: np.random.Generator) -> dict[str, float]:
    """The same of views as sure of themselves as these, but independent: the classes of each answer are shuffled."""
    order = torch.from_numpy(draws.random(tuple(logits.shape)).argsort(-1)).to(logits.device)
    return {metric + FLOOR: value for metric, value in consistency(logits.gather(-1, order)).items()}


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum(-1)
