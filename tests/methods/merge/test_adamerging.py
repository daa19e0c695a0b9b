"""AdaMerging against closed forms: projected gradients, its two ends (no step, no clamp), and what must not change it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

import spolia
from spolia import Examples, ExpertPool, Network, SpoliaError
from spolia.core.functional import call
from spolia.core.outputs import entropy
from spolia.methods.merge.adamerging import AdaMerging, adamerging, gradient
from spolia.parts.adaptation import Objective, Teacher
from spolia.parts.combination import Combination
from spolia.parts.layers import grouped
from spolia.parts.learned import Learned
from spolia.parts.pieces import Storage

pytestmark = pytest.mark.sampled(3)  # of many cases alike

State = dict[str, Tensor]
WIDE = torch.float64
TASKS = ("a", "b", "c")
# two fp64 sums of some hundred products in another order
EXACT = {"rtol": 1e-10, "atol": 1e-12}


class Attention(nn.Module):
    """LayerNorm and one head of attention over 4 tokens, then their mean: [batch, 4, 6] -> [batch, 6]."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return (x + self.mix(y, y, y, need_weights=False)[0]).mean(1)


def conv() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 5, 5)), nn.Conv2d(1, 6, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    )


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 6))


NETS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "plain": (plain, (5,)),
    "conv": (conv, (25,)),
    "attention": (Attention, (4, 6)),
}


class Case:
    """A base, an expert a task, heads of 3, 4 and 5 classes, 40 inputs a task: everything random, in one type."""

    def __init__(
        self, make: Callable[[], nn.Module] = plain, shape: tuple[int, ...] = (5,), dtype: Any = WIDE, seed: int = 0
    ):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            module = make().to(dtype)
            self.base: State = {name: t.clone() for name, t in module.state_dict().items()}
            self.experts = {
                task: {n: t + 0.3 * torch.randn_like(t) if t.is_floating_point() else t for n, t in self.base.items()}
                for task in TASKS
            }
            heads = {task: nn.Linear(6, 3 + k).to(dtype) for k, task in enumerate(TASKS)}
            self.inputs = {task: torch.randn(40, *shape, dtype=dtype) for task in TASKS}
        self.network = Network(module, heads)
        self.pool = ExpertPool.of(self.experts, self.base)

    def learn(self, tasks: tuple[str, ...] = TASKS, **settings: Any) -> Learned:
        pool = ExpertPool.of({task: self.experts[task] for task in tasks}, self.base)
        chosen = AdaMerging(**{"batch": 8, "guard": "none", "held_out": 0.0, **settings})
        return adamerging(pool, self.network, {task: self.inputs[task] for task in tasks}, chosen)

    def merge(self, method: str, **settings: Any) -> State:
        return spolia.merge(self.experts, base=self.base, method=method, settings=settings)

    def slope(self, factors: Tensor, **settings: Any) -> tuple[dict[str, float], Tensor]:
        """Losses and the gradient [tensors, experts] at factors [tensors, experts], by projection."""
        chosen = AdaMerging(**{"batch": 8, **settings})
        inputs = {task: Examples(x, name=task) for task, x in self.inputs.items()}
        with self.pool.opened():
            made = Combination.of(self.pool, self.network, None, Storage())
            made.write(factors)
            return gradient(made, Objective(inputs, chosen, {}), chosen, 0, 0)

    def names(self) -> list[str]:
        with self.pool.opened():
            return Combination.of(self.pool, self.network, None, Storage()).names

    def autograd(self, factors: Tensor, loss: Callable[[Tensor], Tensor], **settings: Any) -> Tensor:
        """The same gradient through the stack of task vectors, as the published code takes it."""
        lam = factors.clone().requires_grad_()
        weights = {
            name: self.base[name]
            + sum(lam[i, k] * (self.experts[t][name] - self.base[name]) for k, t in enumerate(TASKS))
            for i, name in enumerate(self.names())
        }
        total = torch.zeros((), dtype=WIDE)
        for task in TASKS:
            examples = Examples(self.inputs[task], name=task)
            batch = examples.draw(8, 0, 0)
            total = total + loss(self.network.heads[task](call(self.network.module, weights, lambda m, x: m(x), batch)))
        return torch.autograd.grad(total, lam)[0]


