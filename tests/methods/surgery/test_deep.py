"""Deep surgery: its sites, its gradients, its closed form in one sweep or many, and what it shares with surgery."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from spolia.core.journal import Interrupted, Journal
from spolia.methods.surgery.deep import Deep, deep
from spolia.methods.surgery.surgery import Surgery, surgery
from spolia.parts.bottleneck import Bottleneck
from spolia.parts.examples import Examples
from spolia.parts.surgered import SurgeredModel

FAST = Deep(steps=6, rank=3)


def parameters(model: SurgeredModel, task: str) -> list[Tensor]:
    return [p.clone() for bottleneck in model.adapters.of(task) for p in bottleneck.parameters()]


def same(one: SurgeredModel, two: SurgeredModel, task: str) -> bool:
    return all(torch.equal(p, q) for p, q in zip(parameters(one, task), parameters(two, task), strict=True))


def test_with_the_last_site_alone_it_is_surgery(make_problem) -> None:
    problem = make_problem("ab")
    for solver in ("adam_l1", "closed_form"):
        one = deep(*problem, Deep(sites="last", steps=20, rank=4, solver=solver))
        two = surgery(*problem, Surgery(steps=20, rank=4, solver=solver))
        for task in "ab":
            for found, expected in zip(parameters(one, task), parameters(two, task), strict=True):
                # sums in another order; Adam divides by them: a tenth of a step at most
                torch.testing.assert_close(found, expected, rtol=0, atol=3e-4)


def test_end_to_end_is_the_papers_loop(make_problem) -> None:
    """Against the loop written out for this network: block by block, every bottleneck in one graph."""
    problem, settings = make_problem("a", count=30), Deep(steps=10, rank=3, batch=8)
    model = deep(*replace(problem, merged={n: t * 1.1 for n, t in problem.merged.items()}), settings, seed=2)
    merged = problem.network.loaded({n: t * 1.1 for n, t in problem.merged.items()})
    expert = problem.network.loaded(problem.pool.experts[0].weights.tensors)
    own = [Bottleneck.drawn(8, 3, 2, "a", name) for name in ("blocks.0", "blocks.1", "features")]
    optimizer = torch.optim.Adam([p for b in own for p in b.parameters()], lr=settings.lr)

    def block(module, i: int, x: Tensor) -> Tensor:
        return x + torch.nn.functional.gelu(module.norms[i](module.layers[i](x)))

    examples = Examples(problem.unlabelled["a"], name="a")
    for step in range(settings.steps):
        x = y = examples.draw(8, 2, step)
        loss = torch.zeros(())
        for i in range(2):
            x, y = own[i](block(merged, i, x)), block(expert, i, y)
            loss = loss + (x - y).abs().mean()
        loss = loss + (own[2](x) - y).abs().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    expected = [p for b in own for p in b.parameters()]
    for found, wanted in zip(parameters(model, "a"), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0.1 * settings.lr)  # sums in another order, as above
    assert all(p.grad is None for p in model.body.parameters()), "frozen weights take part in no gradient"


def test_local_gradients_do_not_cross_a_block(make_problem) -> None:
    """The first block's bottleneck is the same whether or not later ones are fitted with it."""
    problem = make_problem("a", count=30, spread=0.3)
    problem = replace(problem, merged={n: t * 1.1 for n, t in problem.merged.items()})
    local = Deep(steps=8, rank=3, gradients="local")
    whole = deep(*problem, local)
    first = deep(*problem, local.model_copy(update={"sites": r"blocks\.0"}))
    assert [s.label for s in first.adapters.sites] == ["blocks.0", "features"]
    for found, expected in zip(
        whole.adapters.of("a")[0].parameters(), first.adapters.of("a")[0].parameters(), strict=True
    ):
        assert torch.equal(found, expected)
    end = deep(*problem, Deep(steps=8, rank=3))
    assert not torch.equal(end.adapters.of("a")[0].up, whole.adapters.of("a")[0].up)


