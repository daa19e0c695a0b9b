from __future__ import annotations

import math

import pytest
import torch

from spolia.bench.datafree import Along, Judge, Shift, apart, averaged, best, features_of, penultimate
from spolia.data.fewshot import digit_classes
from spolia.errors import SpoliaError
from spolia.parts.episode import EpisodeSampler
from spolia.parts.white import White, WhitePool
from spolia.zoo.conv2 import Conv2


def net(seed: int, width: int = 4, ways: int = 3) -> Conv2:
    return Conv2(ways, width=width, size=8, generator=torch.Generator().manual_seed(seed))


def white(name: str, seed: int, claimed: float | None = None, width: int = 4) -> White:
    return White(name, net(seed, width), shape=(1, 8, 8), classes="abc", mean=(0.5,), std=(0.25,), claimed=claimed)


def judge(episodes: int = 6) -> Judge:
    return Judge(
        {f"{k}-shot": EpisodeSampler(digit_classes(), ways=3, shots=k, queries=3) for k in (1, 2)}, episodes, 4
    )


def nearest(support_x, support_y, query_x):
    means = torch.stack([support_x[support_y == c].flatten(1).mean(0) for c in support_y.unique()])
    return -torch.cdist(query_x.flatten(1), means)


def blind(support_x, support_y, query_x):
    return torch.zeros(len(query_x), 3)


def test_known_classes_do_not_test():
    apart(["cat", "dog"], ["hen"])
    with pytest.raises(SpoliaError, match="1 of its classes are known to models of the pool: dog"):
        apart(["cat", "dog"], ["hen", "dog"])


def test_all_are_asked_the_same():
    found = judge().scores(nearest)
    assert list(found) == ["1-shot", "2-shot"]
    assert {len(one) for one in found.values()} == {6}
    assert judge().scores(blind)["1-shot"].episodes == found["1-shot"].episodes
    assert judge().glance(blind) == pytest.approx(100 / 3)  # all logits equal: the first class, always


def test_last_selected_and_peak_are_three_numbers():
    class Learner:
        predict = staticmethod(nearest)

    scores = iter([50.0, 70.0, 60.0])
    watched = Along(lambda step, learner: next(scores), judge())
    for step in (10, 20, 30):
        watched(step, Learner)
    tests = iter([60.0, 40.0, 55.0])
    watched.points = {s: type(p)(p.step, p.validation, next(tests)) for s, p in watched.points.items()}
    found = watched.stages
    assert (found.last.step, found.selected.step, found.peak.step) == (30, 20, 10)
    assert watched.variation == -5.0


def test_a_look_that_is_done_again_counts_once():
    class Learner:
        predict = staticmethod(blind)

    watched = Along(lambda step, learner: 1.0, judge())
    for step in (10, 20, 20):
        watched(step, Learner)
    assert list(watched.points) == [10, 20]
    unasked = Along(lambda step, learner: 1.0, Judge({}, 5))
    assert unasked(1, Learner) == 1.0 and math.isnan(unasked.points[1].test)


def test_a_shift_is_what_was_lost_since_the_best():
    assert Shift([57.8, 62.2, 67.4, 55.4]).variation == pytest.approx(-12.0)
    assert Shift([50.0, 60.0]).variation == 0 and Shift([50.0]).forgotten is None
    assert Shift([0, 0], [[90.0, 20.0], [70.0, 80.0]]).forgotten == pytest.approx(20.0)


def test_features_are_what_the_last_layer_sees():
    one = white("a", 0)
    x = torch.rand(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    module = one.module()
    torch.testing.assert_close(features_of(one)(module, x), module.features((x - 0.5) / 0.25))
    plain = torch.nn.Conv2d(1, 2, 3)
    assert penultimate(plain, x).shape == (5, 72), "without a linear layer its outputs are"
    assert not module.head._forward_pre_hooks


def test_the_average_is_that_of_the_largest_kind():
    pool = WhitePool([white("a", 0), white("wide", 1, width=6), white("b", 2), white("c", 3)])
    place, made, count = averaged(pool)
    assert (place, count) == (0, 3)
    for name, tensor in made.state_dict().items():
        parts = [pool[i].module().state_dict()[name] for i in (0, 2, 3)]
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, torch.stack(parts).mean(0))
        else:
            assert tensor.dtype == parts[0].dtype
    assert averaged(pool, [2, 3])[2] == 1
    alone = averaged(WhitePool([white("a", 0)]))[1]
    assert all(torch.equal(t, white("a", 0).module().state_dict()[n]) for n, t in alone.state_dict().items())


def test_the_best_claims_the_most():
    pool = WhitePool([white("a", 0, 0.7), white("b", 1, 0.9), white("c", 2, 0.9), white("d", 3)])
    assert best(pool) == 1 and best(pool, [1]) == 2 and best(WhitePool([white("a", 0), white("b", 1)])) == 0
