"""Gradients as vectors, the diagonal Fisher, and pulls towards earlier weights: lists of tensors, one a parameter.

    F = E_x sum_c p_c (d log p_c / d theta)^2        the true diagonal Fisher, from the model's own predictions alone

Several numbers go by the name of a diagonal Fisher and lie orders of magnitude apart; KINDS are those in use:

| kind | per example, then summed | label |
|---|---|---|
| true | sum_c p_c (d log p_c)^2 | none |
| sampled | (d log p_c)^2, c drawn from p: right on average | none |
| empirical | (d log p_y)^2 | y |
| weighted | p_y (d log p_y)^2, as in the refresh paper's code | y |
| batch | (d mean log p_y)^2 of a whole batch, times its size: examples mix | y |

Forward passes are the caller's: `logits(weights, batch)` -> [n, classes], differentiable in the weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.dist import summed, world
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    State = dict[str, Tensor]
    Logits = Callable[[State, Tensor], Tensor]

Kind = Literal["true", "sampled", "empirical", "weighted", "batch"]
LABELLED = ("empirical", "weighted", "batch")
_HELD = 128_000_000  # bytes of single examples' gradients held at a time
_MOST = 64  # examples at a time: more save nothing


# --- vectors ---------------------------------------------------------------------------------------------------------


def gradients(loss: Tensor, parameters: Sequence[Tensor]) -> list[Tensor]:
    """d loss / d parameter of each; 0 where the loss does not depend on it."""
    return list(torch.autograd.grad(loss, list(parameters), allow_unused=True, materialize_grads=True))


def dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """The inner product of two lists of tensors, as one vector each: a scalar."""
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()


def norm(a: Sequence[Tensor]) -> Tensor:
    """The Euclidean length of a list of tensors, as one vector."""
    return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(list(a))))


def project(gradient: Sequence[Tensor], reference: Sequence[Tensor]) -> list[Tensor]:
    """The gradient; where it points against the reference, without its part along it (A-GEM, arXiv 1812.00420)."""
    along, length = dot(gradient, reference), dot(reference, reference)
    share = torch.where((along < 0) & (length > 0), along / length, 0.0)  # on the device: nobody waits for a number
    return [g - share * r for g, r in zip(gradient, reference, strict=True)]


def share(parameters: Sequence[Tensor], weight: float = 1.0) -> None:
    """Of several processes' gradients the sum, each times its own `weight`; in place. With one process nothing happens.

    A gradient that no process has stays None, so that nothing decays or moves its parameter.
    """
    if world()[1] == 1:
        return
    there = summed(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)).tolist()
    used = [p for p, number in zip(parameters, there, strict=True) if number]
    for dtype in sorted({p.dtype for p in used}, key=str):
        group = [p for p in used if p.dtype == dtype]
        parts = [(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group]
        flat = summed(torch.cat(parts).mul_(weight))
        for p, part in zip(group, flat.split([p.numel() for p in group]), strict=True):
            p.grad = part.view_as(p)


# --- towards earlier weights -----------------------------------------------------------------------------------------


def distance(weights: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor]) -> Tensor:
    """sum_i F_i (theta_i - theta*_i)^2, without a half: a scalar."""
    gaps = torch._foreach_sub(list(weights), list(anchors))
    return torch.stack([(f * gap.square()).sum() for f, gap in zip(importance, gaps, strict=True)]).sum()


def pull(weights: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor], strength: float) -> None:
    """Add the gradient 2 strength F (theta - theta*) of that distance to the gradients; in place."""
    with torch.no_grad():
        for weight, anchor, f in zip(weights, anchors, importance, strict=True):
            slope = (weight - anchor).mul_(f).mul_(2 * strength)
            weight.grad = slope if weight.grad is None else weight.grad.add_(slope)


def pull_implicitly(
    weights: Sequence[Tensor], anchors: Sequence[Tensor], importance: Sequence[Tensor], strength: float
) -> None:
    """theta <- (theta + s theta*) / (1 + s), s = 2 strength F: the proximal step of strength times the distance; in place.

    `strength` holds the learning rate. It lands between theta and theta* however large s is; the explicit step
    theta - s (theta - theta*) overshoots where s > 1 and diverges where s > 2.
    """
    with torch.no_grad():
        shares = torch._foreach_mul(list(importance), 2 * strength)
        below = torch._foreach_add(shares, 1.0)
        torch._foreach_div_(shares, below)
        torch._foreach_lerp_([w.data for w in weights], list(anchors), shares)


# --- the diagonal Fisher ---------------------------------------------------------------------------------------------


def fisher(
    logits: Logits,
    weights: State,
    batch: Tensor,
    *,
    kind: Kind = "true",
    labels: Tensor | None = None,
    draws: Tensor | None = None,
) -> State:
    """The diagonal Fisher of a batch [n, ...], summed over its examples; by name, in the weights' shapes.

    `labels` [n] for the kinds that take them; `draws` [n], uniform in 0 … 1, for `sampled`. Modules that vmap refuses
    are gone through example by example. No module may draw or change statistics: eval mode.
    """
    if kind in LABELLED and labels is None:
        raise SpoliaError(f"`{kind}` takes labels", where="fisher", mend="give labels, or kind=`true`")
    if kind == "sampled" and draws is None:
        raise SpoliaError("`sampled` needs a number for each example", where="fisher", mend="give draws [n]")
    if kind == "batch":
        assert labels is not None
        return _of_the_batch(logits, weights, batch, labels)
    chosen = labels if labels is not None and kind in LABELLED else draws if kind == "sampled" else None

    def squares(outputs: Tensor, back: Callable[[Tensor], State], own: Tensor | None) -> State:
        rows = _directions(outputs, kind, own)
        total = _squared(back(rows[0]))
        for row in rows[1:]:
            total = {name: total[name] + square for name, square in _squared(back(row)).items()}
        return total

    return _by_example(logits, weights, batch, chosen, squares)


def sensitivity(logits: Logits, weights: State, batch: Tensor) -> State:
    """sum over examples of |d ||f(x)||^2 / d theta| (MAS, arXiv 1711.09601); as `fisher` takes and gives it."""

    def absolute(outputs: Tensor, back: Callable[[Tensor], State], own: Tensor | None) -> State:
        return {name: slope.abs() for name, slope in back(2 * outputs).items()}

    return _by_example(logits, weights, batch, None, absolute)


def _directions(outputs: Tensor, kind: Kind, own: Tensor | None) -> list[Tensor]:
    """What to send back through the logits [classes] of one example, so that squares add up to its Fisher."""
    p = outputs.double().softmax(-1)
    classes = torch.arange(p.shape[-1], device=p.device)
    if kind == "true":  # the gradient of log p_c is J^T (e_c - p)
        rows = p.sqrt().unsqueeze(1) * ((classes.unsqueeze(1) == classes).to(p) - p)
        return [row.to(outputs.dtype) for row in rows.unbind()]
    assert own is not None
    label = (p.cumsum(-1) < own).sum(-1).clamp(max=p.shape[-1] - 1) if kind == "sampled" else own
    hit = (classes == label).to(p)
    row = hit - p
    if kind == "weighted":
        row = row * (hit * p).sum().sqrt()
    return [row.to(outputs.dtype)]


def _by_example(
    logits: Logits,
    weights: State,
    batch: Tensor,
    chosen: Tensor | None,
    reduce: Callable[[Tensor, Callable[[Tensor], State], Tensor | None], State],
) -> State:
    """The sum over examples of what `reduce` makes of one's logits, of how to go back from them, and of its `chosen`."""
    held = {name: weight.detach() for name, weight in weights.items()}
    total = {name: torch.zeros_like(weight) for name, weight in held.items()}
    size = max(1, min(_MOST, _HELD // max(3 * sum(w.numel() * w.element_size() for w in held.values()), 1)))

    def one(x: Tensor, own: Tensor | None) -> State:
        made: Any = torch.func.vjp(lambda w: logits(w, x.unsqueeze(0))[0], held)
        return reduce(made[0], lambda row: made[1](row)[0], own)

    together = True
    for start in range(0, len(batch), size):
        x, own = batch[start : start + size], None if chosen is None else chosen[start : start + size]
        if together:
            try:
                with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # fused ones have no rule
                    apart = torch.func.vmap(one, in_dims=(0, None if own is None else 0))(x, own)
                for name, value in apart.items():
                    total[name] += value.sum(0)
                continue
            except Exception:  # vmap refuses some operations, each in its own words; the loop takes them all
                together = False
        for i in range(len(x)):
            for name, value in one(x[i], None if own is None else own[i]).items():
                total[name] += value
    return total


def _of_the_batch(logits: Logits, weights: State, batch: Tensor, labels: Tensor) -> State:
    leaves = {name: weight.detach().requires_grad_() for name, weight in weights.items()}
    loss = torch.nn.functional.cross_entropy(logits(leaves, batch), labels)
    slopes = dict(zip(leaves, gradients(loss, list(leaves.values())), strict=True))
    return {name: square * len(batch) for name, square in _squared(slopes).items()}


def _squared(slopes: State) -> State:
    return {name: slope.square() for name, slope in slopes.items()}


def checked(found: State, where: str) -> State:
    """`found`, when all of it is finite; else SpoliaError."""
    total = sum(float(value.double().sum()) for value in found.values())
    if not math.isfinite(total):
        mend = "look at the inputs of this experience, or lower the learning rate"
        raise SpoliaError("its gradients are NaN or Inf", where=where, mend=mend)
    return found
