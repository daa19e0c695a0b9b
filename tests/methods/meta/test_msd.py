from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from torch import nn

from spolia.bench.fewshot import evaluate
from spolia.core.inner import Task
from spolia.core.seeds import generator
from spolia.data.augment import SHAKEN, scenario
from spolia.data.fewshot import digit_classes
from spolia.errors import SpoliaError
from spolia.methods.meta.maml import Maml, maml
from spolia.methods.meta.msd import BASES, Msd, disagreement, meta_loss, msd, viewed, weight_at
from spolia.parts.episode import Episodes, EpisodeSampler

pytestmark = pytest.mark.sampled(3)  # of many cases alike

WAYS = 3
SMALL = {"tasks": 2, "inner_steps": 2, "inner_lr": 0.4, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "pretrain": 0}


def network(dtype: torch.dtype = torch.float64, width: int = 8, ways: int = WAYS, seed: int = 0) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.Tanh(), nn.Linear(width, ways)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return module


class Doubles(EpisodeSampler):
    """Digits in double precision."""

    def draw(self, count: int, step: int) -> Episodes:
        found = super().draw(count, step)
        return replace(found, support_x=found.support_x.double(), query_x=found.query_x.double())


def episodes(seed: int = 0) -> EpisodeSampler:
    return Doubles(digit_classes(), ways=WAYS, shots=2, queries=3, seed=seed)


def logits(views: int = 3, queries: int = 4, classes: int = 5) -> torch.Tensor:
    return torch.from_numpy(generator(0, "logits").standard_normal((views, queries, classes)))


def step_of(settings: Msd, views=None) -> list[torch.Tensor]:
    return list(msd(network(), episodes(), settings, views=views).network.parameters())


def base_step(base: str, **changed) -> list[torch.Tensor]:
    kind = BASES[base]
    method = __import__(f"spolia.methods.meta.{base}", fromlist=[base])
    return list(getattr(method, base)(network(), episodes(), kind(**(SMALL | changed))).network.parameters())


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("count", [1, 3])
def test_equal_views_make_the_base(base, count):
    settings = Msd(base=base, base_settings=SMALL | {"steps": 2}, views=count, parity=False, weight=5.0)
    # one view: the same sums; equal views: their mean in another order
    for mine, theirs in zip(step_of(settings), base_step(base, steps=2), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-9, atol=1e-12)


def test_lambda_zero_is_the_mean_over_views():
    settings = Msd(base_settings=SMALL | {"steps": 1}, weight=0.0, parity=False)
    e = episodes().draw(2, 0)
    made = viewed(SHAKEN.views, e, 2, 0)
    from spolia.core.inner import Inner, InnerLoop

    tasks = [
        Task((x[None], y[None]), (q, z))
        for xs, y, q, z in zip(made, e.support_y, e.query_x, e.query_y, strict=True)
        for x in xs
    ]
    found = InnerLoop(network(), Inner(steps=2, lr=0.4)).gradient(tasks)
    for (name, old), new in zip(network().named_parameters(), step_of(settings, SHAKEN.views), strict=True):
        assert torch.allclose(old - new, found.gradient[name], rtol=1e-9, atol=1e-12)  # order of sums


def test_the_weight_changes_the_gradient():
    by = {
        w: step_of(Msd(base_settings=SMALL | {"steps": 1}, weight=w, parity=False), SHAKEN.views)
        for w in (0.0, 1.0, 2.0)
    }
    for none, one, two in zip(*by.values(), strict=True):
        assert torch.allclose(two - none, 2 * (one - none), rtol=1e-7, atol=1e-10)  # linear in lambda at the first step
        assert not torch.equal(none, one)


@pytest.mark.parametrize("compare", ["prob", "logit", "centred_logit"])
@pytest.mark.parametrize("target", ["mean", "mean_sg", "pairwise"])
@pytest.mark.parametrize("divergence", ["cosine", "kl", "squared"])
def test_equal_answers_do_not_disagree_and_others_do(compare, target, divergence):
    if divergence == "kl" and compare != "prob":
        return
    settings = Msd(compare=compare, target=target, divergence=divergence)
    same = logits(1).expand(4, -1, -1)
    assert disagreement(same, settings) == 0 and disagreement(logits(1), settings) == 0
    found = disagreement(logits().requires_grad_(), settings)
    assert found > 0
    # a mean of three is rounded, so that equal answers may differ from it by one unit
    assert disagreement(logits(1).expand(3, -1, -1), settings) < 1e-12


