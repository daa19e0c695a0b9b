from __future__ import annotations

import numpy as np
import pytest
import torch

from spolia.core import kept
from spolia.errors import SpoliaError
from spolia.parts.classes import ClassSet, joined
from spolia.parts.episode import EpisodeSampler
from spolia.parts.selection import Selection


def classes(count: int = 12, items: int = 9, **more) -> ClassSet:
    """Inputs that say who they are: pixel 0 is the class, pixel 1 the place within it."""
    labels = np.arange(count * items) % count
    x = torch.zeros(count * items, 1, 2, 2, dtype=torch.uint8)
    x[:, 0, 0, 0], x[:, 0, 0, 1] = torch.from_numpy(labels), torch.arange(count * items) // count
    return ClassSet.of(x, labels, [f"c{i}" for i in range(count)], **more)


def same(a, b) -> bool:
    return all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("support_x", "query_x", "classes", "sets"))


def test_an_episode_is_class_by_class_with_its_own_labels():
    e = EpisodeSampler(classes(), ways=4, shots=2, queries=3, seed=1).batch(range(20))
    assert e.support_x.shape == (20, 8, 1, 2, 2) and e.query_x.shape == (20, 12, 1, 2, 2)
    assert e.support_x.dtype == torch.uint8 and len(e) == 20 and e.ways == 4
    for task in e:
        assert task.support_y.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
        assert task.query_y.tolist() == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3
        for x, y in ((task.support_x, task.support_y), (task.query_x, task.query_y)):
            assert torch.equal(x[:, 0, 0, 0].long(), task.classes[y])
        seen = torch.cat([task.support_x, task.query_x])[:, 0, 0].tolist()
        assert len({tuple(pair) for pair in seen}) == 20, "an image of the support is among the queries"
        assert len(set(task.classes.tolist())) == 4


def test_an_episode_is_a_function_of_seed_and_number():
    held = classes()
    sampler = EpisodeSampler(held, ways=3, shots=1, queries=2, seed=7)
    whole = sampler.batch(range(10))
    for order in ([7, 2, 9], [0]):
        part = sampler.batch(order)
        for row, number in enumerate(order):
            assert torch.equal(part.support_x[row], whole.support_x[number])
            assert torch.equal(sampler.episode(number).query_x, whole.query_x[number])
    again, other = (EpisodeSampler(held, ways=3, shots=1, queries=2, seed=s) for s in (7, 8))
    assert same(again.batch(range(10)), whole) and again.key == sampler.key
    assert not same(other.batch(range(10)), whole) and other.key != sampler.key
    assert same(sampler.draw(5, 1), sampler.batch(range(5, 10)))


@pytest.mark.parametrize(("of", "count"), [(2, 8), (3, 8), (5, 3)])
def test_shards_are_disjoint_and_together_the_list(of, count):
    sampler = EpisodeSampler(classes(), ways=3, queries=2)
    parts = [sampler.shard(rank, of) for rank in range(of)]
    for step in range(4):
        numbers = [part.draw(count, step).numbers for part in parts]
        assert sorted(n for own in numbers for n in own) == list(range(step * count, (step + 1) * count))
        sizes = [len(own) for own in numbers]
        assert max(sizes) - min(sizes) <= 1
    assert {part.key for part in parts} == {sampler.key}
    assert torch.equal(parts[1].draw(of, 0).support_x, sampler.batch([1]).support_x)


