"""Inner steps, and the gradient through them: unrolled, by a reverse recursion, or to first order.

    theta_{k+1} = theta_k - alpha * d_k,    k = 0 … K-1

d_k is the gradient of the support loss (sgd), its running sum (momentum), or Adam's ratio, each as torch.optim has it. The
meta-gradient is that of an outer loss of theta_K in theta_0, in the parameters that are not adapted, and in the rates.

Unrolled keeps the graph of all K steps. The reverse recursion keeps theta_0 … theta_K without one and goes back a step at a
time; for sgd a step back is g <- g - H_k (alpha g) with H_k the Hessian of the support loss at theta_k, by a product with a
vector. Both are exact. To first order the updates count as constants: g stays what it is at theta_K, and a rate gets
-sum_k <g, d_k>.

The steps see only a `Problem`: an ordinary loop hands in one task, vmap a stack of them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.inner_rules import Inner

    Weights = dict[str, Tensor]
    Slots = list[Weights]  # what the optimizer carries: nothing, the sum, or Adam's two means


class Problem(Protocol):
    """Some weights that are adapted apart, and what joins them in the outer loss."""

    count: int

    def start(self, i: int, weights: Weights) -> Weights:
        """The i-th weights before the first step, differentiable in the shared start."""
        ...

    def loss(self, i: int, weights: Weights, shared: Weights, k: int) -> Tensor:
        """Support loss of the i-th at step k; of a stack, the sum of theirs."""
        ...

    def outer(self, ends: list[Weights], shared: Weights) -> tuple[Tensor, list[Any]]:
        """Outer loss of every task [tasks], and the outputs it was made of."""
        ...


@dataclass
class Slope:
    """Outer losses [tasks], outputs by task, and the gradient of the losses' sum."""

    losses: Tensor
    outputs: list[Any]
    start: Weights
    shared: Weights
    rates: Weights = field(default_factory=dict)


def unrolled(rule: Inner, problem: Problem, start: Weights, shared: Weights, rates: Weights) -> Slope:
    """Through the graph of all steps."""
    start, shared, rates = leaves(start), leaves(shared), leaves(rates)
    ends = []
    for i in range(problem.count):
        weights = problem.start(i, start)
        slots = beginning(rule, weights)
        for k in range(rule.steps):
            slope = slopes(problem.loss(i, weights, shared, k), weights, graph=True)
            weights, slots, _ = advance(rule, k, weights, slots, slope, rates)
        ends.append(weights)
    losses, outputs = problem.outer(ends, shared)
    return Slope(losses.detach(), outputs, *back([losses.sum()], [None], start, shared, rates))


def reverse(rule: Inner, problem: Problem, start: Weights, shared: Weights, rates: Weights) -> Slope:
    """Back from the end one step at a time, each step done again with its graph."""
    start, shared, rates = leaves(start), leaves(shared), leaves(rates)
    paths = [[(w, s) for w, s, _ in walk(rule, problem, i, start, shared, rates)] for i in range(problem.count)]
    ends = [leaves(path.pop()[0]) for path in paths]
    losses, outputs = problem.outer(ends, shared)
    *cots, of_shared = back([losses.sum()], [None], *ends, shared)
    found = Slope(losses.detach(), outputs, zeros(start), zeros(shared), zeros(rates))
    add(found.shared, of_shared)
    for i, (path, cot) in enumerate(zip(paths, cots, strict=True)):
        cot_slots = [zeros(cot) for _ in beginning(rule, cot)]
        for k in reversed(range(rule.steps)):
            weights, slots = path.pop()
            weights, slots = leaves(weights), [leaves(s) for s in slots]
            slope = slopes(problem.loss(i, weights, shared, k), weights, graph=True)
            ahead, slots_ahead, _ = advance(rule, k, weights, slots, slope, rates)
            given = [t for part in (ahead, *slots_ahead) for t in part.values()]
            wanted = [t for part in (cot, *cot_slots) for t in part.values()]
            cot, *cot_slots, of_shared, of_rates = back(given, wanted, weights, *slots, shared, rates)
            add(found.shared, of_shared)
            add(found.rates, of_rates)
        begun = problem.start(i, start)
        add(found.start, back(list(begun.values()), list(cot.values()), start)[0])
    return found