def test_the_default_is_one_less_the_cosine_of_probabilities_with_their_mean():
    p = logits().softmax(-1)
    cosine = torch.nn.functional.cosine_similarity(p, p.mean(0, keepdim=True), dim=-1).mean()
    assert torch.isclose(disagreement(logits(), Msd()), 1 - cosine)


def test_kl_to_the_mean_is_the_jensen_shannon_divergence():
    p = logits().softmax(-1)
    entropy = lambda q: -(q * q.log()).sum(-1)  # noqa: E731
    wanted = (entropy(p.mean(0)) - entropy(p).mean(0)).mean()
    assert torch.isclose(disagreement(logits(), Msd(divergence="kl")), wanted)


def test_pairs_are_ordered_pairs_of_different_views():
    settings = Msd(target="pairwise")
    p = logits().softmax(-1)
    cosines = [
        torch.nn.functional.cosine_similarity(p[a], p[b], dim=-1).mean() for a in range(3) for b in range(3) if a != b
    ]
    assert torch.isclose(disagreement(logits(), settings), 1 - sum(cosines) / 6)


def test_the_mean_as_a_constant_has_the_same_value_and_another_gradient():
    found = {}
    for target in ("mean", "mean_sg"):
        o = logits().requires_grad_()
        value = disagreement(o, Msd(target=target))
        found[target] = float(value.detach()), torch.autograd.grad(value, o)[0]
    assert found["mean"][0] == found["mean_sg"][0]
    assert not torch.allclose(found["mean"][1], found["mean_sg"][1])


def test_squared_distances_do_not_depend_on_the_size_of_outputs():
    settings = Msd(compare="logit", divergence="squared")
    assert torch.isclose(disagreement(logits(), settings), disagreement(100 * logits(), settings))


def test_the_gradient_is_finite_where_answers_are_sure():
    o = (1000 * logits()).requires_grad_()
    for divergence in ("cosine", "kl", "squared"):
        value = disagreement(o, Msd(divergence=divergence))
        assert torch.autograd.grad(value, o)[0].isfinite().all()


def test_the_loss_adds_up():
    settings, base = Msd(weight=3.0), Maml(temperature=2.0)
    y = torch.tensor([0, 1, 2, 3])
    found = meta_loss(settings, base, 3.0)(logits(), Task((), (None, y)))
    ce = sum(nn.functional.cross_entropy(view / 2, y) for view in logits()) / 3
    assert torch.isclose(found, ce + 3 * disagreement(logits() / 2, settings))


def test_schedules_of_lambda():
    rows = {
        name: [weight_at(Msd(weight=2.0, schedule=name), s, 5) for s in range(5)]
        for name in ("constant", "rise", "fall")
    }
    assert rows == {"constant": [2.0] * 5, "rise": [0, 0.5, 1, 1.5, 2], "fall": [2, 1.5, 1, 0.5, 0]}


def test_parity_divides_the_tasks_by_the_views():
    asked = []

    class Counted(Doubles):
        def draw(self, count, step):
            asked.append(count)
            return super().draw(count, step)

    source = Counted(digit_classes(), ways=WAYS, shots=2, queries=3, seed=0)
    for tasks, views, wanted in ((8, 2, 4), (8, 3, 2), (1, 2, 1)):
        msd(network(), source, Msd(base_settings=SMALL | {"steps": 1, "tasks": tasks}, views=views), views=SHAKEN.views)
        assert asked[-1] == wanted


def test_another_view_in_every_step():
    settings = Msd(base_settings=SMALL | {"steps": 1}, resample_each_step=True)
    fixed = step_of(Msd(base_settings=SMALL | {"steps": 1}), SHAKEN.views)
    assert any(not torch.equal(a, b) for a, b in zip(step_of(settings, SHAKEN.views), fixed, strict=True))
    # without views every step sees the support itself
    for a, b in zip(step_of(settings), step_of(Msd(base_settings=SMALL | {"steps": 1})), strict=True):
        assert torch.allclose(a, b, rtol=1e-9, atol=1e-12)


def test_an_ensemble_averages_probabilities_and_answers_the_same_again():
    base = SMALL | {"steps": 1, "lr": 0.1}
    learner = msd(network(), episodes(), Msd(base_settings=base, ensemble=2), views=SHAKEN.views)
    e = episodes(1).draw(1, 0)[0]
    first, again = (learner.predict(e.support_x, e.support_y, e.query_x) for _ in range(2))
    assert torch.equal(first, again)
    views = [e.support_x, *SHAKEN.views(e.support_x[None], 2, [generator(0, "ensemble")])[0]]
    alone = msd(network(), episodes(), Msd(base_settings=base), views=SHAKEN.views)
    mean = sum(alone.predict(x, e.support_y, e.query_x).softmax(-1) for x in views) / 3
    assert torch.allclose(first.softmax(-1), mean, rtol=1e-9, atol=1e-12)  # one stack of views against three calls
    with pytest.raises(SpoliaError, match="needs views"):
        msd(network(), episodes(), Msd(base_settings=base, ensemble=2))