def test_classes_and_inputs_are_equally_likely_and_labels_in_random_order():
    """Chi-square with 11 and 8 degrees of freedom; the bounds are above their 1 - 1e-6 quantiles."""
    held, episodes, ways = classes(12, 9), 4000, 3
    drawn = EpisodeSampler(held, ways=ways, shots=1, queries=1, seed=3).drawn(range(episodes))

    def chi2(counts: np.ndarray, expected: float, share: float = 1.0) -> float:
        return float(((counts - expected) ** 2).sum() / (expected * share))

    counts = np.bincount(drawn.classes.reshape(-1), minlength=12)
    # Without repetition within an episode counts vary less: by the factor (12 - 3) / (12 - 1) of independent draws.
    assert chi2(counts, episodes * ways / 12, (12 - ways) / 11) < 51.0
    assert chi2(np.bincount(drawn.classes[:, 0], minlength=12), episodes / 12) < 51.0, "label 0 prefers a class"
    items = (drawn.support // 12).reshape(-1)  # place within the class
    assert chi2(np.bincount(items, minlength=9), episodes * ways / 9) < 44.0


def test_support_and_query_pairs_are_equally_likely():
    drawn = EpisodeSampler(classes(4, 3), ways=2, shots=1, queries=1, seed=0).drawn(range(3000))
    pairs = np.bincount(((drawn.support // 4) * 3 + drawn.query // 4).reshape(-1), minlength=9).reshape(3, 3)
    assert not pairs.diagonal().any()
    off = pairs[~np.eye(3, dtype=bool)]
    # 6000 pairs over six cells: chi-square with 5 degrees of freedom, above its 1 - 1e-6 quantile
    assert ((off - 1000.0) ** 2 / 1000).sum() < 38.0


def test_classes_of_unlike_size_are_drawn_whole():
    labels = np.repeat([0, 1, 2], [3, 5, 40])
    held = ClassSet.of(torch.arange(48.0).view(-1, 1), labels)
    drawn = EpisodeSampler(held, ways=3, shots=1, queries=2).drawn(range(50))
    both = np.concatenate([drawn.support, drawn.query], -1)
    for c, places in zip(drawn.classes.reshape(-1), both.reshape(-1, 3), strict=True):
        assert set(labels[places]) == {c} and len(set(places)) == 3
    assert held.smallest == 3


def test_queries_kept_apart_never_serve_as_support():
    marks = np.arange(12 * 9) // 12 >= 5
    sampler = EpisodeSampler(classes(queries=marks), ways=3, shots=5, queries=4)
    e = sampler.batch(range(20))
    assert e.support_x[:, :, 0, 0, 1].max() <= 4 and e.query_x[:, :, 0, 0, 1].min() >= 5
    with pytest.raises(SpoliaError, match="5 queries of `c0`, which has 4"):
        EpisodeSampler(classes(queries=marks), ways=3, shots=5, queries=5)


@pytest.mark.parametrize("by", ["class", "superclass"])
def test_splits_share_nothing(by):
    held = classes(12, superclasses=[f"s{i // 3}" for i in range(12)])
    a, b, c = held.split((0.5, 0.25, 0.25), seed=1, by=by)
    assert [len(part) for part in (a, b, c)] == [6, 3, 3]
    key = {"class": "names", "superclass": "superclasses"}[by]
    sets = [set(getattr(part, key)) for part in (a, b, c)]
    assert not (sets[0] & sets[1] or sets[0] & sets[2] or sets[1] & sets[2])
    assert {n for part in (a, b, c) for n in part.names} == set(held.names)
    e = EpisodeSampler(b, ways=2, queries=2).batch(range(30))
    assert {held.names[i] for i in e.support_x[:, :, 0, 0, 0].unique().tolist()} <= set(b.names)
    assert held.split((0.5, 0.5), seed=1)[0].names != held.split((0.5, 0.5), seed=2)[0].names


def test_turns_are_classes_that_never_meet_and_stay_in_one_split():
    held = classes(6).turned()
    assert len(held) == 24
    train, test = held.split((0.5, 0.5))
    assert not {name.split(",")[0] for name in train.names} & {name.split(",")[0] for name in test.names}
    e = EpisodeSampler(held, ways=6, queries=2).batch(range(40))
    for task in e:
        assert sorted((task.classes // 4).tolist()) == list(range(6)), "two turns of one class"
        for x, c in zip(task.support_x, task.classes.tolist(), strict=True):
            upright = torch.rot90(x, -(c % 4), (-2, -1))
            assert upright[0, 0, 0] == c // 4 and not upright[0, 1].any()
    with pytest.raises(SpoliaError, match="7 ways of 6 classes"):
        EpisodeSampler(held, ways=7, queries=2)


def test_several_sets_give_episodes_of_one_each_or_classes_of_all():
    a, b = classes(6), classes(8)
    b = ClassSet.of(b.inputs + 100, b.inputs[:, 0, 0, 0].long(), b.names)
    sampler = EpisodeSampler([a, b], ways=3, queries=2, weights=(1, 3))
    e = sampler.batch(range(400))
    high = (e.support_x[:, :, 0, 0, 0] >= 100).float().mean(1)
    assert torch.equal(high, e.sets.float())
    # binomial(400, 3/4): five standard deviations are 0.108
    assert abs(high.mean() - 0.75) < 0.11
    assert torch.equal(sampler.episode(17).query_x, e.query_x[17])
    both = joined({"a": a, "b": b})
    assert both.names[0] == "a/c0" and both.names[-1] == "b/c7" and set(both.superclasses) == {"a", "b"}
    mixed = EpisodeSampler(both, ways=6, queries=2).batch(range(20))
    assert any(0 < int((row[:, 0, 0, 0] >= 100).sum()) < 6 for row in mixed.support_x)
    for task in mixed:
        assert torch.equal(task.support_x[:, 0, 0, 0] >= 100, task.classes >= 6)


def test_floats_turn_bytes_to_shares_and_leave_the_rest():
    held = classes()
    e = EpisodeSampler(held, ways=3, queries=2).batch([0])
    assert torch.equal(e.floats().support_x * 255, e.support_x.float())
    real = ClassSet.of(held.inputs.double(), held.inputs[:, 0, 0, 0].long())
    assert EpisodeSampler(real, ways=3, queries=2).episode(0).floats().support_x.dtype == torch.float64


@pytest.mark.parametrize(
    ("make", "word"),
    [
        (lambda: EpisodeSampler(classes(4), ways=5), "5 ways of 4 classes"),
        (lambda: EpisodeSampler(classes(), queries=9), "10 shots and queries of `c0`, which has 9"),
        (lambda: EpisodeSampler(classes(), ways=1, shots=0), "give at least 2(.|\n)*give at least 1"),
        (lambda: EpisodeSampler([], queries=2), "there are none"),
        (lambda: EpisodeSampler([classes(), classes()], queries=2, weights=(1,)), "weights"),
        (lambda: EpisodeSampler(classes(), queries=2).shard(2, 2), "rank 2 of 2"),
        (lambda: ClassSet.of(torch.zeros(3, 2), [0, 1]), "labels .2. of int64 for 3 inputs"),
        (lambda: ClassSet.of(torch.zeros(3, 2), [0, 1, 5], ["a", "b"]), "from 0 to 5 for 2 names"),
        (lambda: ClassSet.of(torch.zeros(2, 2), [0, 0], ["a", "b"]), "no inputs of b"),
        (lambda: ClassSet.of([1, 2], [0, 0]), "inputs are a list"),
        (lambda: classes().split((0.5, 0.6)), "sum at most 1"),
        (lambda: classes().split((0.5, 0.5), by="superclass"), "give by=class"),
        (lambda: classes(3).split((0.99, 0.01)), "would be empty"),
        (lambda: classes().turned().turned(), "turned already"),
        (lambda: joined({"a": classes(), "b": ClassSet.of(torch.zeros(4, 3), [0, 0, 1, 1])}), "inputs differ"),
        (lambda: joined({"a": classes(), "b": classes(queries=np.arange(108) % 2 == 0)}), "only b keep"),
    ],
)
def test_what_cannot_be_is_told(make, word):
    with pytest.raises(SpoliaError, match=word):
        make()


def test_selection_keeps_the_best_and_comes_back(tmp_path):
    module = torch.nn.Linear(2, 1)
    chosen = Selection(module)
    start = chosen.best()["weight"]
    for step, score in enumerate([float("nan"), 1.0, 3.0, 3.0, 2.0], 1):
        with torch.no_grad():
            module.weight.fill_(step)
        assert chosen.offer(step, score) == (step in (2, 3))
    assert chosen.best_step == 3 and chosen.best()["weight"].tolist() == [[3.0, 3.0]]
    assert not torch.equal(start, chosen.best()["weight"])
    kept.save(tmp_path / "s.safetensors", kept.capture("s", chosen))
    again = Selection(torch.nn.Linear(2, 1))
    kept.restore("s", again, kept.load(tmp_path / "s.safetensors"))
    assert again.best_step == 3 and again.best()["weight"].tolist() == [[3.0, 3.0]]
    assert not again.offer(6, 3.0) and again.offer(7, 3.5)
