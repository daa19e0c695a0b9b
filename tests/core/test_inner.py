"""The inner loop's gradients: against loops written out, finite differences, closed forms and limiting cases. All in fp64."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import batch_norm, cross_entropy

from spolia.core.inner import Execution, Inner, InnerLoop, Task, tasks_of

pytestmark = pytest.mark.sampled(3)  # of many cases alike

CLOSE = {"rtol": 1e-12, "atol": 1e-12}  # fp64: the same sums in another order
Weights = dict[str, Tensor]
RULES = [
    Inner(steps=3, lr=0.3),
    Inner(steps=3, lr=0.3, gradient="reverse"),
    Inner(steps=3, lr=0.2, optimizer="momentum", momentum=0.7),
    Inner(steps=3, lr=0.2, optimizer="momentum", momentum=0.7, gradient="reverse"),
    Inner(steps=3, lr=0.05, optimizer="adam", eps=0.1),
    Inner(steps=3, lr=0.05, optimizer="adam", eps=0.1, gradient="reverse"),
]
LABELS = [f"{rule.optimizer}-{rule.gradient}" for rule in RULES]


def drawn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def smooth_net() -> nn.Module:
    """Linear, batch norm, tanh, linear: no kinks, and a norm before which second derivatives go wrong."""
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 3)).double()
    for i, parameter in enumerate(net.parameters()):
        parameter.data = 0.7 * drawn(*parameter.shape, seed=i) + (i == 2)
    return net


def by_hand(weights: Weights, x: Tensor) -> Tensor:
    """`smooth_net` as a function."""
    x = x @ weights["0.weight"].t() + weights["0.bias"]
    x = batch_norm(x, None, None, weights["1.weight"], weights["1.bias"], training=True)
    return torch.tanh(x) @ weights["3.weight"].t() + weights["3.bias"]


def some_tasks(count: int = 3, views: int = 2, shots: int = 6, queries: int = 5, first: int = 0) -> list[Task]:
    made = []
    for t in range(first, first + count):
        x, query = drawn(views, shots, 4, seed=100 + t), drawn(queries, 4, seed=200 + t)
        y = torch.arange(shots).remainder(3).expand(views, -1)
        made.append(Task((x, y), (query, torch.arange(queries).remainder(3))))
    return made


def agreeing(outputs: Tensor, task: Task) -> Tensor:
    """Cross-entropy of every view, and how far they are apart: an outer loss that couples the views."""
    p = outputs.softmax(-1)  # [views, queries, classes]
    apart = 1 - torch.cosine_similarity(p, p.mean(0, keepdim=True), dim=-1).mean()
    each = [cross_entropy(o, task.query[1]) for o in outputs.unbind()]
    return torch.stack(each).mean() + 2 * apart


def written_out(weights: Weights, tasks: list[Task], rule: Inner, lr: Callable[[str], Any]) -> tuple[Tensor, Weights]:
    """Mean outer loss and its gradient for sgd: autograd.grad in a plain loop."""
    start = {name: t.detach().clone().requires_grad_() for name, t in weights.items()}
    losses = []
    for task in tasks:
        outputs = []
        for x, y in zip(*task.support, strict=True):
            fast = dict(start)
            for _ in range(rule.steps):
                loss = cross_entropy(by_hand(fast, x), y)
                slopes = torch.autograd.grad(loss, list(fast.values()), create_graph=rule.order == 2)
                fast = {n: t - lr(n) * g for (n, t), g in zip(fast.items(), slopes, strict=True)}
            outputs.append(by_hand(fast, task.query[0]))
        losses.append(agreeing(torch.stack(outputs), task))
    mean = torch.stack(losses).mean()
    return mean.detach(), dict(zip(start, torch.autograd.grad(mean, list(start.values())), strict=True))


def same(found: Weights, wanted: Weights, **close: float) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, **(close or CLOSE), msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("mode", ["loop", "workers", "vmap"])
@pytest.mark.parametrize(("order", "gradient"), [(1, "unroll"), (2, "unroll"), (2, "reverse")])
def test_the_gradient_is_that_of_a_loop_written_out(mode: str, order: int, gradient: str) -> None:
    net, tasks, rule = smooth_net(), some_tasks(), Inner(steps=3, lr=0.4, order=order, gradient=gradient)
    found = InnerLoop(net, rule, Execution(mode, chunk=2, workers=2)).gradient(tasks, agreeing)
    loss, gradient_ = written_out(dict(net.named_parameters()), tasks, rule, lambda name: 0.4)
    same(found.gradient, gradient_)
    torch.testing.assert_close(found.losses.mean(), loss, **CLOSE)
    assert found.loss == pytest.approx(loss.item(), rel=1e-12) and found.places == range(3)
    assert [o.shape for o in found.outputs] == [(2, 5, 3)] * 3 and not found.outputs[0].requires_grad


def test_first_and_second_order_are_different_directions() -> None:
    """The check above can see a missing Hessian."""
    net, tasks = smooth_net(), some_tasks()
    one, two = (InnerLoop(net, Inner(3, 0.4, order=o), Execution("loop")).gradient(tasks).gradient for o in (1, 2))
    flat = [torch.cat([t.flatten() for t in g.values()]) for g in (one, two)]
    assert torch.cosine_similarity(*flat, dim=0) < 0.99


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("rule", RULES, ids=LABELS)
def test_finite_differences_along_random_directions(rule: Inner, mode: str) -> None:
    """In the parameters and the rates at once, with rates for every element and step."""
    rule = Inner(**vars(rule) | {"rates_per_step": True})
    net, tasks = smooth_net(), some_tasks(2)
    loop = InnerLoop(net, rule, Execution(mode))
    weights = {name: p.detach() for name, p in net.named_parameters()}
    rates = {n: r.detach() * (1 + 0.1 * drawn(*r.shape, seed=9)) for n, r in loop.rates(elementwise=True).items()}
    found = loop.gradient(tasks, agreeing, weights, rates)
    for seed in range(2):
        ways = [{n: drawn(*t.shape, seed=seed) for n, t in part.items()} for part in (weights, rates)]
        slope = sum((found.gradient[n] * d).sum() for n, d in ways[0].items())
        slope = slope + sum((found.rates[n] * d).sum() for n, d in ways[1].items())

        def at(h: float, ways: Any = ways) -> float:
            moved = [{n: t + h * d[n] for n, t in part.items()} for part, d in zip((weights, rates), ways, strict=True)]
            return loop.gradient(tasks, agreeing, *moved).loss

        h = 1e-5  # of a central difference: an error of h^2 and of 1e-16 / h
        assert (at(h) - at(-h)) / (2 * h) == pytest.approx(slope.item(), rel=1e-6, abs=1e-8)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("rule", RULES[::2], ids=LABELS[::2])
def test_the_reverse_recursion_is_the_unrolled_graph(rule: Inner, mode: str) -> None:
    net, tasks = smooth_net(), some_tasks()
    made = []
    for gradient in ("unroll", "reverse"):
        loop = InnerLoop(net, Inner(**vars(rule) | {"gradient": gradient, "steps": 4}), Execution(mode))
        made.append(loop.gradient(tasks, agreeing, rates=loop.rates()))
    same(made[0].gradient, made[1].gradient)
    same(made[0].rates, made[1].rates)


class Point(nn.Module):
    """A parameter that is adapted by quadratic losses; nothing else."""

    def __init__(self, theta: Tensor):
        super().__init__()
        self.theta = nn.Parameter(theta)

    def forward(self, matrix: Tensor, centre: Tensor) -> Tensor:
        away = self.theta - centre
        return 0.5 * away @ matrix @ away


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("gradient", ["unroll", "reverse"])
def test_quadratic_tasks_in_closed_form(gradient: str, mode: str) -> None:
    """theta^K = a + (I - lr A)^K (theta - a); its gradient (I - lr A)^K B (theta^K - b), to first order without the power."""
    n, steps, lr = 5, 4, 0.1
    theta = drawn(n, seed=0)
    halves, centres = drawn(3, 2, n, n, seed=1), drawn(3, 2, n, seed=2)
    matrices = halves @ halves.mT / n  # [tasks, support or query, n, n]
    tasks = tasks_of((matrices[:, :1], centres[:, :1]), (matrices[:, 1], centres[:, 1]))

    def run(order: int) -> tuple[Weights, list[Weights]]:
        loop = InnerLoop(
            Point(theta), Inner(steps, lr, order=order, gradient=gradient), Execution(mode),
            loss=lambda module, support: module(*support), predict=lambda module, query: module(*query),
        )  # fmt: skip
        return loop.gradient(tasks, lambda outputs, task: outputs.sum()).gradient, loop.adapted(tasks)

    wanted = {1: torch.zeros(n, dtype=torch.float64), 2: torch.zeros(n, dtype=torch.float64)}
    for (matrix, other), (centre, goal), adapted in zip(matrices, centres, run(2)[1], strict=True):
        power = torch.linalg.matrix_power(torch.eye(n, dtype=torch.float64) - lr * matrix, steps)
        end = centre + power @ (theta - centre)
        torch.testing.assert_close(adapted["theta"][0], end, **CLOSE)
        wanted[1] += other @ (end - goal) / 3
        wanted[2] += power @ other @ (end - goal) / 3
    for order in (1, 2):
        torch.testing.assert_close(run(order)[0]["theta"], wanted[order], **CLOSE)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_steps_are_torch_optims(optimizer: str, mode: str) -> None:
    net, tasks = smooth_net(), some_tasks(2)
    rule = Inner(steps=4, lr=0.1, optimizer=optimizer, momentum=0.8, betas=(0.7, 0.9), eps=1e-6)
    adapted = InnerLoop(net, rule, Execution(mode)).adapted(tasks)
    for task, ends in zip(tasks, adapted, strict=True):
        for v, (x, y) in enumerate(zip(*task.support, strict=True)):
            own = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
            made = {
                "sgd": lambda p: torch.optim.SGD(p, 0.1),
                "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.8),
                "adam": lambda p: torch.optim.Adam(p, 0.1, betas=(0.7, 0.9), eps=1e-6),
            }[optimizer](list(own.values()))
            for _ in range(4):
                made.zero_grad()
                cross_entropy(by_hand(own, x), y).backward()
                made.step()
            # the bias before the norm has a gradient of rounding errors, which Adam divides by its own size
            same({n: t[v] for n, t in ends.items() if n != "0.bias"}, {n: t for n, t in own.items() if n != "0.bias"})


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("rule", [Inner(0, 0.4), Inner(3, 0.0), Inner(3, 0.0, gradient="reverse")], ids=repr)
def test_no_step_and_no_rate_are_ordinary_training(rule: Inner, order: int) -> None:
    net, tasks = smooth_net(), some_tasks()
    rule = Inner(**vars(rule) | {"order": order})
    found = InnerLoop(net, rule, Execution("loop")).gradient(tasks)
    weights = {name: p.detach().clone().requires_grad_() for name, p in net.named_parameters()}
    losses = [cross_entropy(by_hand(weights, task.query[0]), task.query[1]) for task in tasks]
    wanted = torch.autograd.grad(torch.stack(losses).mean(), list(weights.values()))
    same(found.gradient, dict(zip(weights, wanted, strict=True)))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("part", ["head", "body"])
def test_partial_adaptation_is_a_rate_of_zero_elsewhere(part: str, order: int) -> None:
    """ANIL and BOIL; what is not adapted gets its gradient through the adapted and directly."""
    net, tasks = smooth_net(), some_tasks()
    loop = InnerLoop(net, Inner(3, 0.4, adapt=part, order=order), Execution("loop"))
    whole = InnerLoop(net, Inner(3, 0.4, order=order), Execution("vmap"))
    head = ["3.weight", "3.bias"]
    assert loop.adapted_names == [n for n, _ in net.named_parameters() if (n in head) == (part == "head")]
    rates = {n: torch.tensor(0.4 if n in loop.adapted_names else 0.0, dtype=torch.float64) for n in whole.adapted_names}
    one, two = loop.gradient(tasks, agreeing), whole.gradient(tasks, agreeing, rates=rates)
    same(one.gradient, two.gradient)
    assert all(bool(g.abs().max() > 1e-6) for n, g in one.gradient.items() if n != "0.bias")  # that is before a norm
    ends = whole.adapted(tasks, rates=rates)
    for name, p in net.named_parameters():
        assert torch.equal(ends[0][name][0], p) == (name not in loop.adapted_names)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("per_step", [False, True])
def test_rates_to_first_order(mode: str, per_step: bool) -> None:
    """-<gradient where the steps end, sum of the directions>, and by step each its own."""
    net, tasks = smooth_net(), some_tasks(1, views=1)
    loop = InnerLoop(net, Inner(2, 0.4, order=1, rates_per_step=per_step), Execution(mode))
    rates = loop.rates()
    found = loop.gradient(tasks, rates=rates)
    ends = [{n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}]
    (x,), (y,) = tasks[0].support
    for _ in range(2):
        slopes = torch.autograd.grad(cross_entropy(by_hand(ends[-1], x), y), list(ends[-1].values()))
        moved = {n: (t - 0.4 * g).detach().requires_grad_() for (n, t), g in zip(ends[-1].items(), slopes, strict=True)}
        ends.append(moved)
    loss = cross_entropy(by_hand(ends[-1], tasks[0].query[0]), tasks[0].query[1])
    slope = dict(zip(ends[-1], torch.autograd.grad(loss, list(ends[-1].values())), strict=True))
    for name, g in slope.items():
        parts = torch.stack([(g * (b[name] - a[name]) / 0.4).sum() for a, b in pairwise(ends)])
        wanted = parts if per_step else parts.sum()
        torch.testing.assert_close(found.rates[name], wanted.detach(), rtol=1e-10, atol=1e-10)  # a difference over 0.4


@pytest.mark.parametrize("mode", ["loop", "vmap"])
def test_a_start_of_its_own_gets_no_gradient(mode: str) -> None:
    """A task that begins elsewhere is a task from there, of which nothing comes back."""
    net, tasks = smooth_net(), some_tasks(1)
    elsewhere = drawn(3, 6, seed=7)
    own = Task(tasks[0].support, tasks[0].query, {"3.weight": elsewhere.expand(2, 3, 6)})
    for gradient in ("unroll", "reverse"):
        loop = InnerLoop(net, Inner(2, 0.4, gradient=gradient), Execution(mode))
        found = loop.gradient([own], agreeing)
        there = {n: p.detach() for n, p in net.named_parameters()} | {"3.weight": elsewhere}
        wanted = loop.gradient(tasks, agreeing, there).gradient
        assert not found.gradient["3.weight"].any()
        same(found.gradient | {"3.weight": wanted["3.weight"]}, wanted)


@pytest.mark.parametrize("mode", ["loop", "vmap"])
@pytest.mark.parametrize("gradient", ["unroll", "reverse"])
def test_another_support_in_every_step(mode: str, gradient: str) -> None:
    """Two steps on two supports are one step, and one more from where it led."""
    net, (a, b) = smooth_net(), some_tasks(2)
    both = tuple(torch.stack(pair, 1) for pair in zip(a.support, b.support, strict=True))  # [views, steps, ...]
    loop = InnerLoop(net, Inner(2, 0.4, gradient=gradient), Execution(mode))
    ends = loop.adapted([Task(both, a.query, per_step=True)])[0]
    one = InnerLoop(net, Inner(1, 0.4), Execution("loop"))
    first = one.adapted([a])[0]
    wanted = one.adapted([Task(b.support, b.query, first)])[0]
    same(ends, wanted)
    alike = tuple(t.unsqueeze(1).expand(-1, 2, *t.shape[1:]) for t in a.support)
    same(loop.gradient([Task(alike, a.query, per_step=True)], agreeing).gradient, loop.gradient([a], agreeing).gradient)


def test_what_the_losses_do_not_reach_has_a_gradient_of_zero() -> None:
    class Loose(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unused, self.net = nn.Parameter(torch.ones(3, dtype=torch.float64)), smooth_net()

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    for rule in (Inner(2), Inner(2, gradient="reverse"), Inner(2, order=1), Inner(2, adapt="head")):
        found = InnerLoop(Loose(), rule, Execution("loop")).gradient(some_tasks(1))
        assert not found.gradient["unused"].any() and found.gradient["net.0.weight"].any()


def test_the_order_of_tasks_changes_no_sum() -> None:
    loop, tasks = InnerLoop(smooth_net(), Inner(2, 0.4), Execution("loop")), some_tasks(4)
    there, back = loop.gradient(tasks, agreeing), loop.gradient(tasks[::-1], agreeing)
    same(there.gradient, back.gradient)
    assert torch.equal(there.losses, back.losses.flip(0))
