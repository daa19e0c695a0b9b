"""The stopping rule of surgery, and squares in the place of absolute values: against plain loops, and what must not matter."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

import spolia
from spolia.core.journal import Interrupted, Journal
from spolia.errors import SpoliaError
from spolia.methods.surgery.deep import Deep, deep
from spolia.methods.surgery.fitting import measure_bias
from spolia.methods.surgery.stopping import Stopping
from spolia.methods.surgery.surgery import Surgery, surgery
from spolia.parts.bottleneck import Bottleneck
from spolia.parts.examples import Examples
from spolia.parts.surgered import SurgeredModel

METHODS = {"surgery": (surgery, Surgery), "deep": (deep, Deep)}
SHORT = {"steps": 40, "rank": 4, "lr": 0.05, "patience": 1, "check_every": 5, "held_out": 0.3}  # soon past its best


def parameters(model: SurgeredModel, task: str) -> list[Tensor]:
    return [p.clone() for bottleneck in model.adapters.of(task) for p in bottleneck.parameters()]


def same(one: SurgeredModel, two: SurgeredModel, task: str) -> bool:
    return all(torch.equal(p, q) for p, q in zip(parameters(one, task), parameters(two, task), strict=True))


def test_the_best_look_is_kept_and_patience_ends_it() -> None:
    stopping, weight = Stopping(patience=2, every=5), torch.zeros(1)
    for step, distance in enumerate([3.0, 2.0, 2.5, 1.0, 1.5, 1.0, 0.5]):
        stopping.look("a", step, distance, {"w": weight.fill_(distance)})
    assert stopping.told("a") == {"step": 3, "distance": 1.0}, "1.0 again is no smaller, and 0.5 came too late"
    assert float(stopping.best["a"]["weights"]["w"]) == 1.0
    assert stopping.over(["a"]) and not stopping.over(["a", "b"])
    assert [step for step in range(11) if stopping.due(step)] == [0, 5, 10]
    assert not Stopping(None, 5).due(0)


def test_a_distance_that_is_no_number_is_never_better() -> None:
    stopping = Stopping(patience=3, every=1)
    for step, distance in enumerate([2.0, float("nan")]):
        stopping.look("a", step, distance, {})
    assert stopping.told("a")["step"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_what_is_kept_is_the_fit_of_as_many_steps(make_problem, name: str) -> None:
    """A task's weights are those of a run that is told to take just the steps of its best look, on the same inputs."""
    function, kind = METHODS[name]
    problem = make_problem("ab", count=12)
    model = function(*problem, kind(**SHORT))
    assert model.facts["kept apart"] == {"a": 4, "b": 4} and model.facts["inputs"] == {"a": 8, "b": 8}
    rest = {t: Examples(x, name=t).split(0.3, 0)[0] for t, x in problem.unlabelled.items()}
    for task in "ab":
        best = model.facts["stopped"][task]["step"]
        assert best % 5 == 0 and len(model.facts["losses"][task]) <= 40
        if best:
            plain = function(*replace(problem, unlabelled=rest), kind(**SHORT | {"steps": best, "patience": None}))
            assert same(model, plain, task)
        else:
            assert not model.adapters.of(task)[0].up.any()


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("lr", [0.05, 30.0])
def test_inputs_kept_apart_never_end_farther_away(make_problem, name: str, lr: float) -> None:
    function, kind = METHODS[name]
    problem = make_problem("ab", count=12)
    held = {t: Examples(x, name=t).split(0.3, 0)[1] for t, x in problem.unlabelled.items()}
    model = function(*problem, kind(**SHORT | {"lr": lr}))
    for task, rows in measure_bias(model, problem.pool, held).items():
        before, after = (sum(row[when] for row in rows) for when in ("before", "after"))
        assert after <= before * (1 + 1e-6)  # means in another order
        assert model.facts["stopped"][task]["distance"] == pytest.approx(after, rel=1e-5)
        if lr == 30.0:  # every step is far too long
            assert model.facts["stopped"][task]["step"] == 0 and after == before


@pytest.mark.parametrize("name", METHODS)
def test_a_task_stops_by_itself(make_problem, name: str) -> None:
    function, kind = METHODS[name]
    problem = make_problem("abc", count=12)
    other = {t: x if t == "a" else x.flip(0) * 3 for t, x in problem.unlabelled.items()}
    one, two = (function(*replace(problem, unlabelled=x), kind(**SHORT)) for x in (problem.unlabelled, other))
    assert same(one, two, "a")
    assert one.facts["stopped"]["a"] == two.facts["stopped"]["a"]


