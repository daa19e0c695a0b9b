"""RKKD: a distillation loss, plus a term that wants the student to order the classes of every sample as the teacher does.

For whoever distils by logits: KL moves classes in proportion to their probability, so the many small ones hardly learn;
the rank term spreads its gradient over all of them. Guan, Cheng, Liu, Yuan, Enhancing Logits Distillation with Plug&Play
Kendall's tau Ranking Loss, ICML 2025, arXiv 2409.17823.

    L = L_base + gamma (1 - tau_k(s, t)),    tau_k = mean over pairs i < j of phi(k (t_i - t_j)) phi(k (s_i - s_j))

| paper | here |
|---|---|
| tau, its sign made smooth with steepness k | `form`, `phi`, `steepness`; core/ranking |
| alpha L_KD + beta L_CE | `base`: any logit loss with its own weights |
| gamma | `gamma`, as `schedule` says |

Data touched: what the base touches; the term itself takes no labels. The published code could not be had: that `product`
with tanh is the paper's main form is from memory, and which other forms, k and gamma it tries is not verified. `joint` is
the form of DiffKendall (Zheng et al., NeurIPS 2023, arXiv 2307.15317); `hard_teacher` leaves the constant teacher's sign
as it is. Departures: logits are standardised first, so that one k suits all models (`standardize: none` is the paper's raw
logits); pairs may be the teacher's top classes or a sample, and count by rank. Even s = t has a slope: the term asks for
ever wider gaps (less so with `normalize`), and nothing for the top class once it leads. It goes with KL or CE, never alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from spolia.core.divergence import check_pair, standardized, wide
from spolia.core.lazy import torch
from spolia.core.ranking import TOLERANCE, Implementation, sampled_tau_loss, tau_loss, top_pairs
from spolia.core.ranking_terms import Form, Phi, Tau, hyperbolic
from spolia.core.seeds import generator
from spolia.core.settings import Settings, setting
from spolia.methods.distill.bases import Base, objective_of
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_GUAN, _OURS = "Guan et al. 2025, from memory, not verified", "our choice"


class Ranking(Settings):
    """Settings of the rank term itself."""

    form: Form = setting(
        "product", "what a pair adds: product of both sides, one function of their product, or the teacher's sign",
        source=_GUAN,
    )  # fmt: skip
    phi: Phi = setting("tanh", "what takes the place of the sign", source=_GUAN)
    steepness: float | None = setting(
        None, "k; by default 2 with standardised logits, 1 with raw ones", source=_OURS, gt=0, le=1e4
    )
    standardize: Literal["zscore", "none"] = setting(
        "zscore", "logits of a sample to mean 0 and deviation 1 first, or as they are", source=f"{_OURS}; paper: none"
    )
    normalize: bool = setting(
        False, "divide by the most that the teacher allows, so that the loss can reach 0", source=_OURS
    )
    pairs: Literal["all", "top", "sampled"] = setting(
        "all", "pairs of all classes, of the teacher's `top` classes, or of `orders` random orders", source=_GUAN
    )
    top: int = setting(100, "classes of `pairs: top`", source=_OURS, ge=2)
    orders: int = setting(4, "random cyclic orders of `pairs: sampled`: as many pairs a class", source=_OURS, ge=1)
    rank_weights: Literal["none", "hyperbolic"] = setting(
        "none", "pairs count alike, or by 1 / rank_i + 1 / rank_j of the teacher (Vigna 2015)", source=_OURS
    )
    implementation: Implementation = setting("auto", "how all pairs are computed", source=_OURS)
    tolerance: float = setting(
        TOLERANCE, "error of phi and its slope that `sorted` and `expansion` may make; 0: none", source=_OURS,
        ge=0, le=0.1,
    )  # fmt: skip
    seed: int = setting(0, "of the random orders", source=_OURS, ge=0)

    @property
    def tau(self) -> Tau:
        steepness = self.steepness or (2.0 if self.standardize == "zscore" else 1.0)
        return Tau(self.form, self.phi, steepness, self.normalize)


class Rkkd(Ranking):
    """Settings of `rkkd`."""

    base: Base = setting("kd", "the loss it is added to, by name or with settings", source=_GUAN, validate_default=True)
    gamma: float = setting(1.0, "weight of the rank term", source=_OURS, ge=0)
    schedule: Literal["constant", "rise", "fall"] = setting(
        "constant", "gamma throughout, rising linearly from 0, or falling linearly to 0", source=_OURS
    )
    until: float = setting(1.0, "share of the training at which rise or fall ends", source=_OURS, gt=0, le=1)


def rkkd(settings: Rkkd | None = None, base: Objective | None = None) -> Objective:
    """The base with the rank term added. `base`: in place of `settings.base`."""
    settings = settings or Rkkd()
    base = objective_of(settings.base) if base is None else base
    return base.plus("rank", lambda seen: _weight(settings, seen.progress) * _term(settings, seen))


def rank_loss(student: Tensor, teacher: Tensor, settings: Ranking | None = None, progress: float = 1.0) -> Tensor:
    """1 - tau_k of every sample [...], of logits [..., C]; gradients reach the student. For loops of your own.

    `progress`, the share of the training done, picks the random orders of `pairs: sampled`; nothing else hangs on it.
    """
    settings = settings or Ranking()
    check_pair(student, teacher)
    s, t = wide(student), wide(teacher.detach())
    weights = None
    if settings.standardize == "zscore":
        with torch.autocast(s.device.type, enabled=False):
            s, t = standardized(s), standardized(t)
    if settings.rank_weights == "hyperbolic":
        weights = hyperbolic(t)
    if settings.pairs == "top":
        s, t, index = top_pairs(s, t, settings.top)
        weights = weights if weights is None else weights.gather(-1, index)
    if settings.pairs == "sampled":
        draws = generator(settings.seed, "rank pairs", progress)
        return sampled_tau_loss(s, t, settings.tau, settings.orders, draws, weights)
    return tau_loss(s, t, settings.tau, weights, settings.implementation, settings.tolerance)


def _term(settings: Rkkd, seen: Seen) -> Tensor:
    """The rank loss [...] where the labels are not ignored, 0 elsewhere: what is padded costs nothing."""
    student, teacher = seen.student.logits, seen.teacher.logits
    if seen.kept is None or bool(seen.kept.all()):
        return rank_loss(student, teacher, settings, seen.progress)
    losses = rank_loss(student[seen.kept], teacher[seen.kept], settings, seen.progress)
    return torch.zeros(student.shape[:-1], dtype=losses.dtype, device=losses.device).masked_scatter(seen.kept, losses)


def _weight(settings: Rkkd, progress: float) -> float:
    done = min(1.0, progress / settings.until)
    match settings.schedule:
        case "rise":
            return settings.gamma * done
        case "fall":
            return settings.gamma * (1 - done)
    return settings.gamma