def random_factors(case: Case) -> Tensor:
    draws = torch.Generator().manual_seed(1)
    return torch.rand(len(case.names()), len(TASKS), dtype=WIDE, generator=draws)


def mean_entropy(logits: Tensor) -> Tensor:
    return -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1).mean()


def informed(logits: Tensor) -> Tensor:
    p = logits.softmax(-1).mean(0)
    return mean_entropy(logits) + 0.7 * (p * p.log()).sum()


@pytest.mark.parametrize("kind", NETS)
def test_the_projected_gradient_is_that_of_autograd(kind: str) -> None:
    case = Case(*NETS[kind])
    factors = random_factors(case)
    torch.testing.assert_close(case.slope(factors)[1], case.autograd(factors, mean_entropy), **EXACT)


@pytest.mark.parametrize(
    ("settings", "loss"),
    [
        ({"objective": "normalised_entropy"}, lambda z: mean_entropy(z) / math.log(z.shape[1])),
        ({"objective": "information", "diversity": 0.7}, informed),
        ({"objective": "information", "diversity": 0.7, "micro_batch": 3}, informed),
        ({"micro_batch": 3}, mean_entropy),
        ({"task_weight": 2.0}, lambda z: 2 * mean_entropy(z)),
    ],
    ids=["normalised", "information", "information in parts", "in parts", "weighted"],
)
def test_every_objective_has_its_own_gradient(settings: dict[str, Any], loss: Callable[[Tensor], Tensor]) -> None:
    case = Case()
    factors = random_factors(case)
    torch.testing.assert_close(case.slope(factors, **settings)[1], case.autograd(factors, loss), **EXACT)


def test_distance_to_the_expert_and_labels_are_what_torch_has() -> None:
    draws = torch.Generator().manual_seed(0)
    z, t = torch.randn(2, 7, 4, dtype=WIDE, generator=draws)
    y = torch.tensor([0, 3, 1, -100, 2, 0, 1])
    places = torch.arange(7).numpy()
    objective = Objective({"a": Examples(z, y, name="a")}, AdaMerging(objective="expert"), {"a": Teacher(t, places)})
    wanted = nn.functional.kl_div(z.log_softmax(1), t.softmax(1), reduction="none").sum(1)
    torch.testing.assert_close(objective.losses("a", places, z), wanted, **EXACT)
    labelled = Objective({"a": Examples(z, y, name="a")}, AdaMerging(objective="labels"), {})
    wanted = nn.functional.cross_entropy(z, y, reduction="none", ignore_index=-100)
    torch.testing.assert_close(labelled.losses("a", places, z), wanted, **EXACT)


def test_one_coefficient_for_all_tensors_has_the_sum_of_their_gradients() -> None:
    case = Case()
    single = torch.tensor([0.2, 0.5, 0.3], dtype=WIDE)
    lam = single.clone().requires_grad_()
    weights = {
        n: self_n + sum(lam[k] * (case.experts[t][n] - self_n) for k, t in enumerate(TASKS))
        for n, self_n in case.base.items()
    }
    total = sum(
        mean_entropy(case.network.logits(t, Examples(case.inputs[t], name=t).draw(8, 0, 0), weights)) for t in TASKS
    )
    (wanted,) = torch.autograd.grad(total, lam)
    slopes = case.slope(single.expand(len(case.names()), -1))[1]
    torch.testing.assert_close(slopes.sum(0), wanted, **EXACT)


def test_without_steps_it_is_task_arithmetic() -> None:
    case = Case(dtype=torch.float32)
    learned = case.learn(steps=0)
    wanted = case.merge("task_arithmetic", scale=0.3)
    for name, tensor in learned.weights.items():
        # one addmv each, over other block sizes: fp32's last digit
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-6, atol=1e-6)
    assert set(learned.coefficients.values()) == {(0.3, 0.3, 0.3)}