def first_order(rule: Inner, problem: Problem, start: Weights, shared: Weights, rates: Weights) -> Slope:
    """The gradient where the steps end; no graph outlives its step."""
    start, shared = leaves(start), leaves(shared)
    ends, moves = [], []
    for i in range(problem.count):
        moved: list[Weights] = []
        end = start
        for weights, _, directions in walk(rule, problem, i, start, shared, rates):
            if rates and directions:
                moved.append(directions)
            end = weights
        ends.append(leaves(end))
        moves.append(moved)
    losses, outputs = problem.outer(ends, shared)
    *of_ends, of_shared = back([losses.sum()], [None], *ends, shared)
    found = Slope(losses.detach(), outputs, zeros(start), of_shared, zeros(rates))
    for i, (slope, moved) in enumerate(zip(of_ends, moves, strict=True)):
        for k, directions in enumerate(moved):
            for name, total in found.rates.items():
                total = total[k] if rule.rates_per_step else total
                if name in directions:
                    total -= (slope[name] * directions[name]).sum_to_size(total.shape)
        begun = problem.start(i, start)
        add(found.start, back(list(begun.values()), list(slope.values()), start)[0])
    return found


def walk(
    rule: Inner, problem: Problem, i: int, start: Weights, shared: Weights, rates: Weights
) -> Iterator[tuple[Weights, Slots, Weights]]:
    """Weights, slots and the direction that led there, before the first step and after each; none has a graph."""
    weights = {name: t.detach() for name, t in problem.start(i, start).items()}
    slots = beginning(rule, weights)
    yield weights, slots, {}
    shared = {name: t.detach() for name, t in shared.items()}
    for k in range(rule.steps):
        with torch.enable_grad():
            held = leaves(weights)
            slope = slopes(problem.loss(i, held, shared, k), held, graph=False)
        with torch.no_grad():
            weights, slots, directions = advance(rule, k, weights, slots, slope, rates)
        yield weights, slots, directions


def advance(
    rule: Inner, k: int, weights: Weights, slots: Slots, slope: Weights, rates: Mapping[str, Tensor]
) -> tuple[Weights, Slots, Weights]:
    """Weights and slots after step k, and the direction that the rates scale."""
    if rule.optimizer == "sgd":
        directions = slope
    elif rule.optimizer == "momentum":
        directions = {name: rule.momentum * slots[0][name] + g for name, g in slope.items()}
        slots = [directions]
    else:
        one, two = rule.betas
        mean = {name: one * slots[0][name] + (1 - one) * g for name, g in slope.items()}
        square = {name: two * slots[1][name] + (1 - two) * g * g for name, g in slope.items()}
        directions = {}
        for name in slope:
            size = root(square[name] / (1 - two ** (k + 1)))
            directions[name] = mean[name] / (1 - one ** (k + 1)) / (size + rule.eps)
        slots = [mean, square]
    return {n: t - rate(rule, rates, n, k) * directions[n] for n, t in weights.items()}, slots, directions


def rate(rule: Inner, rates: Mapping[str, Tensor], name: str, k: int) -> Tensor | float:
    """The rate of a parameter at step k: learned, or the rule's."""
    if name not in rates:
        return rule.lr
    return rates[name][k] if rule.rates_per_step else rates[name]


def root(square: Tensor) -> Tensor:
    """Square root whose derivative at zero is zero: a gradient of exactly zero has no size to change."""
    some = square > 0
    return torch.where(some, torch.where(some, square, 1.0).sqrt(), 0.0)


def beginning(rule: Inner, weights: Weights) -> Slots:
    """What the optimizer carries before the first step."""
    return [zeros(weights) for _ in range({"sgd": 0, "momentum": 1, "adam": 2}[rule.optimizer])]


def slopes(loss: Tensor, weights: Weights, graph: bool) -> Weights:
    """Gradient of a support loss, by name; zero for what it does not depend on."""
    if not weights or not loss.requires_grad:
        return zeros(weights)
    return filled(weights, torch.autograd.grad(loss, list(weights.values()), create_graph=graph, allow_unused=True))


def back(given: Sequence[Tensor], wanted: Sequence[Tensor | None], *parts: Weights) -> list[Weights]:
    """The products of `wanted` with the Jacobian of `given` in each of `parts`; the graph is used up."""
    pairs = [(g, w) for g, w in zip(given, wanted, strict=True) if g.requires_grad]
    inputs = [t for part in parts for t in part.values()]
    if not pairs or not inputs:
        return [zeros(part) for part in parts]
    outputs, weights = zip(*pairs, strict=True)
    found = iter(torch.autograd.grad(outputs, inputs, weights, allow_unused=True))
    return [filled(part, [next(found) for _ in part]) for part in parts]


def filled(weights: Weights, found: Any) -> Weights:
    """Gradients by name; zero where there is none."""
    pairs = zip(weights.items(), found, strict=True)
    return {name: torch.zeros_like(t) if g is None else g for (name, t), g in pairs}


def leaves(weights: Mapping[str, Tensor]) -> Weights:
    """The same values, from which gradients begin."""
    return {name: t.detach().requires_grad_() for name, t in weights.items()}


def zeros(weights: Mapping[str, Tensor]) -> Weights:
    return {name: torch.zeros_like(t, requires_grad=False) for name, t in weights.items()}


def add(total: Weights, more: Weights) -> None:
    for name, t in total.items():
        t += more[name]