def test_no_task_moves_another(make_problem) -> None:
    whole, alone = deep(*make_problem("abc"), FAST), deep(*make_problem("abc", only="b"), FAST)
    assert same(whole, alone, "b")
    x = make_problem("abc").unlabelled["b"]
    assert torch.equal(whole(x, "b"), alone(x, "b"))


def test_where_the_merge_is_the_expert_nothing_moves(make_problem) -> None:
    problem = make_problem("ab", spread=0.0)
    model = deep(*problem, FAST)
    assert not any(bottleneck.up.any() for bottleneck in model.adapters.of("a"))
    x = problem.unlabelled["a"]
    assert torch.equal(model(x, "a"), problem.network.logits("a", x, problem.merged))


@pytest.mark.parametrize("share", ["task", "one"])
def test_many_portions_give_the_closed_form_of_one(make_problem, share) -> None:
    problem = make_problem("ab", count=64)
    settings = Deep(solver="closed_form", rank=4, share=share)
    whole = deep(*problem, settings.model_copy(update={"chunk": 64 if share == "task" else 32}))
    parts = deep(*problem, settings.model_copy(update={"chunk": 7}))
    for task in "ab":
        x = problem.unlabelled[task]
        # fp64 sums in another order, of fp32 states that differ by a rounding
        torch.testing.assert_close(parts(x, task), whole(x, task), rtol=1e-3, atol=1e-4)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("solver", ["closed_form", "adam_l1", "closed_form_then_adam"])
def test_every_site_comes_nearer_to_the_expert(make_problem, solver) -> None:
    problem = make_problem("ab", count=200)
    facts = deep(*problem, Deep(solver=solver, steps=200, rank=8)).facts
    for task in "ab":
        assert [row["site"] for row in facts["bias"][task]] == ["blocks.0", "blocks.1", "features"]
        assert all(row["after"] < 0.9 * row["before"] for row in facts["bias"][task])


def test_parameters_are_those_of_the_papers_formula(make_problem) -> None:
    facts = deep(*make_problem("ab"), Deep(steps=1, rank=5)).facts
    width, depth, tasks, rank = 8, 2, 2, 5
    assert facts["parameters"] == tasks * (2 * width * rank * depth + 2 * width * rank)


def test_the_papers_budgets() -> None:
    """2 d r a task for surgery, 2 D r L + 2 d r for deep surgery: equal on purpose."""

    def count(widths: list[int], rank: int) -> int:
        return sum(p.numel() for width in widths for p in Bottleneck(width, rank).parameters())

    assert count([512], 16) == 16_384
    assert count([512], 304) == count([768] * 12 + [512], 16) == 311_296
    assert count([768], 132) == count([1024] * 24 + [768], 4) == 202_752


@pytest.mark.parametrize("stop_in", ["deep a", "deep b"])
def test_a_stopped_fit_goes_on_to_the_same_bits(make_problem, tmp_path, stop_in) -> None:
    problem = make_problem("ab")
    whole = deep(*problem, FAST)

    class Stopping(Journal):
        def log(self, **numbers):
            if self.current == stop_in:
                self.request_stop()

    with pytest.raises(Interrupted):
        deep(*problem, FAST, Stopping(tmp_path, save_every=0))
    again = deep(*problem, FAST, Journal(tmp_path, save_every=0))
    assert same(whole, again, "a") and same(whole, again, "b")
    assert whole.facts["losses"] == again.facts["losses"]


def test_one_set_for_all_tasks_and_streams(make_problem) -> None:
    problem = make_problem("ab", count=20)
    model = deep(*problem, Deep(share="one", steps=5, rank=3))
    x = problem.unlabelled["a"]
    assert torch.equal(model.features(x), model.features(x, "b"))
    told: list[float] = []

    def watch(task: str, share: float, seen: SurgeredModel) -> dict[str, float]:
        told.append(share)
        return {}

    stream = deep(*problem, Deep(online=True, batch=1, rank=3), watch=watch)
    assert len(told) == 2 * 11
    assert [look["share"] for look in stream.facts["stream"]["b"]] == told[:11]
    assert stream.adapters.of("b")[0].up.any()