def test_plusplus_without_steps_is_ties_with_sums() -> None:
    case = Case()
    learned = case.learn(steps=0, preprocess="ties", density=0.4)
    wanted = case.merge("ties", density=0.4, scale=0.3, normalize=False)
    for name, tensor in learned.weights.items():
        torch.testing.assert_close(tensor, wanted[name], **EXACT)


@pytest.mark.parametrize("clamp", ["project", "none"])
def test_plusplus_that_trims_nothing_of_agreeing_vectors_is_adamerging(clamp: str) -> None:
    case = Case()
    case.experts = {
        t: {n: case.base[n] + (x - case.base[n]).abs() for n, x in s.items()} for t, s in case.experts.items()
    }
    both = [case.learn(steps=5, lr=0.1, preprocess=p, density=1.0, clamp=clamp) for p in ("none", "ties")]
    for name, tensor in both[0].weights.items():
        torch.testing.assert_close(both[1].weights[name], tensor, **EXACT)


def test_awd_without_steps_is_awd() -> None:
    case = Case()
    learned, wanted = case.learn(steps=0, preprocess="awd"), case.merge("awd", scale=0.3)
    for name, tensor in learned.weights.items():
        torch.testing.assert_close(tensor, wanted[name], **EXACT)


def test_an_expert_that_changed_nothing_keeps_its_coefficient() -> None:
    case = Case()
    case.experts["b"] = case.base
    learned = case.learn(steps=6, lr=0.1)
    assert {row[1] for row in learned.coefficients.values()} == {0.3}
    assert {row[0] for row in learned.coefficients.values()} != {0.3}


def test_a_stream_given_twice_has_twice_the_gradient() -> None:
    case = Case()
    factors = random_factors(case)
    case.inputs = dict.fromkeys(TASKS, case.inputs["a"][:8])  # one batch holds them all, so the draw cannot matter
    for head in case.network.heads.values():
        head.weight.data, head.bias.data = case.network.heads["a"].weight.data, case.network.heads["a"].bias.data
    one = case.slope(factors, task_weight=(1.0, 0.0, 0.0))[1]
    torch.testing.assert_close(case.slope(factors, task_weight=(1.0, 1.0, 0.0))[1], 2 * one, **EXACT)


def test_the_order_of_tasks_goes_with_the_coefficients() -> None:
    case = Case()
    one, other = case.learn(steps=8, lr=0.05), case.learn(("c", "a", "b"), steps=8, lr=0.05)
    for name, (a, b, c) in one.coefficients.items():
        assert other.coefficients[name] == pytest.approx((c, a, b), abs=1e-9)  # sums in another order, eight steps long


def test_micro_batches_change_nothing() -> None:
    case = Case()
    whole, parts = case.slope(random_factors(case)), case.slope(random_factors(case), micro_batch=3)
    torch.testing.assert_close(whole[1], parts[1], rtol=1e-12, atol=1e-14)  # sums of eight terms
    assert whole[0] == pytest.approx(parts[0], rel=1e-12)


def counted(case: Case) -> list[int]:
    """How many inputs each forward pass of the case's network takes from now on."""
    calls: list[int] = []

    def outputs(module: nn.Module, batch: Any) -> Tensor:
        x = batch["x"] if isinstance(batch, dict) else batch
        calls.append(len(x))
        return module(x if x.is_floating_point() else nn.functional.one_hot(x, 5).to(WIDE))

    case.network = Network(case.network.module, case.network.heads, outputs)
    return calls


def test_tasks_that_share_a_pass_have_the_gradient_of_their_own() -> None:
    case = Case()  # heads of 3, 4 and 5 classes
    factors, weights = random_factors(case), {"task_weight": (0.5, 2.0, 1.25), "batches_per_step": 2}
    calls = counted(case)
    losses, apart = case.slope(factors, micro_batch=8, **weights)
    assert calls == [8] * 6
    for room, wanted in ((16, [16] * 3), (48, [48]), (20, [16] * 3), (3, [3, 3, 2] * 6)):
        calls.clear()
        found, together = case.slope(factors, micro_batch=room, **weights)
        assert calls == wanted
        torch.testing.assert_close(together, apart, rtol=1e-12, atol=1e-14)  # the same terms in another order
        assert found == pytest.approx(losses, rel=1e-12)


