"""The unified objective: one function that replay, distillation, weight anchors and variational learning are settings of.

For whoever wants to mix them, or to see what they have in common. Wang, Li, Shen, Huang, A Unified and General Framework for
Continual Learning, ICLR 2024, arXiv 2403.13249.

    L = CE(h(x), y) + sum_k alpha_k D_Phi[h(x_k); z_k] + sum_m beta_m D_Psi[theta; theta*]

with Bregman divergences D(p, q) = Phi(p) - Phi(q) - <grad Phi(q), p - q>: each is said by its divergence, its reference (z,
theta*) and its estimator (which samples; which importance). Directions are named, for with one-hot z one of them is infinite.

| output term | D_Phi | is |
|---|---|---|
| kl | KL(z || softmax h): Phi = sum p log p, prediction second | CE where z is one-hot; LwF where z is an old network's |
| reverse_kl | KL(softmax h || z): prediction first | CPR where z is uniform |
| squared | mean (h - z)^2: Phi = |u|^2 on logits | DER |
| binary | sum_c KL(sigmoid z_c || sigmoid h_c): binary entropies | iCaRL's loss but for a constant |

| weight term | D_Psi = sum F (theta - theta*)^2: Psi = theta' F theta, with F from | is |
|---|---|---|
| fisher | E (d log p)^2, running sum with `decay` | online EWC |
| path | fall of the loss along the way | SI |
| sensitivity | E |d |f|^2|, running mean | MAS |
| one | 1 | L2-SP |

`gaussian` is the fifth D_Psi: KL between diagonal Gaussians, a Bregman divergence of their log-partition with the arguments
exchanged (VCL). Outside the objective: A-GEM is a constraint, GDumb has no penalty, iCaRL's answer bypasses its head.

| paper | here |
|---|---|
| alpha, beta | `weight` of a term |
| D_Phi, D_Psi | `output_divergence`; `weight_divergence`, `gaussian` |
| z | `reference`: labels, logits stored with the sample, an old network's, uniform |

Data touched: as the terms say: the experience, and samples in memory where a term takes them. Departures: the paper's list of
instances was not at hand word by word; these are derived, and tests hold each against its own file, step by step.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

from spolia.core import divergence as apart
from spolia.core import gradients
from spolia.core.lazy import torch
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError
from spolia.methods.continual.learner import OURS

if TYPE_CHECKING:
    from torch import Tensor

_WANG = "Wang et al. 2024"
Phi = Literal["kl", "reverse_kl", "squared", "binary"]
Reference = Literal["labels", "stored", "old", "uniform"]
Importance = Literal["fisher", "path", "sensitivity", "one"]


class OutputTerm(Settings):
    """alpha D_Phi[h(x); z]."""

    divergence: Phi = setting("kl", "D_Phi and its direction", source=_WANG)
    reference: Reference = setting("labels", "z", source=_WANG)
    samples: Literal["memory", "current"] = setting("memory", "x: a draw from the memory, or the batch", source=_WANG)
    weight: float = setting(1.0, "alpha", source=_WANG, ge=0)
    temperature: float = setting(1.0, "T of both distributions; the term carries T^2", source=OURS, gt=0)
    classes: Literal["all", "known"] = setting("all", "logits: all, or those of earlier experiences", source=OURS)

    def __str__(self) -> str:
        return written(self)


class WeightTerm(Settings):
    """beta D_Psi[theta; theta*], theta* the weights at the end of the experience before."""

    importance: Importance = setting("fisher", "what Psi weighs with", source=_WANG)
    weight: float = setting(1.0, "beta, without a half", source=_WANG, ge=0)
    decay: float = setting(1.0, "what of the earlier importance stays", source=OURS, ge=0, le=1)
    damping: float = setting(1.0, "xi of `path`", source="Zenke et al. 2017", gt=0)

    def __str__(self) -> str:
        return written(self)


def written(term: Settings) -> str:
    """A term as a recipe has it: a mapping of what differs from the defaults."""
    told = {name: getattr(term, name) for name in type(term).model_fields}
    return f"{{{', '.join(f'{n}: {v}' for n, v in told.items() if v != type(term).model_fields[n].default)}}}"


class Term(NamedTuple):
    """An output term with what it is computed from: prediction h [n, C], reference z [n, C] logits, or labels [n]."""

    settings: OutputTerm
    h: Tensor
    z: Tensor | None


class Hold(NamedTuple):
    """A weight term with what it is computed from."""

    settings: WeightTerm
    weights: Sequence[Tensor]
    anchors: Sequence[Tensor]
    importance: Sequence[Tensor]


def unified(new: Tensor, outputs: Sequence[Term] = (), holds: Sequence[Hold] = ()) -> Tensor:
    """L: the new samples' loss, all divergences of outputs, all divergences of weights."""
    loss = new
    for term in outputs:
        loss = loss + term.settings.weight * output_divergence(term.settings, term.h, term.z).mean()
    for hold in holds:
        loss = loss + hold.settings.weight * weight_divergence(hold.weights, hold.anchors, hold.importance)
    return loss