@pytest.mark.parametrize("name", METHODS)
def test_one_set_for_all_stops_on_all(make_problem, name: str) -> None:
    function, kind = METHODS[name]
    facts = function(*make_problem("ab", count=12), kind(**SHORT, share="one")).facts
    assert facts["stopped"]["a"] == facts["stopped"]["b"]


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_fit_goes_on_to_the_same_bits(make_problem, tmp_path, name: str) -> None:
    function, kind = METHODS[name]
    problem, settings = make_problem("ab", count=12), kind(**SHORT | {"patience": 2})
    whole = function(*problem, settings)

    class Stopping(Journal):
        def steps(self, n, keep=None, *, shared=False):
            for step in super().steps(n, keep):
                if step == 7:
                    self.request_stop()
                yield step

    with pytest.raises(Interrupted):
        function(*problem, settings, Stopping(tmp_path, save_every=0))
    again = function(*problem, settings, Journal(tmp_path, save_every=0))
    done = function(*problem, settings, Journal(tmp_path, save_every=0))  # after the last step
    for task in "ab":
        assert same(whole, again, task) and same(whole, done, task)
    assert whole.facts["stopped"] == again.facts["stopped"] == done.facts["stopped"]
    assert whole.facts["losses"] == again.facts["losses"]


def test_the_closed_form_keeps_nothing_apart_but_before_adam(make_problem) -> None:
    problem = make_problem("ab", count=12)
    plain, told = (surgery(*problem, Surgery(solver="closed_form", patience=p)) for p in (None, 1))
    assert same(plain, told, "a") and "kept apart" not in told.facts
    both = surgery(*problem, Surgery(**SHORT, solver="closed_form_then_adam"))
    rest = {t: Examples(x, name=t).split(0.3, 0)[0] for t, x in problem.unlabelled.items()}
    start = surgery(*replace(problem, unlabelled=rest), Surgery(solver="closed_form", rank=4))
    assert both.facts["inputs"] == {"a": 8, "b": 8}
    for task, told in both.facts["stopped"].items():
        assert told["step"] or same(both, start, task)


def test_squares_are_the_mean_squared_error(make_problem) -> None:
    """Against the plain loop, as for absolute values."""
    problem, settings = make_problem("ab", count=40), Surgery(steps=20, rank=4, batch=8, solver="adam_l2")
    model = surgery(*problem, settings, seed=5)
    last = deep(
        *problem, Deep(sites="last", **settings.model_dump(include={"steps", "rank", "batch", "solver"})), seed=5
    )
    for expert in problem.pool.experts:
        task = expert.name
        bottleneck = Bottleneck.drawn(8, 4, 5, task, "features")
        optimizer = torch.optim.Adam(bottleneck.parameters(), lr=settings.lr)
        for step in range(settings.steps):
            x = Examples(problem.unlabelled[task], name=task).draw(8, 5, step)
            with torch.no_grad():
                ours, theirs = (problem.network.features(x, w) for w in (problem.merged, expert.weights.tensors))  # type: ignore[attr-defined]
            optimizer.zero_grad(set_to_none=True)
            nn.functional.mse_loss(bottleneck(ours), theirs).backward()
            optimizer.step()
        for found in (model, last):
            for got, expected in zip(parameters(found, task), bottleneck.parameters(), strict=True):
                # fp32 sums in another order, and Adam's first steps divide by them: a tenth of one step at most
                torch.testing.assert_close(got, expected, rtol=0, atol=0.1 * settings.lr)


def test_mistakes_are_told(make_problem) -> None:
    problem = make_problem("ab")
    call = {"network": problem.network, "unlabelled": problem.unlabelled}
    experts = {e.name: e.weights.tensors for e in problem.pool.experts}  # type: ignore[attr-defined]
    with pytest.raises(SpoliaError, match="a stream is seen once"):
        spolia.surgery(problem.merged, experts, settings={"online": True, "patience": 2}, **call)
    single = {t: x[:1] for t, x in problem.unlabelled.items()}
    with pytest.raises(SpoliaError, match="one input cannot be parted"):
        surgery(*replace(problem, unlabelled=single), Surgery(**SHORT))