@pytest.mark.parametrize("objective", ["normalised_entropy", "information", "expert", "labels"])
def test_every_objective_is_the_same_in_a_shared_pass(objective: str) -> None:
    case, found = Case(), []
    factors, places = random_factors(case), torch.arange(40).numpy()
    draws = torch.Generator().manual_seed(2)
    teachers = {t: Teacher(torch.randn(40, 3 + k, dtype=WIDE, generator=draws), places) for k, t in enumerate(TASKS)}
    labels = torch.randint(0, 3, (40,), generator=draws)
    inputs = {task: Examples(x, labels, name=task) for task, x in case.inputs.items()}
    for room in (8, 24):
        chosen = AdaMerging(batch=8, micro_batch=room, objective=objective)
        made = Combination.of(case.pool, case.network, None, Storage())
        made.write(factors)
        found.append(gradient(made, Objective(inputs, chosen, teachers), chosen, 0, 0))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-12)
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-12, atol=1e-14)


def test_by_default_a_pass_has_room_for_eight_inputs_or_a_batch() -> None:
    case = Case()
    factors, calls = random_factors(case), counted(case)
    case.slope(factors, batch=4)
    assert calls == [8, 4]
    calls.clear()
    case.slope(factors, batch=4, batches_per_step=4)
    assert calls == [8] * 6
    calls.clear()
    case.slope(factors, batch=16)
    assert calls == [16] * 3


def test_what_does_not_fit_together_goes_task_by_task() -> None:
    def passes(make: Callable[[], nn.Module] = plain, **inputs: Any) -> list[int]:
        case = Case(make)
        factors, calls = random_factors(case), counted(case)
        case.inputs |= inputs
        case.slope(factors, micro_batch=99)
        return calls

    x = torch.randn(40, 5, dtype=WIDE)
    assert passes() == [24]
    assert passes(b={"x": x}) == [8, 8, 8], "a mapping"
    assert passes(b=torch.randint(5, (40,))) == [8, 8, 8], "whole numbers, as of a text"
    assert passes(c=x.view(40, 1, 5).expand(40, 2, 5).sum(1, keepdim=True)) == [16, 8], "another shape"
    assert passes(lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))) == [24], "running statistics"
    batch = lambda: nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6, track_running_stats=False))  # noqa: E731
    assert passes(batch) == [8, 8, 8], "the batch's own statistics"


@given(a=st.floats(-3, 3), lam=st.floats(0.05, 1))
def test_one_logit_has_the_textbook_slope(a: float, lam: float) -> None:
    """Logits (z, 0) with z = lam a: dH/dlam = -a z s(z) s(-z), so entropy falls wherever a and z are not 0."""
    module = nn.Linear(1, 1, bias=False).double()
    base, expert = {"weight": torch.zeros(1, 1, dtype=WIDE)}, {"weight": torch.full((1, 1), a, dtype=WIDE)}
    network = Network(module, outputs=lambda m, x: torch.cat([m(x), torch.zeros_like(x)], 1))
    pool = ExpertPool.of({"t": expert}, base)
    inputs = {"t": Examples(torch.ones(1, 1, dtype=WIDE), name="t")}
    settings = AdaMerging(batch=1)
    combination = Combination.of(pool, network, None, Storage())

    def at(value: float) -> tuple[float, float]:
        combination.write(torch.tensor([[value]], dtype=WIDE))
        losses, slopes = gradient(combination, Objective(inputs, settings, {}), settings, 0, 0)
        return losses["t"], float(slopes)

    z = lam * a
    before, slope = at(lam)
    s = 1 / (1 + math.exp(-z))
    assert slope == pytest.approx(-a * z * s * (1 - s), abs=1e-12)
    if abs(slope) > 1e-6:
        assert at(lam - 1e-4 * math.copysign(1, slope))[0] < before


