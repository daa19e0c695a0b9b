"""Kendall's tau between two vectors of logits, smooth, as a loss: which pairs, and which way they are computed.

`tau_loss` takes logits [..., C] and gives a loss [...] by one of five ways of the same number:

| implementation | exact | time a sample | memory beside the logits | gradient |
|---|---|---|---|---|
| `broadcast` | yes | C^2 | C^2 | plain autograd, twice too |
| `chunked` | yes | C^2 / 2 | a few blocks | in the forward pass |
| `sorted` | to a tolerance; `hard_teacher` | C M | a few blocks | in the forward pass |
| `expansion` | to a tolerance; `product` | C M^2 | C M, in chunks | in the forward pass |
| `triton` | yes; CUDA | C^2 | none | in the forward pass |

M is the number of sines that the tolerance asks for: about 2.5 k (max - min) at 1e-4. `choose` says which of them `auto`
takes, and why. Arithmetic is fp32 for half types, also under autocast, and fp64 for fp64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spolia.core.divergence import check_pair
from spolia.core.lazy import torch
from spolia.core.ranking_exact import Sums, exact
from spolia.core.ranking_series import Series, separated, series_for, sorted_sums, spread
from spolia.core.ranking_terms import Tau, broadcast, finished, full_weight, phi_of, untied
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

Implementation = Literal["auto", "broadcast", "chunked", "sorted", "expansion", "triton"]
TOLERANCE = 1e-4
_FEW_PAIRS = 1 << 18  # of the whole batch, up to which blocks cost more in calls than they save
_FEW = 512  # classes below which a series is not looked for: blocks are faster with any


@dataclass(frozen=True)
class Choice:
    """What computes the loss, and a sentence why. `series` of the student's and the teacher's part, where it needs any."""

    implementation: str
    why: str
    series: tuple[Series, ...] = ()


def tau_loss(
    student: Tensor,
    teacher: Tensor,
    tau: Tau,
    weights: Tensor | None = None,
    implementation: Implementation = "auto",
    tolerance: float = TOLERANCE,
) -> Tensor:
    """1 - tau over all pairs [...], of logits [..., C]. `weights` [..., C]: w_ij = a_i + a_j. No gradient in the teacher."""
    s, t, own = _matched(student, teacher, weights)
    lead, count = student.shape[:-1], student.shape[-1]
    if count < 2 or not s.numel():
        return 0 * s.sum(-1).reshape(lead)
    choice = choose(s, t, tau, own is not None, implementation, tolerance)
    if choice.implementation == "broadcast":
        with torch.autocast(s.device.type, enabled=False):
            return broadcast(s, t, tau, own).reshape(lead)
    from spolia.core.ranking_grad import loss_of

    def sweep(s: Tensor, slopes: bool) -> tuple[Sums, Tensor | float]:
        sums = _sums(s, t, tau, own, slopes, choice)
        if not tau.normalize:
            return sums, full_weight(own, count)
        return sums, untied(t, own) if sums.most is None else sums.most

    return loss_of(s, sweep).reshape(lead)


def _sums(s: Tensor, t: Tensor, tau: Tau, own: Tensor | None, slopes: bool, choice: Choice) -> Sums:
    match choice.implementation:
        case "chunked":
            return exact(s, t, tau, own, slopes)
        case "sorted":
            return sorted_sums(s, t, tau, own, slopes, choice.series[0])
        case "expansion":
            return separated(s, t, tau, own, slopes, (choice.series[0], choice.series[1]))
        case "triton":
            from spolia.core.ranking_triton import fused

            return fused(s, t, tau, own)
    raise AssertionError(choice)


def choose(
    student: Tensor,
    teacher: Tensor,
    tau: Tau,
    weighted: bool = False,
    implementation: Implementation = "auto",
    tolerance: float = TOLERANCE,
) -> Choice:
    """Which way `tau_loss` goes for logits like these. SpoliaError where the one asked for cannot."""
    count, series = student.shape[-1], ()
    if implementation in ("broadcast", "chunked"):
        return Choice(implementation, "asked for")
    if implementation == "triton" or (implementation == "auto" and student.is_cuda):
        obstacle = _no_triton(student, tau, weighted)
        if implementation == "triton":
            if obstacle:
                raise SpoliaError(f"implementation `triton` cannot be used: {obstacle}", mend="use `auto`")
            return Choice("triton", "asked for")
        if not obstacle and count <= 8192:
            return Choice("triton", f"CUDA and {count} classes: one fused kernel, exact")
    wanted = {"hard_teacher": "sorted", "product": "expansion"}.get(tau.form, "")
    if implementation != "auto" and implementation != wanted:
        forms = {"sorted": "hard_teacher", "expansion": "product"}
        raise SpoliaError(
            f"implementation `{implementation}` computes the form `{forms[implementation]}`, not `{tau.form}`",
            mend="use `auto` or `chunked`",
        )
    if implementation == "auto":
        if student.numel() * count <= _FEW_PAIRS:
            return Choice("broadcast", f"{student.numel() * count} pairs: the formula as it stands is fastest")
        if not wanted:
            return Choice("chunked", f"the form `{tau.form}` does not separate: exact, block by block")
        if tolerance <= 0:
            return Choice("chunked", "tolerance 0: exact, block by block")
        if count < _FEW:
            return Choice("chunked", f"{count} classes: exact blocks are fastest")
    series = _series(student, teacher, tau, tolerance)
    if not series:
        reason = f"no series of sines keeps {tau.phi} within {tolerance:g} over the range of these logits"
        if implementation == "auto":
            return Choice("chunked", f"{reason}: exact, block by block")
        raise SpoliaError(
            reason, mend="standardise the logits, raise the tolerance, lower the steepness, or use `auto`"
        )
    terms = max(len(one.frequencies) for one in series)
    if implementation != "auto":
        return Choice(implementation, f"asked for; {terms} terms", series)
    least = 16 * terms if wanted == "sorted" else terms * terms // 2 + 10 * terms
    if count < least:
        return Choice("chunked", f"{count} classes, {terms} terms: exact blocks are faster below {least} classes")
    return Choice(
        wanted, f"{count} classes, {terms} terms keep {tau.phi} within {tolerance:g}: no pairs are formed", series
    )


def _series(student: Tensor, teacher: Tensor, tau: Tau, tolerance: float) -> tuple[Series, ...]:
    """Of the student's part, and of the teacher's where it is smooth; empty where there is none."""
    phi, k = tau.plain
    found = []
    for x in (student, teacher) if tau.form == "product" else (student,):
        rows = x.detach().reshape(-1, x.shape[-1])
        if (one := series_for(phi, spread(rows, k), tolerance)) is None:
            return ()
        found.append(one)
    return tuple(found)


def _no_triton(student: Tensor, tau: Tau, weighted: bool) -> str:
    """Why the kernel cannot be used; empty where it can."""
    from importlib.util import find_spec

    if find_spec("triton") is None:
        return "triton is not installed"
    if student.dtype == torch.float64:
        return "it computes in fp32, and the logits are fp64"
    if tau.normalize or weighted or tau.phi == "arctan":
        return "it has neither `normalize`, weights, nor arctan"
    return ""


def top_pairs(student: Tensor, teacher: Tensor, top: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits of the teacher's `top` classes [..., top], student's and teacher's, and which they are."""
    index = teacher.topk(min(top, teacher.shape[-1]), dim=-1).indices
    return student.gather(-1, index), teacher.gather(-1, index), index


