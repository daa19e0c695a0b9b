from __future__ import annotations

import math
from statistics import fmean

import numpy as np
import pytest
import torch

from spolia.bench import fewshot
from spolia.bench.consistency import consistency, floor, to_mean
from spolia.bench.fewshot import evaluate
from spolia.bench.fewshot_scores import (
    Point,
    Scores,
    averaged,
    difference,
    difference_over_seeds,
    ledger_rows,
    over_seeds,
    stages,
    z_interval,
)
from spolia.core.seeds import generator
from spolia.data.augment import Augment
from spolia.data.fewshot import digit_classes
from spolia.errors import SpoliaError
from spolia.parts.episode import EpisodeSampler

NOISE = Augment(noise=0.5)


def nearest(support_x, support_y, query_x):
    """Minus the distance to each class's mean, in pixels; class by class, so that it follows the order of the labels."""
    means = torch.stack([support_x[support_y == c].flatten(1).mean(0) for c in support_y.unique()])
    return -torch.cdist(query_x.flatten(1), means)


@pytest.fixture(scope="module")
def sampler() -> EpisodeSampler:
    return EpisodeSampler(digit_classes(), ways=3, shots=2, queries=4, seed=5)


def scores(values, episodes="e", scenario="standard", **more) -> Scores:
    return Scores(episodes, scenario, {"accuracy": tuple(values), **more})


def test_accuracy_is_counted_episode_by_episode(sampler):
    found = evaluate(nearest, sampler, 12)
    wanted = []
    for number in range(12):
        e = sampler.episode(number)
        wanted.append(float((nearest(e.support_x, e.support_y, e.query_x).argmax(1) == e.query_y).double().mean()))
    assert found.of("accuracy") == pytest.approx(tuple(wanted), abs=0) and len(found) == 12
    assert found.mean() == pytest.approx(100 * fmean(wanted))
    always = evaluate(lambda s, y, q: torch.eye(3)[torch.zeros(len(q), dtype=torch.long)], sampler, 12)
    assert set(always.of("accuracy")) == {1 / 3}, "one class is right for a third of the queries"
    nothing = evaluate(lambda s, y, q: torch.full((len(q), 3), float("nan")), sampler, 4)
    assert nothing.mean() == 0


def test_a_changed_support_is_harder_and_drawn_by_episode(sampler):
    plain, noisy = evaluate(nearest, sampler, 60), evaluate(nearest, sampler, 60, augment=NOISE)
    assert noisy.mean() < plain.mean() - 5  # noise of half of white; the margin is far above the interval's half width
    first = evaluate(nearest, sampler, 10, augment=NOISE)
    assert first.of("accuracy") == noisy.of("accuracy")[:10]
    assert plain.scenario == "standard" != noisy.scenario
    with pytest.raises(SpoliaError, match="different episodes or scenarios"):
        difference(plain, noisy)


def test_shards_see_what_the_whole_sees_and_together_changes_nothing(sampler):
    whole = evaluate(nearest, sampler, 10, augment=NOISE)
    parts = [evaluate(nearest, sampler.shard(rank, 3), 10, augment=NOISE) for rank in range(3)]
    for rank, part in enumerate(parts):
        assert part.of("accuracy") == whole.of("accuracy")[rank::3]

    def several(support_x, support_y, query_x):
        assert support_x.dim() == 5
        return torch.stack([nearest(*task) for task in zip(support_x, support_y, query_x, strict=True)])

    asked = {"augment": NOISE, "views": 2, "orders": 2}
    assert evaluate(several, sampler, 10, together=4, **asked) == evaluate(nearest, sampler, 10, **asked)


def test_ranks_of_a_group_share_what_they_found(sampler, monkeypatch):
    whole = evaluate(nearest, sampler, 6, orders=2)

    def summed(table: torch.Tensor) -> torch.Tensor:
        assert not table[1::2].any(), "the other rank's episodes are not ours to fill"
        table[1::2] = torch.tensor(list(zip(*whole.values.values(), strict=True)), dtype=table.dtype)[1::2]
        return table

    monkeypatch.setattr(fewshot, "world", lambda: (0, 2))
    monkeypatch.setattr(fewshot, "summed", summed)
    assert evaluate(nearest, sampler.shard(0, 2), 6, orders=2) == whole


class Leaky(torch.nn.Module):
    """Normalises by running statistics that it moves toward each support: pitfall of several published codes."""

    def __init__(self):
        super().__init__()
        self.norm = torch.nn.BatchNorm1d(64)

    def predict(self, support_x, support_y, query_x):
        self.norm.train()
        self.norm(support_x.flatten(1))
        self.norm.eval()
        with torch.no_grad():
            return nearest(self.norm(support_x.flatten(1)), support_y, self.norm(query_x.flatten(1)))