def test_entropy_is_finite_everywhere() -> None:
    z = torch.tensor([[0.0, 0, 0, 0], [1e4, -1e4, 0, 0], [-1e4, -1e4, -1e4, 1e4]], requires_grad=True)
    found = entropy(z)
    found.sum().backward()
    assert found.tolist() == pytest.approx([math.log(4), 0, 0])
    assert z.grad is not None and z.grad[1:].abs().max() == 0 and bool(z.grad.isfinite().all())


def test_after_the_step_the_clamp_lets_coefficients_come_back() -> None:
    """In the graph, as published, a coefficient that starts outside has no gradient; projected, it is pulled in and moves."""
    case = Case()
    stuck = case.learn(steps=5, lr=0.05, start=-0.2, clamp="graph")
    assert set(stuck.coefficients.values()) == {(0.0, 0.0, 0.0)}
    free = case.learn(steps=5, lr=0.05, start=-0.2, clamp="project")
    assert any(value > 0 for row in free.coefficients.values() for value in row)
    assert all(0 <= value <= 1 for row in free.coefficients.values() for value in row)
    anywhere = case.learn(steps=5, lr=0.5, clamp="none")
    assert any(not 0 <= value <= 1 for row in anywhere.coefficients.values() for value in row)


def test_a_strong_pull_stays_at_the_start() -> None:
    case = Case()
    loose, held = case.learn(steps=20, lr=1e-2), case.learn(steps=20, lr=1e-2, pull=1e4)
    far, near = (max(abs(v - 0.3) for row in x.coefficients.values() for v in row) for x in (loose, held))
    assert near < far / 3  # Adam's first step goes its whole length whatever the size of the gradient


def test_a_step_on_some_tasks_is_right_on_average() -> None:
    case = Case()
    factors = random_factors(case)
    chosen = AdaMerging(batch=40, tasks_per_step=2)  # the whole stream, so that only the choice of tasks is random
    inputs = {task: Examples(x, name=task) for task, x in case.inputs.items()}
    combination = Combination.of(case.pool, case.network, None, Storage())
    total = torch.zeros_like(factors)
    seen = set()
    for step in range(60):
        combination.write(factors)
        losses, slopes = gradient(combination, Objective(inputs, chosen, {}), chosen, step, 0)
        seen.add(frozenset(losses))
        total += slopes / 60
    assert len(seen) == 3 and all(len(tasks) == 2 for tasks in seen)
    combination.write(factors)
    whole = AdaMerging(batch=40)
    wanted = gradient(combination, Objective(inputs, whole, {}), whole, 0, 0)[1]
    # every task is drawn in two steps of three; its share of 60 draws has a standard deviation of 9 %
    assert float((total - wanted).norm() / wanted.norm()) < 0.4


def test_tensors_are_grouped_as_asked() -> None:
    names = ["embed.weight", "layers.0.mlp.weight", "layers.0.mlp.bias", "layers.1.mlp.weight", "norm.weight"]
    count = {kind: len(grouped(names, kind, {})[1]) for kind in ("task", "tensor", "module", "block")}
    assert count == {"task": 1, "tensor": 5, "module": 4, "block": 4}
    own = grouped(names, "tensor", {r"layers\.\d+\..*weight": "matrices", "norm.weight": "rest"})
    assert own == ([0, 1, 2, 1, 3], ["embed.weight", "matrices", "layers.0.mlp.bias", "rest"])


def test_groups_share_their_coefficients() -> None:
    case = Case()
    learned = case.learn(steps=4, lr=0.1, granularity="module")
    assert learned.coefficients["0.weight"] == learned.coefficients["0.bias"]
    assert learned.coefficients["0.weight"] != learned.coefficients["3.weight"]
    assert len(set(case.learn(steps=4, lr=0.1, granularity="task").coefficients.values())) == 1
    named = case.learn(steps=4, lr=0.1, granularity="task", groups={"3.weight": "last"})
    assert named.facts["groups"] == 2 and named.coefficients["3.weight"] != named.coefficients["3.bias"]