def sampled_tau_loss(
    student: Tensor,
    teacher: Tensor,
    tau: Tau,
    orders: int,
    draws: np.random.Generator,
    weights: Tensor | None = None,
) -> Tensor:
    """The loss [...] over the neighbours in `orders` random cyclic orders of the classes: unbiased, `orders` x C pairs.

    All samples share the orders. Plain autograd. With weights or `normalize` it is a ratio of two unbiased sums.
    """
    s, t, own = _matched(student, teacher, weights)
    lead, count = student.shape[:-1], student.shape[-1]
    if count < 2 or not s.numel():
        return 0 * s.sum(-1).reshape(lead)
    with torch.autocast(s.device.type, enabled=False):
        total, whole = torch.zeros_like(s[:, 0]), torch.zeros_like(s[:, 0])
        for _ in range(orders):
            i = torch.from_numpy(draws.permutation(count)).to(s.device)
            j = i.roll(1)
            ds, dt = s[:, i] - s[:, j], t[:, i] - t[:, j]
            match tau.form:
                case "product":
                    most = phi_of(tau.steepness * dt, tau.phi)
                    terms = most * phi_of(tau.steepness * ds, tau.phi)
                case "joint":
                    most, terms = dt.sign(), phi_of(tau.steepness * dt * ds, tau.phi)
                case "hard_teacher":
                    most = dt.sign()
                    terms = most * phi_of(tau.steepness * ds, tau.phi)
            pair = 1.0 if own is None else own[:, i] + own[:, j]
            total = total + (pair * terms).sum(1)
            whole = whole + (pair * (most.abs() if tau.normalize else torch.ones_like(dt))).sum(1)
        return finished(total, whole).reshape(lead)


def _matched(student: Tensor, teacher: Tensor, weights: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Logits and weights as [n, C] in the type of the arithmetic; gradients flow to the student only."""
    check_pair(student, teacher)
    kind = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
    rows = (student.shape[:-1].numel(), student.shape[-1])
    s, t = student.reshape(rows).to(kind), teacher.detach().reshape(rows).to(kind)
    return s, t, None if weights is None else weights.detach().reshape(rows).to(kind)
