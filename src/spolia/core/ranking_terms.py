"""A smooth Kendall's tau between two vectors of logits: what a pair counts, and how its term is made.

With D s_ij = s_i - s_j, phi odd, increasing and bounded by 1, and pair weights w_ij (1, or a_i + a_j):

    loss = 1 - sum_{i<j} w_ij v_ij / sum_{i<j} w_ij
    product: v = phi(k D t) phi(k D s)    joint: v = phi(k D t D s)    hard_teacher: v = sgn(D t) phi(k D s)

As k grows the loss tends to 1 - tau. `normalize` divides by the most the teacher allows instead (sum w |phi(k D t)|; of
the other two forms the weights of the pairs it does not tie), so that 0 is reached in the limit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, get_args

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Form = Literal["product", "joint", "hard_teacher"]
Phi = Literal["tanh", "sigmoid", "arctan", "softsign", "erf"]


@dataclass(frozen=True)
class Tau:
    """Which smooth tau. `steepness` is k, in 1 / units of the logits (of their square in `joint`)."""

    form: Form = "product"
    phi: Phi = "tanh"
    steepness: float = 1.0
    normalize: bool = False

    def __post_init__(self) -> None:
        assert self.form in get_args(Form) and self.phi in get_args(Phi), self
        assert 0 < self.steepness < math.inf, self

    @property
    def plain(self) -> tuple[str, float]:
        """phi and k without sigmoid: 2 sigmoid(k x) - 1 = tanh(k x / 2)."""
        return ("tanh", self.steepness / 2) if self.phi == "sigmoid" else (self.phi, self.steepness)


def phi_of(u: Tensor, phi: str) -> Tensor:
    """phi(u), differentiable, a new tensor."""
    match phi:
        case "tanh":
            return u.tanh()
        case "sigmoid":
            return 2 * u.sigmoid() - 1
        case "arctan":
            return u.atan() * (2 / math.pi)
        case "softsign":
            return u / (1 + u.abs())
        case "erf":
            return u.erf()
    raise AssertionError(phi)


def phi_with_slope(u: Tensor, phi: str, slope: Tensor) -> None:
    """phi(u) into `u` and phi'(u) into `slope`, without further memory."""
    match phi:
        case "tanh":
            torch.square(u.tanh_(), out=slope).neg_().add_(1)
        case "arctan":
            torch.square(u, out=slope).add_(1).reciprocal_().mul_(2 / math.pi)
            u.atan_().mul_(2 / math.pi)
        case "softsign":
            torch.abs(u, out=slope).add_(1).reciprocal_()
            u.mul_(slope)
            slope.square_()
        case "erf":
            torch.square(u, out=slope).neg_().exp_().mul_(2 / math.sqrt(math.pi))
            u.erf_()
        case _:
            raise AssertionError(phi)


def broadcast(s: Tensor, t: Tensor, tau: Tau, weights: Tensor | None = None) -> Tensor:
    """The loss [...] of s, t [..., C] as it is written down: O(C^2) memory, plain autograd, twice differentiable too."""
    count = s.shape[-1]
    ds, dt = s.unsqueeze(-1) - s.unsqueeze(-2), t.unsqueeze(-1) - t.unsqueeze(-2)  # [..., C, C]
    k, own = tau.steepness, torch.ones_like(t) / 2 if weights is None else weights
    pair = torch.triu(own.unsqueeze(-1) + own.unsqueeze(-2), 1)  # [..., C, C]
    match tau.form:
        case "product":
            most = phi_of(k * dt, tau.phi)
            terms, most = most * phi_of(k * ds, tau.phi), most.abs()
        case "joint":
            terms, most = phi_of(k * dt * ds, tau.phi), (dt != 0).to(dt.dtype)
        case "hard_teacher":
            terms, most = dt.sign() * phi_of(k * ds, tau.phi), (dt != 0).to(dt.dtype)
    whole = (pair * most).sum((-2, -1)) if tau.normalize else full_weight(own, count)
    return finished((pair * terms).sum((-2, -1)), whole)


def full_weight(own: Tensor | None, count: int) -> Tensor | float:
    """sum_{i<j} w_ij: (C - 1) sum_i a_i, or the number of pairs."""
    return count * (count - 1) / 2 if own is None else (count - 1) * own.sum(-1)


def finished(total: Tensor, whole: Tensor | float) -> Tensor:
    """1 - total / whole; 0 where there is nothing to order."""
    whole = torch.as_tensor(whole, dtype=total.dtype, device=total.device)
    return torch.where(whole > 0, 1 - total / whole.clamp(min=torch.finfo(total.dtype).tiny), 0 * total)


def ranks(teacher: Tensor) -> Tensor:
    """How many classes the teacher puts above each [..., C]: 0 for its first; tied classes share a rank."""
    ordered = teacher.sort(dim=-1).values
    return teacher.shape[-1] - torch.searchsorted(ordered, teacher.contiguous(), right=True)


def hyperbolic(teacher: Tensor) -> Tensor:
    """a_i = 1 / (1 + rank of i) [..., C]: Vigna's weights, which count a swap near the top most."""
    return 1 / (1 + ranks(teacher)).to(teacher.dtype)


def untied(teacher: Tensor, weights: Tensor | None) -> Tensor:
    """sum of w_ij over the pairs that the teacher does not tie [...]."""
    ordered = teacher.sort(dim=-1).values
    above = teacher.shape[-1] - torch.searchsorted(ordered, teacher.contiguous(), right=True)
    below = torch.searchsorted(ordered, teacher.contiguous(), right=False)
    own = 0.5 if weights is None else weights
    return ((above + below).to(teacher.dtype) * own).sum(-1)
