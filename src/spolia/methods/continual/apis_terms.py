"""The terms of learning from APIs: how far a model is from an answer, what a query is worth, features beside logits."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from spolia.core import divergence
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.api import Answers

Gap = Literal["recovered", "l1", "kl"]


def gap(kind: Gap, logits: Tensor, log_p: Tensor, labels: Tensor | None) -> Tensor:
    """How far logits [..., C] are from answers: [...], in fp64. With `labels` [...] alone: their cross-entropy.

    recovered: mean |logits - log p|, both less their mean over classes, which gives back the logits behind probabilities.
    """
    logits = logits.double()
    if labels is not None:
        logits = logits.expand(*labels.shape, logits.shape[-1])
        return divergence.cross_entropy(logits, labels)
    if kind == "recovered":
        return (_centred(logits) - _centred(log_p)).abs().mean(-1)
    if kind == "l1":
        return (logits.softmax(-1) - log_p.exp()).abs().sum(-1)
    return divergence.expected(log_p, log_p, logits.log_softmax(-1).expand_as(log_p))


def worth(kind: Gap, logits: Tensor, answers: Answers, mean: Tensor, balance: float) -> Tensor:
    """What a query's generator minimises: [...]. Less gap is worse; so is an answer that the batch is full of.

    `answers` may have more leading axes than logits [n, C]. `mean` [C]: the batch's mean answer, a constant.
    """
    apart = gap(kind, logits, answers.log_p, answers.labels if answers.hard else None)
    common = (answers.log_p.exp() * mean.log()).sum(-1)  # its mean over the batch is -H(mean)
    return -apart + balance * common


def stacked(answers: Answers, lead: int, count: int) -> Answers:
    """Answers of lead x count inputs as [lead, count] and [lead, count, C]."""
    return answers._replace(
        labels=answers.labels.view(lead, count), log_p=answers.log_p.view(lead, count, answers.log_p.shape[-1])
    )


def with_features(network: nn.Module, x: Any, outputs: Any) -> tuple[Tensor, Tensor]:
    """Logits, and what the last linear layer was given [n, d], of one forward pass."""
    linear = [part for part in network.modules() if isinstance(part, torch.nn.Linear)]
    if not linear:
        mend = "set similarity to 0, or give a network that ends in a linear layer"
        raise SpoliaError("has no linear layer, so its features are not known", where="network", mend=mend)
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        logits = outputs(network, x)
    finally:
        hook.remove()
    return logits, seen[-1].flatten(1)


def _centred(x: Tensor) -> Tensor:
    return x - x.mean(-1, keepdim=True)