def test_statistics_do_not_leak_from_episode_to_episode(sampler):
    learner = Leaky().eval()
    with pytest.raises(SpoliaError, match="answers an episode otherwise after another one"):
        evaluate(learner.predict, sampler, 8)
    learner = Leaky().eval()
    before = {name: value.clone() for name, value in learner.state_dict().items()}
    found = evaluate(learner.predict, sampler, 8, modules=[learner])
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items())
    assert not learner.norm.training
    e = sampler.episode(7)  # the last of eight, asked of a fresh learner
    alone = (Leaky().predict(e.support_x, e.support_y, e.query_x).argmax(1) == e.query_y).double().mean()
    assert found.of("accuracy")[7] == float(alone)


def test_label_orders_are_averaged_in_the_right_columns(sampler):
    same = evaluate(nearest, sampler, 10, orders=4)
    # the mean of a class does not depend on its number
    assert same.of("accuracy over label orders") == pytest.approx(same.of("accuracy"), abs=1e-12)
    assert max(same.of("spread over label orders")) < 1e-12

    def prefers_label_0(support_x, support_y, query_x):
        return nearest(support_x, support_y, query_x) + 0.5 * torch.eye(3)[0]

    biased = evaluate(prefers_label_0, sampler, 40, orders=4)
    assert fmean(biased.of("spread over label orders")) > 0.01


def test_consistency_is_measured_on_views_with_its_floor(sampler):
    found = evaluate(nearest, sampler, 30, views=2, view=Augment(noise=0.1))
    still = evaluate(nearest, sampler, 30, views=2, view=Augment())
    for metric in ("consistency", "logit cosine", "agreement"):
        assert still.interval(metric).mean == pytest.approx(100 if metric == "agreement" else 1, abs=1e-9)
        assert still.mean(metric) > found.mean(metric) > found.mean(f"{metric}, floor")
    assert still.mean("JS divergence") == pytest.approx(0, abs=1e-12)
    assert 1e-6 < found.mean("JS divergence") < found.mean("JS divergence, floor")
    with pytest.raises(SpoliaError, match="give two or more"):
        evaluate(nearest, sampler, 4, views=2)
    with pytest.raises(SpoliaError, match="give 1 or more"):
        evaluate(nearest, sampler, 4, together=0)
    with pytest.raises(SpoliaError, match="none of 2 for rank 2"):
        evaluate(nearest, sampler.shard(2, 3), 2)


@pytest.mark.parametrize(("scale", "expected"), [(0.3, 0.98), (1.0, 0.90), (3.0, 0.81)])
def test_floors_of_independent_answers(scale, expected):
    """Normal logits, two views, five classes: the values that were measured for the specification of the measure."""
    logits = scale * torch.from_numpy(generator(0, "floor", scale).standard_normal((2, 20000, 5)))
    found = consistency(logits)
    # printed to two digits: half a unit, and 20,000 queries whose cosines deviate by less than 0.2: 5 * 0.0015
    assert abs(found["consistency"] - expected) < 0.005 + 0.0075
    assert abs(to_mean(logits - logits.mean(-1, keepdim=True)) - 0.65) < 0.0125
    assert abs(found["logit cosine"]) < 5 * 0.5 / math.sqrt(20000)  # a cosine in four dimensions deviates by 1/2
    assert abs(found["agreement"] - 0.2) < 5 * 0.4 / math.sqrt(20000)
    # Shuffled, they are as independent as before: the floor is the value itself.
    chance = floor(torch.stack([logits[0]] * 2), generator(1))
    assert abs(chance["consistency, floor"] - found["consistency"]) < 0.015
    assert abs(chance["logit cosine, floor"]) < 5 * 0.5 / math.sqrt(20000)


def test_consistency_of_known_answers():
    one = torch.tensor([[2.0, 0.0, -1.0], [0.0, 3.0, 0.0]])
    same = consistency(torch.stack([one, one, one]))
    assert same == pytest.approx({"consistency": 1, "logit cosine": 1, "JS divergence": 0, "agreement": 1}, abs=1e-12)
    shifted = consistency(torch.stack([one, one + 5]))  # a constant added to all logits says nothing
    assert shifted == pytest.approx({"consistency": 1, "logit cosine": 1, "JS divergence": 0, "agreement": 1}, abs=1e-9)
    sure = torch.tensor([[[900.0, 0.0]], [[0.0, 900.0]]])
    against = consistency(sure)
    assert against["JS divergence"] == pytest.approx(math.log(2)) and against["agreement"] == 0
    assert against["logit cosine"] == pytest.approx(-1) and against["consistency"] == pytest.approx(math.sqrt(0.5))
    flat = consistency(torch.zeros(2, 4, 5))
    assert flat["consistency"] == pytest.approx(1) and flat["logit cosine"] == 0