def test_what_gets_no_gradient_stays_and_is_told() -> None:
    case = Case()
    case.network = Network(
        case.network.module, case.network.heads, outputs=lambda m, x: nn.functional.pad(m[0](x), (0, 0))[:, :6]
    )
    learned = case.learn(steps=3, lr=0.1)
    assert learned.facts["no gradient"] == ["1.bias", "1.weight", "3.bias", "3.weight"]
    assert learned.coefficients["3.weight"] == (0.3, 0.3, 0.3) != learned.coefficients["0.weight"]


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_where_the_stack_lies_changes_nothing(place: str, tmp_path: Path) -> None:
    case = Case()
    here, there = case.learn(steps=3, lr=0.1), case.learn(steps=3, lr=0.1, stack_place=place)
    assert here.coefficients == there.coefficients


def test_a_bfloat16_stack_is_close() -> None:
    case = Case(dtype=torch.float32)
    wide, narrow = case.learn(steps=3, lr=1e-3), case.learn(steps=3, lr=1e-3, stack_dtype="bfloat16")
    for name, tensor in wide.weights.items():
        # three changes of about 0.3 * 0.3, each off by 2^-9 at most
        torch.testing.assert_close(narrow.weights[name], tensor, rtol=0, atol=4 * 0.3 * 3 * 2**-9)


def test_no_graph_goes_through_the_models() -> None:
    """What a step saves for its backward passes grows with the tasks' inputs, not with the stack of task vectors."""

    def saved(count: int) -> float:
        case, total = Case(), 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal total
            total += tensor.nbytes
            return tensor

        experts = {f"{k}": case.experts["a"] for k in range(count)}
        network = Network(case.network.module, dict.fromkeys(experts, case.network.heads["a"]))
        chosen = AdaMerging(batch=8, micro_batch=8)  # tasks one by one
        inputs = {task: Examples(case.inputs["a"], name=task) for task in experts}
        made = Combination.of(ExpertPool.of(experts, case.base), network, None, Storage())
        made.write(torch.full((len(made.names), count), 0.3, dtype=WIDE))
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            gradient(made, Objective(inputs, chosen, {}), chosen, 0, 0)
        return total / count

    assert saved(2) == saved(9)


def test_threads_change_nothing() -> None:
    module = nn.Linear(1100, 1000)  # large enough to be shared out
    base = {name: tensor.detach().clone() for name, tensor in module.named_parameters()}
    draws = torch.Generator().manual_seed(0)
    experts = {t: {n: x + torch.randn(x.shape, generator=draws) for n, x in base.items()} for t in TASKS}
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            made = Combination.of(ExpertPool.of(experts, base), Network(module), None, Storage())
            made.write(torch.tensor([[0.1, 0.2, 0.3], [0.3, 0.0, 0.1]], dtype=WIDE))
            weights = made.weights()
            for piece in made.pieces:
                piece.target.grad = weights[piece.name].clone()
            found.append((weights, made.projected()))
    finally:
        torch.set_num_threads(before)
    (one, first), (two, second) = found
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items()) and torch.equal(first, second)
    factors = dict(zip(made.names, ([0.1, 0.2, 0.3], [0.3, 0.0, 0.1]), strict=True))["weight"]
    wanted = base["weight"] + sum(
        c * (experts[t]["weight"] - base["weight"]) for c, t in zip(factors, TASKS, strict=True)
    )
    torch.testing.assert_close(one["weight"], wanted, rtol=1e-5, atol=1e-5)  # three fp32 products
    inner = (wanted.double() * (experts["a"]["weight"] - base["weight"]).double()).sum()
    place = made.names.index("weight")
    assert float(first[place, 0]) == pytest.approx(float(inner), rel=1e-4)  # fp32 sums of 131,072 numbers, then fp64