def test_settings_that_do_not_fit_are_told():
    with pytest.raises(ValidationError, match="did you mean `inner_lr`"):
        Msd(base_settings={"inner_lrr": 0.1})
    with pytest.raises(ValidationError, match="compares probabilities"):
        Msd(divergence="kl", compare="logit")
    with pytest.raises(ValidationError, match="no probabilities"):
        Msd(base_settings={"loss": "squared"})
    assert Msd(base="unicorn").basis() == BASES["unicorn"]()


def test_views_of_the_wrong_shape_are_told():
    with pytest.raises(SpoliaError, match=r"return \[tasks, count, n, ...\]"):
        msd(network(), episodes(), Msd(base_settings=SMALL | {"steps": 1}), views=lambda x, count, draws: x)


def test_numbers_instead_of_labels():
    class Lines:
        seed = 0

        def draw(self, count, step):
            draws = generator(0, "lines", step)
            x = torch.from_numpy(draws.standard_normal((count, 12, 1)))
            y = x * torch.from_numpy(draws.standard_normal((count, 1, 1)))
            none = torch.zeros(count, 0, dtype=torch.int64)
            return Episodes(x[:, :4], y[:, :4], x[:, 4:], y[:, 4:], none, none.sum(1), tuple(range(count)))

    def shifted(x, count, draws):
        noise = torch.stack([torch.from_numpy(d.standard_normal((count, *x.shape[1:]))) for d in draws])
        return x.unsqueeze(1) + 0.1 * noise

    base = {"loss": "squared", "steps": 3, "tasks": 4, "inner_steps": 1, "inner_lr": 0.1}
    module = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    learner = msd(module, Lines(), Msd(base_settings=base, compare="logit", divergence="squared"), views=shifted)
    e = Lines().draw(1, 9)
    assert learner.predict(e.support_x[0], e.support_y[0], e.query_x[0]).shape == (8, 1)
    assert math.isfinite(float(learner.losses.sum()))


@pytest.mark.slow
def test_on_digits_answers_are_more_consistent_and_no_worse():
    order, shaken = generator(0, "digits", "few-shot").permutation(10), scenario("shaken", "weak")
    train, test = digit_classes().pick(order[:7]), digit_classes().pick(order[7:])
    judge = EpisodeSampler(test, ways=3, shots=1, queries=5, seed=99)
    base = {"steps": 80}
    found: dict[str, list] = {}
    for seed in range(3):
        source = EpisodeSampler(train, ways=3, shots=1, queries=5, seed=seed)
        start = hidden(seed)
        learners = {"maml": maml(start, source, Maml(**base))}
        learners["msd"] = msd(start, source, Msd(base_settings=base), views=shaken.views)
        for name, learner in learners.items():
            plain = evaluate(learner.predict, judge, 100, views=2, view=shaken, together=50)
            other = evaluate(learner.predict, judge, 100, augment=shaken, together=50)
            row = (plain.mean("consistency"), plain.mean("logit cosine"), plain.mean(), other.mean())
            found.setdefault(name, []).append(row)
    consistent, cosine, plain, other = ({n: [row[i] for row in rows] for n, rows in found.items()} for i in range(4))
    assert all(a < b for a, b in zip(consistent["maml"], consistent["msd"], strict=True)), found
    assert sum(cosine["msd"]) > sum(cosine["maml"]), found
    # margins: plain accuracy has no winner, with shaken supports views must help; chance is 33
    assert sum(plain["msd"]) > sum(plain["maml"]) - 6 and sum(other["msd"]) > sum(other["maml"]), found
    assert min(plain["msd"] + plain["maml"]) > 42, found


def hidden(seed: int) -> nn.Module:
    draws = torch.Generator().manual_seed(seed)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.LayerNorm(64), nn.ReLU(), nn.Linear(64, 3))
    with torch.no_grad():
        for layer in (module[1], module[4]):
            layer.weight.copy_((2 * torch.rand(layer.weight.shape, generator=draws) - 1) / layer.in_features**0.5)
            layer.bias.zero_()
    return module