def test_the_interval_covers_as_often_as_it_says():
    draws = generator(0, "coverage")
    inside = 0
    for shares in draws.binomial(75, 0.6, (1000, 100)) / 75:
        found = z_interval(shares.tolist())
        inside += found.low <= 0.6 <= found.high
    # 95 % less what 1.96 lacks of Student's at 99 degrees (0.3 %); five standard deviations of a binomial
    assert abs(inside / 1000 - 0.947) < 5 * math.sqrt(0.95 * 0.05 / 1000)
    assert z_interval([0.5]).low is None
    assert z_interval([0.0, 1.0]).high == pytest.approx(0.5 + 1.96 * math.sqrt(0.5) / math.sqrt(2))


def test_differences_are_paired():
    hard = np.linspace(0.2, 0.9, 50)
    a, b = scores(hard + 0.02), scores(hard)
    gap = difference(a, b)
    assert gap.mean == pytest.approx(2) and gap.high - gap.low < 1e-9 < a.interval().high - a.interval().low
    with pytest.raises(SpoliaError, match="different episodes"):
        difference(a, scores(hard, episodes="others"))
    seeds = [scores(hard + x) for x in (0.00, 0.01, 0.02)]
    found = over_seeds(seeds)
    # Student's 4.303 at two degrees, deviation 1, three seeds
    assert found.high - found.mean == pytest.approx(4.303 / math.sqrt(3), abs=1e-3)
    assert difference_over_seeds(seeds, [b, b, b]).mean == pytest.approx(1)
    with pytest.raises(SpoliaError, match="3 and 2 seeds"):
        difference_over_seeds(seeds, [b, b])
    assert averaged(seeds).of("accuracy") == pytest.approx(tuple(hard + 0.01))


def test_last_selected_and_peak_are_kept_apart():
    points = [Point(100, 50, 48), Point(200, 61, 55), Point(300, 61, 70), Point(400, 58, 52)]
    found = stages(points[::-1])
    assert (found.last.step, found.selected.step, found.peak.step) == (400, 200, 300)
    with pytest.raises(SpoliaError, match="there are none"):
        stages([])


def test_rows_have_episodes_and_seeds_beside_each_other():
    a = [
        scores((0.5, 0.7, 0.6), **{"JS divergence": (0.1, 0.2, 0.3)}),
        scores((0.6, 0.8, 0.7), **{"JS divergence": (0.1,) * 3}),
    ]
    b = [scores((0.4, 0.7, 0.5)), scores((0.5, 0.6, 0.7))]
    rows = ledger_rows({"maml": b, "msd": a}, "digits 3-way", baselines=["maml"], against="maml")
    places = {(row["method"], row["metric"]): row for row in rows}
    assert set(places) == {
        *(("maml", m) for m in ("accuracy", "accuracy over seeds")),
        *(("msd", m) for m in ("accuracy", "accuracy over seeds", "JS divergence", "JS divergence over seeds")),
    }
    first = places["msd", "accuracy"]
    assert first["n"] == 3 and first["mean"] == pytest.approx(65) and first["unit"] == "%"
    assert first["paired_difference"]["mean"] == pytest.approx(65 - 170 / 3)
    assert places["msd", "accuracy over seeds"]["n"] == 2 and places["msd", "accuracy over seeds"]["high"] <= 100
    assert places["maml", "accuracy"]["baseline"] is True and "paired_difference" not in places["maml", "accuracy"]
    assert (
        places["msd", "JS divergence"]["unit"] == "nats" and "paired_difference" not in places["msd", "JS divergence"]
    )
    single = ledger_rows({"msd": a[:1]}, "digits 3-way")
    assert [row["metric"] for row in single] == ["accuracy", "JS divergence"]


@pytest.mark.parametrize(
    ("predict", "word"),
    [
        (lambda s, y, q: torch.zeros(len(q), 4), r"gives \[12, 4\], not \[12, 3\]"),
        (lambda s, y, q: torch.zeros(3, len(q)), r"gives \[3, 12\]"),
    ],
)
def test_answers_of_another_shape_are_told(sampler, predict, word):
    with pytest.raises(SpoliaError, match=word):
        evaluate(predict, sampler, 4)
    with pytest.raises(SpoliaError, match="`agreement` was not measured"):
        evaluate(nearest, sampler, 2).mean("agreement")
