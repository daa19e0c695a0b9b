"""One direction from the losses of several tasks: their mean, or one that also makes their gradients agree.

    mean          g = sum_i grad L_i / m
    sequential    theta' <- theta' - a grad L_i(theta'), i = 1 … m, from theta' = theta;     g = theta - theta'
    displaced     g = sum_i grad L_i(theta - eta (gbar - g_i)) / m,   g_i = grad L_i(theta), gbar their mean
    penalised     g = grad [ sum_i L_i / m + (eta / 2) sum_i |g_i - gbar|^2 / m ], by second derivatives

Over random orders sequential steps of plain descent follow, to second order in a,

    E[theta - theta'] / a = grad [ sum_i L_i - (a / 2) sum_{i<j} <grad L_i, grad L_j> ]

so that moving towards theta' raises the inner products of the tasks' gradients, and no Hessian is formed (Nichol et al.
2018, arXiv 1803.02999, section 5; FREE, arXiv 2405.00984).

displaced is penalised up to O(eta^2), and equal to it where the losses are quadratic: the displacement is a constant, two
gradients a task and no graph across them (TGR, arXiv 2405.16560). Differentiated through, as in the released code, the same
line has eta in the place of eta / 2 and costs second order.

Each loss is a function of the weights, {name: tensor}, and gives a scalar. Weights are never changed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spolia.core.gradients import dot, gradients, norm
from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    Weights = dict[str, Tensor]
    Loss = Callable[[Weights], Tensor]

BETAS, EPS = (0.9, 0.999), 1e-8  # of Adam in `sequential`


@dataclass(frozen=True)
class Aligned:
    """`gradient`: what to take off the weights, times a rate (of `sequential`: theta - theta'). `losses`: as each task's
    turn came. `cosine`: mean over the pairs of their gradients, where these are all of one place."""

    gradient: Weights
    losses: list[float]
    cosine: float | None = None


def mean(losses: Sequence[Loss], weights: Mapping[str, Tensor]) -> Aligned:
    """The mean gradient."""
    total, seen = {name: torch.zeros_like(w) for name, w in weights.items()}, []
    for loss in losses:
        value, slopes = slope(loss, weights)
        seen.append(value)
        for name, g in slopes.items():
            total[name] += g / len(losses)
    return Aligned(total, seen)


def sequential(
    losses: Sequence[Loss],
    weights: Mapping[str, Tensor],
    rate: float,
    optimizer: Literal["sgd", "adam"] = "sgd",
) -> Aligned:
    """theta - theta' after one step on each loss, in the order given. `adam`: its moments begin at zero."""
    at = {name: w.detach() for name, w in weights.items()}
    first, second = ({name: torch.zeros_like(w) for name, w in at.items()} for _ in range(2))
    seen = []
    for turn, loss in enumerate(losses, 1):
        value, slopes = slope(loss, at)
        seen.append(value)
        for name, g in slopes.items():
            if optimizer == "sgd":
                at[name] = at[name] - rate * g
                continue
            first[name].lerp_(g, 1 - BETAS[0])
            second[name].lerp_(g.square(), 1 - BETAS[1])
            m, v = first[name] / (1 - BETAS[0] ** turn), second[name] / (1 - BETAS[1] ** turn)
            at[name] = at[name] - rate * m / (v.sqrt() + EPS)
    return Aligned({name: w.detach() - at[name] for name, w in weights.items()}, seen)


def slope(loss: Loss, weights: Mapping[str, Tensor]) -> tuple[float, Weights]:
    """A loss and its gradient at these weights."""
    with torch.enable_grad():
        leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
        value = loss(leaves)
        found = gradients(value, list(leaves.values()))
    return float(value.detach()), dict(zip(leaves, found, strict=True))


# --- towards where the tasks agree -----------------------------------------------------------------------------------


def displaced(losses: Sequence[Loss], weights: Mapping[str, Tensor], eta: float, *, detached: bool = True) -> Aligned:
    """Each task's gradient where the others would pull it. `detached=False` is the released code's.

    With eta 0, one task or equal tasks it is the mean gradient.
    """
    leaves, values, slopes = _apart(losses, weights, graph=not detached)
    middle, cosine = _middle(slopes), mean_cosine(slopes)
    if eta == 0 or len(losses) == 1:
        return Aligned(dict(zip(leaves, [m.detach() for m in middle], strict=True)), values, cosine)
    total = [torch.zeros_like(leaf) for leaf in leaves.values()]
    for loss, own in zip(losses, slopes, strict=True):
        with torch.enable_grad():
            moved = {}
            for (name, leaf), m, g in zip(leaves.items(), middle, own, strict=True):
                there = leaf - eta * (m - g)
                moved[name] = there.detach().requires_grad_() if detached else there
            found = _slopes(loss(moved), moved if detached else leaves, keep=not detached)
        torch._foreach_add_(total, found)
    return Aligned(dict(zip(leaves, torch._foreach_div(total, float(len(losses))), strict=True)), values, cosine)


def penalised(losses: Sequence[Loss], weights: Mapping[str, Tensor], eta: float) -> Aligned:
    """The mean gradient and that of eta / 2 times the mean squared distance of the tasks' gradients from their mean."""
    leaves, values, slopes = _apart(losses, weights, graph=True)
    middle, found = _middle(slopes), [torch.zeros_like(leaf) for leaf in leaves.values()]
    with torch.enable_grad():
        spread = torch.stack([(g - m).square().sum() for own in slopes for g, m in zip(own, middle, strict=True)]).sum()
        if spread.requires_grad:  # else the losses have no curvature, and their gradients no way to agree
            found = _slopes(eta / (2 * len(losses)) * spread, leaves)
    gradient = [m.detach() + s for m, s in zip(middle, found, strict=True)]
    return Aligned(dict(zip(leaves, gradient, strict=True)), values, mean_cosine(slopes))


def mean_cosine(slopes: Sequence[Sequence[Tensor]]) -> float:
    """The mean cosine over the pairs of tasks' gradients; 1 for one task."""
    held = [[g.detach() for g in one] for one in slopes]
    lengths = [norm(one) for one in held]
    tiny = torch.finfo(lengths[0].dtype).tiny
    pairs = [(i, j) for i in range(len(held)) for j in range(i)]
    found = [dot(held[i], held[j]) / (lengths[i] * lengths[j]).clamp(min=tiny) for i, j in pairs]
    return float(torch.stack(found).mean()) if found else 1.0


def _apart(
    losses: Sequence[Loss], weights: Mapping[str, Tensor], *, graph: bool
) -> tuple[Weights, list[float], list[list[Tensor]]]:
    """Leaves at the weights, every task's loss there and its gradient."""
    leaves = {name: w.detach().requires_grad_() for name, w in weights.items()}
    values, slopes = [], []
    for loss in losses:
        with torch.enable_grad():
            value = loss(leaves)
            slopes.append(_slopes(value, leaves, graph=graph))
        values.append(float(value.detach()))
    return leaves, values, slopes


def _middle(slopes: Sequence[Sequence[Tensor]]) -> list[Tensor]:
    return [torch.stack(parts).mean(0) for parts in zip(*slopes, strict=True)]


def _slopes(loss: Tensor, weights: Weights, *, graph: bool = False, keep: bool = False) -> list[Tensor]:
    """d loss / d weights; `graph`: differentiable again; `keep`: the loss's graph stays for other tasks."""
    given = list(weights.values())
    more = {"create_graph": graph, "retain_graph": graph or keep}
    return list(torch.autograd.grad(loss, given, allow_unused=True, materialize_grads=True, **more))
