"""Surgery: what must hold exactly of its bottlenecks, their fit in one product, routing, streams and resuming."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from spolia.core.journal import Interrupted, Journal
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.surgery.fitting import measure_bias
from spolia.methods.surgery.surgery import Surgery, surgery
from spolia.parts.bottleneck import Bottleneck
from spolia.parts.examples import Examples
from spolia.parts.expert import ExpertPool
from spolia.parts.surgered import SurgeredModel

FAST = Surgery(steps=12, rank=4)


def parameters(model: SurgeredModel, task: str) -> list[torch.Tensor]:
    return [p.clone() for bottleneck in model.adapters.of(task) for p in bottleneck.parameters()]


def test_a_new_bottleneck_changes_no_bit_and_only_u_moves_first() -> None:
    bottleneck = Bottleneck.drawn(8, 3, 0, "a")
    z, target = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bottleneck(z), z)
    (bottleneck(z) - target).abs().mean().backward()
    assert not bottleneck.down.grad.any()  # U = 0 stands between V and the loss
    assert bottleneck.up.grad.any()
    assert 0 < bottleneck.down.abs().max() <= 8**-0.5


def test_the_change_is_positively_homogeneous() -> None:
    bottleneck = Bottleneck.drawn(8, 3, 0, "a")
    nn.init.normal_(bottleneck.up, generator=torch.Generator().manual_seed(2))
    z = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    assert torch.equal(bottleneck.change(torch.zeros(1, 8)), torch.zeros(1, 8))
    assert torch.equal(bottleneck.change(4 * z), 4 * bottleneck.change(z))  # a power of two rounds nothing
    # other factors round each of the sums of 8 and of 3 products once more
    torch.testing.assert_close(bottleneck.change(0.3 * z), 0.3 * bottleneck.change(z), rtol=1e-5, atol=1e-6)


def test_feature_maps_are_repaired_channel_by_channel() -> None:
    bottleneck = Bottleneck.drawn(4, 3, 0, "a")
    nn.init.normal_(bottleneck.up, generator=torch.Generator().manual_seed(2))
    maps = torch.randn(2, 4, 5, 6, generator=torch.Generator().manual_seed(1))
    convolved = maps - nn.functional.conv2d(
        torch.relu(nn.functional.conv2d(maps, bottleneck.down[:, :, None, None])), bottleneck.up[:, :, None, None]
    )
    made = bottleneck(maps, 1)
    assert made.is_contiguous()  # what comes next may ask for a view
    torch.testing.assert_close(made, convolved, rtol=1e-5, atol=1e-6)  # sums in another order


def test_where_the_merge_is_the_expert_nothing_moves(make_problem) -> None:
    problem = make_problem("ab", spread=0.0)
    model = surgery(*problem, FAST)
    for task in "ab":
        assert not model.adapters.of(task)[0].up.any()
        assert max(model.facts["losses"][task]) == 0.0
        x = problem.unlabelled[task]
        assert torch.equal(model(x, task), problem.network.logits(task, x, problem.merged))


def test_no_task_moves_another(make_problem) -> None:
    """The others' inputs and experts change; a's bottleneck and outputs keep their bits."""
    problem = make_problem("abc")
    other = {task: x if task == "a" else x.flip(0) * 3 for task, x in problem.unlabelled.items()}
    one, two = surgery(*problem, FAST), surgery(*replace(problem, unlabelled=other), FAST)
    x = problem.unlabelled["a"]
    assert all(torch.equal(p, q) for p, q in zip(parameters(one, "a"), parameters(two, "a"), strict=True))
    assert torch.equal(one(x, "a"), two(x, "a"))
    assert not torch.equal(one.adapters.of("b")[0].up, two.adapters.of("b")[0].up)


def test_one_product_for_all_tasks_equals_an_adam_for_each(make_problem) -> None:
    """Against the plain loop of the paper: one module, one optimizer, one task; the network run anew in every step."""
    problem, settings = make_problem("abc", count=40), Surgery(steps=30, rank=4, batch=8)
    model = surgery(*problem, settings, seed=5)
    network = problem.network
    for expert in problem.pool.experts:
        task = expert.name
        bottleneck = Bottleneck.drawn(8, 4, 5, task, "features")
        optimizer = torch.optim.Adam(bottleneck.parameters(), lr=settings.lr)
        examples = Examples(problem.unlabelled[task], name=task)
        for step in range(settings.steps):
            x = examples.draw(8, 5, step)
            with torch.no_grad():
                ours, theirs = (network.features(x, w) for w in (problem.merged, expert.weights.tensors))
            optimizer.zero_grad(set_to_none=True)
            nn.functional.l1_loss(bottleneck(ours), theirs).backward()
            optimizer.step()
        for found, expected in zip(parameters(model, task), bottleneck.parameters(), strict=True):
            # fp32 sums in another order, and Adam's first steps divide by them: a tenth of one step at most
            torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * settings.lr)


def test_tasks_with_fewer_inputs_than_a_batch_are_not_diluted(make_problem) -> None:
    problem = make_problem("ab", count=40)
    few = {"a": problem.unlabelled["a"], "b": problem.unlabelled["b"][:5]}
    both = surgery(*replace(problem, unlabelled=few), FAST)
    alone = make_problem("ab", count=40, only="b")
    one = surgery(*replace(alone, merged=problem.merged, unlabelled={"b": few["b"]}), FAST)
    for found, expected in zip(parameters(both, "b"), parameters(one, "b"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * FAST.lr)  # sums in another order, as above


@pytest.mark.sampled(3)
@pytest.mark.parametrize("tasks", [2, 4, 8])
def test_one_adam_for_all_tasks_would_move_each_further(tasks: int) -> None:
    """The authors' optimizer: after a task's turn its momentum moves it in the others' turns too, by sqrt(T) in all.

    Gradients are noise of constant size, so Adam walks: T steps of decaying momentum add up to about sqrt(T) of one.
    """

    def moved(shared: bool) -> float:
        draws = torch.Generator().manual_seed(0)
        weights = [nn.Parameter(torch.zeros(2000)) for _ in range(tasks)]
        groups = [weights] if shared else [[w] for w in weights]
        optimizers = [torch.optim.Adam(group, lr=1e-3) for group in groups]
        for _ in range(60):
            for task, weight in enumerate(weights):
                optimizer = optimizers[0 if shared else task]
                optimizer.zero_grad(set_to_none=not shared)
                gradient = torch.randn(2000, generator=draws)
                weight.grad = gradient if weight.grad is None else weight.grad.add_(gradient)
                optimizer.step()
        return float(torch.stack([w.detach() for w in weights]).square().mean().sqrt())

    assert moved(shared=True) / moved(shared=False) == pytest.approx(tasks**0.5, rel=0.15)  # the walk is 60 cycles long


def test_adding_tasks_does_not_change_how_far_one_moves(make_problem) -> None:
    whole = surgery(*make_problem("abcd"), FAST)
    alone = surgery(*make_problem("abcd", only="a"), FAST)
    for found, expected in zip(parameters(whole, "a"), parameters(alone, "a"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * FAST.lr)  # ratio 1, but for the order of sums


def test_the_merge_is_made_once_and_nothing_given_changes(make_problem) -> None:
    problem = make_problem("ab")
    before = {name: tensor.clone() for name, tensor in problem.network.module.state_dict().items()}
    merged = {name: tensor.clone() for name, tensor in problem.merged.items()}
    model = surgery(*problem, FAST)
    assert all(torch.equal(before[n], t) for n, t in problem.network.module.state_dict().items())
    assert all(torch.equal(merged[n], t) for n, t in problem.merged.items())
    weights = {name: tensor.data_ptr() for name, tensor in model.body.state_dict().items()}
    x = problem.unlabelled["a"]
    features = model.network.features(x)
    assert torch.equal(features, problem.network.features(x, problem.merged)), "as merging anew for the step gives"
    model(x, "a")
    assert weights == {name: tensor.data_ptr() for name, tensor in model.body.state_dict().items()}


def test_a_fit_lowers_the_bias_it_reports(make_problem) -> None:
    problem = make_problem("ab", count=200)
    fits = [
        Surgery(steps=300, rank=8),
        Surgery(solver="closed_form"),
        Surgery(solver="closed_form_then_adam", steps=50),
    ]
    for settings in fits:
        model = surgery(*problem, settings)
        measured = measure_bias(model, problem.pool, problem.unlabelled)
        for task in "ab":
            (row,) = model.facts["bias"][task]
            # 200 inputs of 8 numbers leave no doubt; by a fifth is far less than a fit of this size takes away
            assert row["after"] < 0.8 * row["before"]
            for key, value in row.items():
                assert measured[task][0][key] == (pytest.approx(value, rel=1e-4) if key != "site" else value)


def test_the_facts_say_what_was_seen(make_problem) -> None:
    problem = make_problem("ab")
    facts = surgery(*problem, Surgery(steps=2, protocol="transductive"), seed=3).facts
    assert (facts["protocol"], facts["seed"], facts["inputs"]) == ("transductive", 3, {"a": 48, "b": 48})
    assert facts["parameters"] == 2 * 2 * 8 * 16  # tasks, V and U, width, rank


def test_one_bottleneck_for_all_needs_no_task(make_problem) -> None:
    problem = make_problem("ab", count=200)
    for solver in ("adam_l1", "closed_form"):
        model = surgery(*problem, Surgery(steps=200, share="one", solver=solver))
        x = problem.unlabelled["a"]
        assert torch.equal(model.features(x), model.features(x, "a"))
        assert model.facts["parameters"] in (2 * 8 * 16, 2 * 8 * 8 + 8)  # one set; linear: rank 8 and a shift
        with pytest.raises(SpoliaError, match="no task is named"):
            model(x)  # which head?


def test_inputs_are_routed_to_the_nearest_expert(make_problem) -> None:
    problem = make_problem("ab")
    apart = {task: x + (20 if task == "a" else -20) for task, x in problem.unlabelled.items()}
    model = surgery(*replace(problem, unlabelled=apart), FAST)
    for task, x in apart.items():
        assert model.route(x) == [task] * len(x)


def test_a_stream_shows_every_input_once(make_problem) -> None:
    problem, settings = make_problem("ab", count=30), Surgery(online=True, batch=1, rank=4)
    seen: list[tuple[str, float]] = []

    def watch(task: str, share: float, model: SurgeredModel) -> dict[str, float]:
        seen.append((task, share))
        return {"moved": float(model.adapters.of(task)[0].up.abs().max())}

    model = surgery(*problem, settings, seed=1, watch=watch)
    shares = [0.01, *(i / 10 for i in range(1, 11))]
    assert seen == [(task, share) for task in "ab" for share in shares]
    looks = model.facts["stream"]["a"]
    assert [look["share"] for look in looks] == shares
    assert looks[0]["moved"] == pytest.approx(settings.lr, rel=1e-3)  # Adam's first step, from zero
    order = generator(1, "stream", "a").permutation(30)
    bottleneck = Bottleneck.drawn(8, 4, 1, "a", "features")
    optimizer = torch.optim.Adam(bottleneck.parameters(), lr=settings.lr)
    expert = problem.pool.experts[0].weights.tensors
    for place in order:
        x = problem.unlabelled["a"][[int(place)]]
        z, target = (problem.network.features(x, weights).detach() for weights in (problem.merged, expert))
        optimizer.zero_grad()
        nn.functional.l1_loss(bottleneck(z), target).backward()
        optimizer.step()
    for found, expected in zip(parameters(model, "a"), bottleneck.parameters(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.1 * settings.lr)  # sums in another order


@pytest.mark.parametrize("solver", ["adam_l1", "closed_form_then_adam"])
def test_a_stopped_fit_goes_on_to_the_same_bits(make_problem, tmp_path, solver) -> None:
    problem, settings = make_problem("ab"), Surgery(steps=9, rank=4, solver=solver)
    whole = surgery(*problem, settings)

    class Stopping(Journal):
        def log(self, **numbers):
            self.request_stop()  # in the first step

    with pytest.raises(Interrupted):
        surgery(*problem, settings, Stopping(tmp_path, save_every=0))
    again = surgery(*problem, settings, Journal(tmp_path, save_every=0))
    for task in "ab":
        assert all(torch.equal(p, q) for p, q in zip(parameters(whole, task), parameters(again, task), strict=True))
    assert whole.facts["losses"] == again.facts["losses"]


def test_a_closed_form_folds_into_the_head(make_problem) -> None:
    problem = make_problem("ab")
    model = surgery(*problem, Surgery(solver="closed_form", rank=3))
    x = problem.unlabelled["a"]
    folded = model.folded("a")
    plain = model.network.features(x)
    torch.testing.assert_close(folded(plain), model(x, "a"), rtol=1e-4, atol=1e-5)  # products in another order
    with pytest.raises(SpoliaError, match="cannot be folded"):
        surgery(*problem, FAST).folded("a")


def test_mistakes_are_told(make_problem) -> None:
    problem = make_problem("ab")
    with pytest.raises(SpoliaError, match="nothing for b"):
        surgery(*replace(problem, unlabelled={"a": problem.unlabelled["a"]}), FAST)
    with pytest.raises(SpoliaError, match="no head for c"):
        surgery(*replace(problem, pool=ExpertPool.of({"a": problem.merged, "c": problem.merged})), FAST)
    with pytest.raises(SpoliaError, match=r"there is no module `block.1`"):
        surgery(*problem, Surgery(last="block.1"))
    with pytest.raises(SpoliaError, match="the fit of a has diverged"):
        surgery(*problem, Surgery(lr=1e30, steps=20))
    broken = {"a": problem.unlabelled["a"] * float("nan"), "b": problem.unlabelled["b"]}
    with pytest.raises(SpoliaError, match="not finite"):
        surgery(*replace(problem, unlabelled=broken), FAST)
    with pytest.raises(SpoliaError, match="no task `x`"):
        surgery(*problem, FAST)(problem.unlabelled["a"], "x")
