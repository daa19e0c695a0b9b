"""apis: its gradient in the limits, its count of queries, resuming to the bit, and what each part is for on digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia.bench.continual import Protocol, run
from spolia.core import kept
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.continual.apis import Apis, ApisLearner, queries
from spolia.methods.continual.apis_queries import Inventing, slope
from spolia.methods.continual.apis_router import Router
from spolia.methods.continual.apis_terms import gap, stacked, worth
from spolia.parts.api import Answers, Api, Budget, BudgetSpent, Contract
from spolia.parts.api_stream import api_stream
from spolia.zoo.questions import FlatQuestions, ImageQuestions, coloured, inked

SIZE, LATENT = 6, 4
SMALL: dict[str, Any] = {"batch": 8, "directions": 3, "model_steps": 2, "stored": 20, "replay": 8}


def expert(seed: int, classes: int = 2) -> Callable[[Tensor], Tensor]:
    """Logits that are a smooth function of the inputs."""
    weight = torch.randn(SIZE, classes, generator=torch.Generator().manual_seed(seed))
    return lambda x: 2 * torch.tanh(x @ weight.to(x))


def an_api(seed: int, names: tuple[str, ...], kind: str = "probabilities", **more) -> Api:
    own = expert(seed, len(names))
    how = {"resolution": more.pop("resolution", 0.0)}
    made = {"probabilities": lambda x: own(x).softmax(1), "label": lambda x: own(x).argmax(1), "logits": own}[kind]
    if how["resolution"]:
        made = lambda x, exact=made: (exact(x) / 0.01).round() * 0.01  # noqa: E731
    return Api.calling(made, Contract(names, (SIZE,), kind, **how), name="".join(names), **more)


def model(classes: int, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(SIZE, 12), nn.ReLU(), nn.Linear(12, classes))


def inventing() -> Inventing:
    return Inventing(lambda draws: FlatQuestions((SIZE,), LATENT, 8, generator=draws), LATENT, torch.sigmoid)


def a_stream(*apis: Api, rounds: int = 3, few: int = 0):
    draws = torch.Generator().manual_seed(1)
    tests, ids, names = [], [], dict[str, int]()
    for api in apis:
        ids.append([names.setdefault(name, len(names)) for name in api.classes])
        x = torch.rand(10, SIZE, generator=draws)
        tests.append((x, torch.tensor(ids[-1])[api(x).labels]))
    real = {t: (x[:few], y[:few]) for t, (x, y) in enumerate(tests)} if few else None
    return api_stream(apis, tests, rounds, few=real)


def two_apis(**more) -> list[Api]:
    return [an_api(1, ("a", "b"), **more), an_api(2, ("c", "d", "e"), **more)]


def learner(stream, seed: int = 0, **settings) -> ApisLearner:
    return ApisLearner(
        model(stream.classes), Apis(**(SMALL | settings)), stream=stream, inventing=inventing(), seed=seed
    )


# --- the gradient ----------------------------------------------------------------------------------------------------


def pieces(seed: int = 0) -> tuple[Tensor, Tensor, nn.Module]:
    torch.manual_seed(seed)
    z, maker = torch.randn(16, LATENT).double(), nn.Linear(LATENT, SIZE).double().requires_grad_(False)
    return maker(z), z, maker


def answers(logits: Tensor) -> Answers:
    log_p = logits.double().log_softmax(1)
    return Answers(log_p.argmax(1), log_p)


def sloped(ours: Any, theirs: Any, seed: int = 0, **settings) -> tuple[Tensor, Tensor]:
    """The estimate, and the true gradient of the mean worth's terms, which knows the API's inside."""
    v, z, maker = pieces()
    own = Apis(**({"directions": 4} | settings))
    found = slope(
        v.clone(), z, maker, torch.sigmoid, ours, lambda x: answers(theirs(x)), own, own.radius, generator(seed)
    )
    v.requires_grad_()
    x = torch.sigmoid(v)
    told = answers(theirs(x))
    mean = told.log_p.exp().mean(0).detach()
    (truth,) = torch.autograd.grad(worth(own.gap, ours(x), told, mean, own.balance).sum(), v)
    return found, truth


def test_where_the_api_is_constant_the_split_gradient_is_exact() -> None:
    constant = lambda x: torch.tensor([[1.0, -1.0]]).expand(len(x), 2)  # noqa: E731
    found, truth = sloped(expert(1), constant, gap="kl")
    torch.testing.assert_close(found, truth, rtol=1e-5, atol=1e-7)  # autograd in fp32 both times


def test_where_our_model_is_constant_split_is_plain() -> None:
    flat = lambda x: torch.tensor([[0.3, -0.2]]) + 0 * x[:, :2]  # noqa: E731
    split, _ = sloped(flat, expert(2), estimator="split")
    plain, _ = sloped(flat, expert(2), estimator="plain")
    torch.testing.assert_close(split, plain, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("how", [{}, {"estimator": "plain"}, {"antithetic": True}])
def test_all_directions_give_the_true_gradient(how: dict) -> None:
    found, truth = sloped(expert(1), expert(2), directions=SIZE, kind="orthogonal", gap="kl", radius=1e-4, **how)
    apart = float((found - truth).norm() / truth.norm())
    assert apart < 0.02  # radius times curvature, and inputs in fp32 moved by 1e-4


def test_in_generator_space_the_generators_step_is_the_true_one() -> None:
    """A linear generator of 4 numbers: along 4 directions of these the gradient by its noise is exact."""
    found, truth = sloped(
        expert(1), expert(2), directions=LATENT, space="generator", gap="kl", estimator="plain", radius=1e-4
    )
    _, _, maker = pieces()
    reached, wanted = found @ maker.weight, truth @ maker.weight
    assert float((reached - wanted).norm() / wanted.norm()) < 0.05


@pytest.mark.parametrize("q", [8, 1])
@pytest.mark.sampled(2)
def test_split_errs_less_than_plain_at_equal_queries(q: int) -> None:
    """Mean cosine over 16 samples and 25 draws of directions: split wins by more than four standard errors."""
    gains = []
    for seed in range(25):
        cosines = []
        for estimator in ("split", "plain"):
            found, truth = sloped(expert(1), expert(2), seed, directions=q, estimator=estimator, gap="l1")
            cosines.append(torch.nn.functional.cosine_similarity(found, truth, dim=1).mean())
        gains.append(float(cosines[0] - cosines[1]))
    mean = sum(gains) / len(gains)
    error = (sum((g - mean) ** 2 for g in gains) / (len(gains) - 1) / len(gains)) ** 0.5
    assert mean > 4 * error


# --- its terms -------------------------------------------------------------------------------------------------------


def test_the_recovered_gap_is_that_of_logits() -> None:
    """Log-probabilities less their mean are logits less their mean: probabilities hide nothing but a constant."""
    a, b = torch.randn(5, 3).double(), torch.randn(5, 3).double()
    centred = (a - a.mean(1, keepdim=True) - b + b.mean(1, keepdim=True)).abs().mean(1)
    torch.testing.assert_close(gap("recovered", a, b.log_softmax(1), None), centred)
    torch.testing.assert_close(gap("recovered", a, a.log_softmax(1), None), torch.zeros(5).double(), atol=1e-12, rtol=0)


def test_gaps_are_zero_at_agreement_and_take_more_axes() -> None:
    a = torch.randn(4, 3).double()
    for kind in ("recovered", "l1", "kl"):
        assert float(gap(kind, a, a.log_softmax(1), None).abs().max()) < 1e-12
    told = answers(torch.randn(8, 3))
    more = stacked(told, 2, 4)
    found = worth("l1", a, more, torch.ones(3).double() / 3, 1.0)
    assert found.shape == (2, 4)
    torch.testing.assert_close(found[1], worth("l1", a, answers(told.log_p[4:]), torch.ones(3).double() / 3, 1.0))
    labels = gap("l1", a, more.log_p, more.labels)
    torch.testing.assert_close(labels[0], nn.functional.cross_entropy(a, more.labels[0], reduction="none"))


def test_generators_make_batches_of_mean_nothing_and_deviation_one() -> None:
    draws = torch.Generator().manual_seed(0)
    flat = FlatQuestions((1, 4, 4), 8, 16, generator=draws)
    v = flat(torch.randn(64, 8, generator=draws)).detach()
    assert v.shape == (64, 1, 4, 4)
    torch.testing.assert_close(v.mean(0), torch.zeros(1, 4, 4), atol=1e-4, rtol=0)
    images = ImageQuestions(3, 16, 8, 8, generator=draws)(torch.randn(32, 8, generator=draws))
    assert images.shape == (32, 3, 16, 16)
    torch.testing.assert_close(images.var((0, 2, 3), correction=0), torch.ones(3), atol=1e-2, rtol=0)  # its epsilon
    for act in (inked, coloured):
        assert 0 <= float(act(v).min()) < float(act(v).max()) <= 1


# --- queries ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"generators": 1},
        {"antithetic": True},
        {"estimator": "plain", "directions": 1},
        {"generator_steps": 0},
        {"generator_steps": 2, "model_steps": 1},
        {"space": "generator"},
        {"kind": "orthogonal"},
    ],
)
def test_the_meter_is_the_formula(how: dict) -> None:
    api = an_api(1, ("a", "b"))
    stream = a_stream(api, few=3)
    before = api.spent.items
    made = learner(stream, **how)
    each, once = queries(made.settings, real=3)
    made.begin(stream.experiences[0])
    assert api.spent.items - before == once == 3
    for step in range(2):
        made.observe(stream.experiences[0].draw(4, 0, step))
        assert api.spent.items - before == once + (step + 1) * each
    assert made.asked == {"ab": api.spent.items - before}


def test_a_budget_stops_it_before_the_item_that_is_not_paid() -> None:
    each, _ = queries(Apis(**SMALL))
    api = an_api(1, ("a", "b"), budget=Budget(items=10 + 2 * each + 5))  # ten made the test's labels
    stream = a_stream(api)
    made = learner(stream)
    made.begin(stream.experiences[0])
    for _ in range(2):
        made.observe(stream.experiences[0].draw(4, 0, 0))
    with pytest.raises(BudgetSpent):
        made.observe(stream.experiences[0].draw(4, 0, 0))
    assert api.spent.items <= 10 + 2 * each + 5


def test_rounded_answers_get_a_radius_that_shows() -> None:
    stream = a_stream(an_api(1, ("a", "b"), resolution=0.01))
    made = learner(stream)
    made.begin(stream.experiences[0])
    assert made.at["radius"] > made.settings.radius
    made.observe(stream.experiences[0].draw(4, 0, 0))


# --- a run -----------------------------------------------------------------------------------------------------------


def state_of(made: ApisLearner) -> dict[str, Any]:
    tensors: dict[str, Tensor] = {}
    text = kept.encode(made.state_dict(), tensors)
    return {"text": text, "tensors": tensors}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    if one["text"] != other["text"] or one["tensors"].keys() != other["tensors"].keys():
        return False
    return all(torch.equal(t, other["tensors"][name]) for name, t in one["tensors"].items())


@pytest.mark.parametrize("kind", ["probabilities", "label"])
@pytest.mark.parametrize("few", [4, 0])
@pytest.mark.slow
def test_killed_after_any_round_it_ends_with_the_same_bits(tmp_path, kind: str, few: int) -> None:
    def lead(folder, stop: int | None) -> ApisLearner:
        from spolia.core.journal import Interrupted, Journal

        stream = a_stream(*two_apis(kind=kind), few=few)
        made = learner(stream)
        journal = Journal(folder, save_every=0)
        if stop is not None:
            journal._progress = lambda phase, done, n, numbers: journal.request_stop() if done == stop else None
        try:
            run(made, stream, Protocol(batch=4), journal)
        except Interrupted:
            return lead(folder, None)
        return made

    whole = state_of(lead(tmp_path / "whole", None))
    for stop in (1, 5):  # within the first API, within the second
        assert same(whole, state_of(lead(tmp_path / f"stop {stop}", stop)))


def test_unlike_apis_and_class_counts_make_one_stream() -> None:
    apis = [an_api(1, ("a", "b"), "label"), an_api(2, ("c", "d", "e"), "logits"), an_api(3, ("e", "a"))]
    stream = a_stream(*apis, rounds=2)
    assert [e.classes for e in stream.experiences] == [(0, 1), (2, 3, 4), (4, 0)] and stream.classes == 5
    made = learner(stream)
    outcome = run(made, stream, Protocol(batch=4))
    assert len(outcome.matrix) == 3
    assert made.known == [0, 1, 2, 3, 4]
    assert len(made.memory) == 3 * 20 and made.memory.all()["logits"].isfinite().all()
    assert len(made.gaps) == 6


def test_what_is_remembered_has_the_models_logits_of_then_for_classes_of_then() -> None:
    stream = a_stream(*two_apis(), rounds=2)
    made = learner(stream, similarity=0.0)
    first, second = stream.experiences
    made.begin(first)
    made.observe(first.draw(4, 0, 0))
    made.end(first)
    then = {name: t.clone() for name, t in made.memory.all().items()}
    torch.testing.assert_close(then["logits"], made.predict(then["x"]))
    made.begin(second)
    made.observe(second.draw(4, 0, 0))
    made.end(second)
    now = made.memory.all()
    assert torch.equal(now["logits"][:20, :2], then["logits"][:, :2])  # of the first API's classes: as they were
    torch.testing.assert_close(now["logits"][:20, 2:], made.predict(then["x"])[:, 2:])  # of the new ones: of today
    assert set(now["y"][20:].tolist()) <= {2, 3, 4}


def test_without_generator_steps_the_generators_stay() -> None:
    stream = a_stream(an_api(1, ("a", "b")))
    made = learner(stream, generator_steps=0)
    made.begin(stream.experiences[0])
    before = {name: t.clone() for name, t in made.inventors.made.state_dict().items()}
    made.observe(stream.experiences[0].draw(4, 0, 0))
    assert all(torch.equal(t, before[name]) for name, t in made.inventors.made.state_dict().items())


@pytest.mark.slow
def test_one_api_and_many_steps_end_in_agreement() -> None:
    """On the generators' own queries the model says what the API says."""
    api = an_api(1, ("a", "b"))
    stream = a_stream(api, rounds=60)
    made = learner(stream, batch=32, model_steps=5, generator_lr=1e-3, similarity=0.0)
    run(made, stream, Protocol(batch=4))
    x = made.inventors.queries(200, generator(5))
    assert float((made.predict(x).argmax(1) == api(x).labels).double().mean()) > 0.95