def test_nothing_given_is_changed() -> None:
    case = Case()
    before = {n: t.clone() for n, t in case.network.module.state_dict().items()}
    base = {n: t.clone() for n, t in case.base.items()}
    flags = [p.requires_grad for p in case.network.module.parameters()]
    case.learn(steps=2)
    assert all(torch.equal(before[n], t) for n, t in case.network.module.state_dict().items())
    assert all(torch.equal(base[n], t) for n, t in case.base.items())
    assert flags == [p.requires_grad for p in case.network.module.parameters()]
    assert all(p.grad is None for p in case.network.module.parameters())


def test_the_base_is_read_where_it_lies_and_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case()
    base = dict(case.network.module.named_parameters())  # the given module's own memory
    before = {name: tensor.detach().clone() for name, tensor in base.items()}
    pool = ExpertPool.of({task: case.experts[task] for task in TASKS}, base)
    made = Combination.of(pool, case.network, None, Storage())
    for piece in made.pieces:
        assert piece.base.data_ptr() == base[piece.name].data_ptr() != piece.target.data_ptr()
    adamerging(pool, case.network, case.inputs, AdaMerging(steps=3, lr=0.1, batch=8))
    assert all(torch.equal(before[name], tensor) for name, tensor in base.items())
    narrow = ExpertPool.of({"a": case.experts["a"]}, {name: tensor.float() for name, tensor in base.items()})
    torch.save(before, tmp_path / "base.bin")
    mapped = ExpertPool.of({"a": case.experts["a"]}, tmp_path / "base.bin")
    for other in (narrow, mapped):  # another type; a file that could be cut
        with other.opened():
            pieces = Combination.of(other, case.network, None, Storage()).pieces
            planes = {piece.name: other.models[0].weights.plane(piece.name, "base") for piece in pieces}
        assert all(piece.base.data_ptr() != planes[piece.name].flat.data_ptr() for piece in pieces)
    monkeypatch.setattr("spolia.parts.combination.copy.deepcopy", lambda module: module)
    shared = Combination.of(pool, case.network, None, Storage())  # a module that refuses to be copied
    assert all(piece.base.data_ptr() != piece.target.data_ptr() for piece in shared.pieces)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda c: c.inputs.pop("b"), "nothing for b"),
        (lambda c: c.inputs.update(d=c.inputs["a"]), "d is no expert's task"),
        (lambda c: c.inputs.update(b=torch.zeros(3, 9, dtype=WIDE)), "unlabelled.b: the network fails"),
        (lambda c: setattr(c, "network", Network(c.network.module, {"a": c.network.heads["a"]})), "no head for b, c"),
        (lambda c: setattr(c, "network", Network(conv().double())), "the module lacks tensor"),
        (
            lambda c: setattr(c, "network", Network(c.network.module, outputs=lambda m, x: m(x).sum(1))),
            "not \\[1, classes\\]",
        ),
    ],
)
def test_what_does_not_fit_is_told_before_any_step(change: Callable[[Case], Any], word: str) -> None:
    case = Case()
    change(case)
    with pytest.raises(SpoliaError, match=word):
        adamerging(case.pool, case.network, case.inputs, AdaMerging(steps=1))


def test_labels_are_asked_for_where_they_are_needed() -> None:
    case = Case()
    for settings in ({"objective": "labels"}, {"guard": "accuracy", "held_out": 0.5}):
        with pytest.raises(SpoliaError, match="no labels are given"):
            case.learn(steps=1, **settings)
    wrong = {t: Examples(x, torch.full((40,), 7), name=t) for t, x in case.inputs.items()}
    with pytest.raises(SpoliaError, match="label 7, but 3 classes"):
        adamerging(case.pool, case.network, wrong, AdaMerging(steps=1, objective="labels"))