def output_divergence(settings: OutputTerm, h: Tensor, z: Tensor | None) -> Tensor:
    """D_Phi[h; z] of every sample [n]. `z`: logits like h, labels [n], or None for uniform."""
    kind = settings.divergence
    if settings.reference == "labels":
        assert z is not None
        if kind != "kl":
            raise _unfit(settings, "labels are one-hot: their divergence is finite in one direction")
        return settings.temperature**2 * apart.cross_entropy(h / settings.temperature, z)
    if z is None:
        z = torch.zeros_like(h)
    match kind:
        case "kl":
            return apart.kl(h, z, settings.temperature)
        case "reverse_kl":
            return apart.reverse_kl(h, z, settings.temperature)
        case "squared":
            return apart.mse(h, z)
    return binary(h, z)


def binary(h: Tensor, z: Tensor) -> Tensor:
    """sum_c KL(sigmoid z_c || sigmoid h_c): [n]."""
    log = torch.nn.functional.logsigmoid
    p = z.sigmoid()
    return (p * (log(z) - log(h)) + (1 - p) * (log(-z) - log(-h))).sum(-1)


def weight_divergence(weights: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    """D_Psi of Psi = theta' F theta: sum F (theta - theta*)^2, a scalar."""
    return gradients.distance(weights, anchors, importance)


def gaussian(
    means: Sequence[Tensor], deviations: Sequence[Tensor], means_0: Sequence[Tensor], deviations_0: Sequence[Tensor]
) -> Tensor:
    """KL(q || q_0) of diagonal Gaussians, a scalar: D_A(eta_0, eta), A the log-partition in natural parameters."""
    parts = []
    for m, s, m_0, s_0 in zip(means, deviations, means_0, deviations_0, strict=True):
        parts.append((s_0.log() - s.log() + (s.square() + (m - m_0).square()) / (2 * s_0.square()) - 0.5).sum())
    return torch.stack(parts).sum()


def check_terms(terms: Sequence[OutputTerm]) -> None:
    """SpoliaError for a term that has no finite value or that lacks its reference, before anything is trained."""
    for term in terms:
        if term.reference == "labels" and term.divergence != "kl":
            raise _unfit(term, "labels are one-hot: their divergence is finite in one direction")
        if term.reference == "stored" and term.samples == "current":
            raise _unfit(term, "logits are stored with remembered samples")
        if term.divergence in ("squared", "binary") and not math.isclose(term.temperature, 1.0):
            raise _unfit(term, "a temperature goes with softmax")


def _unfit(term: OutputTerm, why: str) -> SpoliaError:
    what = f"`{term.divergence}` with reference `{term.reference}` of {term.samples} samples: {why}"
    mend = "kl with labels; kl, reverse_kl, squared, binary with logits; samples=memory for stored ones"
    return SpoliaError(what, where="output", mend=mend)