def test_the_router_asks_all_and_believes_the_surest() -> None:
    apis = two_apis()
    stream = a_stream(*apis, rounds=1)
    router = Router(stream)
    outcome = run(router, stream, Protocol(batch=4, ahead=False))
    assert outcome.task_matrix[1] == [100.0, 100.0]  # tests are labelled by the APIs themselves
    x = torch.rand(9, SIZE)
    a, c = (api(x).log_p for api in apis)
    torch.testing.assert_close(router.predict(x), torch.cat([a, c], 1))


def test_a_network_without_a_linear_layer_has_no_similarity() -> None:
    stream = a_stream(*two_apis(), rounds=1)
    network = nn.Sequential(nn.Unflatten(1, (1, SIZE)), nn.Conv1d(1, 5, SIZE), nn.Flatten())
    made = ApisLearner(network, Apis(**SMALL), stream=stream, inventing=inventing())
    with pytest.raises(SpoliaError, match="set similarity to 0"):
        run(made, stream, Protocol(batch=4))


# --- digits ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_each_part_is_for_on_digits() -> None:
    """Three APIs, eight rounds, two seeds. Seen, means: Task-IL 77 with replay, 41 without; Class-IL 44, and 55 with five real
    examples a class."""
    pytest.importorskip("sklearn")
    from spolia.catalog import METHODS
    from spolia.runs.apis_entries import Line, learner_of
    from spolia.runs.apis_ground import ground_of
    from spolia.runs.apis_problems import DigitsApis
    from spolia.runs.digits_pool import one_thread
    from spolia.runs.studies import StudyRecipe

    own = Apis()
    lines = {
        "full": (own, 0),
        "no replay": (own.model_copy(update={"old": 0.0, "similarity": 0.0}), 0),
        "few": (own, 5),
    }
    task: dict[str, list[float]] = {name: [] for name in lines}
    classes: dict[str, list[float]] = {name: [] for name in lines}
    with one_thread():
        for seed in (0, 1):
            for name, (settings, few) in lines.items():
                problem = DigitsApis(tasks=[4, 3, 3], budget=8 * queries(own)[0] + 10 * few, few=few)
                recipe = StudyRecipe("t", "", None, METHODS[0], own, problem)  # type: ignore[arg-type]
                ground = ground_of(recipe, seed, Path("unused"))
                made, stream, _ = learner_of(Line(name, settings), recipe, ground, seed)
                numbers = run(made, stream, Protocol(ahead=False), seed=seed).numbers()
                task[name].append(numbers["task average"])
                classes[name].append(numbers["average"])
    assert sum(task["full"]) / 2 >= sum(task["no replay"]) / 2 + 15
    assert sum(classes["full"]) / 2 >= sum(classes["no replay"]) / 2 + 8
    assert sum(classes["few"]) / 2 >= sum(classes["full"]) / 2 + 3