def test_the_call_says_what_is_missing() -> None:
    case = Case()
    with pytest.raises(SpoliaError, match="there is no network"):
        spolia.merge(case.experts, base=case.base, method="adamerging", unlabelled=case.inputs)
    with pytest.raises(SpoliaError, match="unlabelled inputs of every task"):
        spolia.merge(case.experts, base=case.base, method="adamerging", network=case.network)
    with pytest.raises(SpoliaError, match="looks at weights alone"):
        spolia.merge(case.experts, base=case.base, method="ties", unlabelled=case.inputs)
    with pytest.raises(SpoliaError, match="did you mean `granularity`"):
        spolia.merge(
            case.experts, base=case.base, method="adamerging", network=case.network, unlabelled=case.inputs,
            settings={"granularty": "task"},
        )  # fmt: skip


def test_a_guard_by_divergence_sees_how_sure_answers_are() -> None:
    """Logits lambda W x of one expert: entropy drives lambda past 1, which changes no answer. KL is 0 at 1 and grows."""
    draws = torch.Generator().manual_seed(0)
    module = nn.Linear(4, 5, bias=False).double()
    vector = torch.randn(5, 4, dtype=WIDE, generator=draws)
    pool = ExpertPool.of({"a": {"weight": vector}}, {"weight": torch.zeros_like(vector)})
    tokens = torch.randn(40, 3, 4, dtype=WIDE, generator=draws)  # [inputs, tokens, width]
    found = {}
    for guard in ("agreement", "divergence"):
        settings = AdaMerging(start=0.5, lr=0.05, steps=30, check_every=1, clamp="none", guard=guard)
        found[guard] = adamerging(pool, Network(module), {"a": tokens}, settings)
    sure, like = (found[guard].coefficients["weight"][0] for guard in ("agreement", "divergence"))
    assert sure > 1.5 and like == pytest.approx(1, abs=0.05)  # steps of at most about lr
    facts = found["divergence"].facts
    assert "divergence" not in found["agreement"].facts["kept"] and facts["kept"]["agreement"] == 1.0
    assert facts["kept"]["divergence"] == min(look["divergence"] for look in facts["history"])
    at_start = nn.functional.kl_div(
        (0.5 * tokens @ vector.t()).log_softmax(-1), (tokens @ vector.t()).softmax(-1), reduction="none"
    ).sum(-1)
    places = Examples(tokens, name="a").split(0.2, 0)[1].batch(range(8))
    same = torch.stack([(tokens == x).flatten(1).all(1) for x in places]).any(0)
    # logits are kept and compared in fp32
    assert facts["start"]["divergence"] == pytest.approx(float(at_start[same].mean()), rel=1e-5)
    assert any("KL from the experts grew" in said for said in facts["warnings"])


class Tied(nn.Module):
    """Words whose embedding is the output head too: [batch] -> [batch, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 7, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x).tanh())


@pytest.mark.parametrize("stored", ["tied", "twice", "under one name"])
def test_tied_tensors_are_one(stored: str) -> None:
    """Both uses send their gradient to one coefficient, however the experts' files hold the tensor."""

    def state(weight: Tensor) -> State:
        alias = {"head.weight": weight.clone() if stored == "twice" else weight}
        return {"embed.weight": weight} | (alias if stored != "under one name" else {})

    module = Tied().double()
    start = module.embed.weight.detach().clone()
    vector = torch.randn(7, 5, dtype=WIDE, generator=torch.Generator().manual_seed(0))
    pool, x = ExpertPool.of({"t": state(start + vector)}, state(start)), torch.arange(7)
    made = Combination.of(pool, Network(module), None, Storage())
    assert made.names == ["embed.weight"]
    made.write(torch.full((1, 1), 0.4, dtype=WIDE))
    settings = AdaMerging(batch=7)
    slope = gradient(made, Objective({"t": Examples(x, name="t")}, settings, {}), settings, 0, 0)[1]
    lam = torch.tensor(0.4, dtype=WIDE, requires_grad=True)
    weight = start + lam * vector
    mean_entropy(nn.functional.embedding(x, weight).tanh() @ weight.t()).backward()
    assert float(slope) == pytest.approx(float(lam.grad), rel=1e-10)  # type: ignore[arg-type]
    merged = made.weights()
    assert merged.keys() == state(start).keys()
    assert stored == "under one name" or merged["head.weight"] is merged["embed.weight"]
