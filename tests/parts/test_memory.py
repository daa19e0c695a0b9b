"""Memory: the laws of who stays, herding by hand, budgets, and the same bits after a restart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats

from spolia.core import kept
from spolia.errors import SpoliaError
from spolia.parts.memory import Memory, herded

MISS = (
    1e-4  # probability that a right sampler fails a test of its law; seeds are fixed, so that it is the same every time
)


def filled(capacity: int, total: int, batch: int, seed: int) -> list[int]:
    """What a reservoir holds after `total` items."""
    memory = Memory(capacity, seed=seed)
    for start in range(0, total, batch):
        memory.add(y=torch.arange(start, min(start + batch, total)))
    assert len(memory) == min(capacity, total) and memory.seen == total
    return memory.all()["y"].tolist()


@pytest.mark.parametrize(("capacity", "total", "batch", "streams"), [(1, 3, 3, 1500), (1, 3, 1, 1500), (5, 20, 7, 200)])
def test_every_item_stays_with_the_same_probability(capacity: int, total: int, batch: int, streams: int) -> None:
    """Counts of N items over many streams against M / N, by chi-square.

    A sample without replacement has covariance (M / N)(1 - M / N) N / (N - 1) (I - 11' / N), so that the scaled sum of squares
    is chi-square with N - 1 degrees of freedom for many streams. With 1 of 3, a draw from one place too many gives the last
    item 1 / 4: six deviations off.
    """
    counts = np.zeros(total)
    for seed in range(streams):
        held = filled(capacity, total, batch, seed)
        assert len(set(held)) == capacity
        counts[held] += 1
    share = capacity / total
    spread = streams * share * (1 - share) * total / (total - 1)
    assert ((counts - streams * share) ** 2).sum() / spread < stats.chi2.ppf(1 - MISS, total - 1)


def test_a_batch_at_once_has_the_law_of_one_after_the_other() -> None:
    """Which item ends in which slot: both ways, compared by a two-sample chi-square."""
    tables = []
    for batch in (1, 6):
        table = np.zeros((3, 12))
        for seed in range(300):
            table[np.arange(3), filled(3, 12, batch, 7919 * batch + seed)] += 1
        tables.append(table.ravel())
    both = np.stack(tables)[:, (tables[0] + tables[1]) > 0]
    assert stats.chi2_contingency(both).pvalue > MISS


def test_the_first_items_fill_the_slots_in_order() -> None:
    assert filled(6, 4, 3, 0) == [0, 1, 2, 3]
    assert filled(4, 4, 3, 0) == [0, 1, 2, 3]


def test_balanced_holds_as_many_of_each_class() -> None:
    memory = Memory(12, policy="balanced")
    for label, count in ((0, 50), (1, 30), (2, 3), (3, 40)):
        memory.add(x=torch.arange(count), y=torch.full((count,), label))
    assert torch.bincount(memory.all()["y"]).tolist() == [3, 3, 3, 3]
    state = memory.state_dict()
    other = Memory(12, policy="balanced")
    other.load_state_dict(state)
    for one in (memory, other):
        one.add(x=torch.arange(9), y=torch.full((9,), 4))
    assert torch.equal(memory.all()["x"], other.all()["x"])
    assert torch.bincount(memory.all()["y"]).max() <= 3


def test_a_draw_has_no_item_twice_and_none_is_preferred() -> None:
    memory = Memory(10, seed=3)
    memory.add(y=torch.arange(10))
    counts = np.zeros(10)
    for _ in range(1000):
        drawn = memory.draw(4)["y"].tolist()
        assert len(set(drawn)) == 4
        counts[drawn] += 1
    spread = 1000 * 0.4 * 0.6 * 10 / 9
    assert ((counts - 400) ** 2).sum() / spread < stats.chi2.ppf(1 - MISS, 9)
    assert sorted(memory.draw(99)["y"].tolist()) == list(range(10))


def test_bytes_bound_it_besides_items() -> None:
    def capacity(items: int | None, limit: int | None) -> int:
        memory = Memory(items, bytes=limit)
        memory.add(x=torch.zeros(40, 3, 2, 2, dtype=torch.uint8), y=torch.zeros(40, dtype=torch.int64))
        assert memory.held == 20 * len(memory)  # 12 of the image, 8 of the label
        return len(memory)

    assert capacity(None, 199) == 9
    assert capacity(5, 199) == 5
    assert capacity(30, 199) == 9
    assert capacity(30, 10_000) == 30
    assert capacity(None, 19) == 0


def test_it_goes_on_with_the_same_bits(tmp_path) -> None:
    def shown(memory: Memory, start: int) -> None:
        for i in range(start, start + 5):
            x = torch.randint(0, 256, (7, 3, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            memory.add(x=x, y=torch.full((7,), i), logits=torch.full((7, 2), float(i)))

    memory, other = Memory(9, seed=1), Memory(9, seed=99)
    shown(memory, 0)
    memory.draw(3)
    kept.save(tmp_path / "memory", kept.capture("memory", memory))
    kept.restore("memory", other, kept.load(tmp_path / "memory"))
    for one in (memory, other):
        shown(one, 5)
    drawn, again = memory.draw(4), other.draw(4)
    assert drawn.keys() == again.keys() and drawn["x"].dtype == torch.uint8
    assert all(torch.equal(drawn[name], again[name]) for name in drawn)
    assert all(torch.equal(memory.all()[name], other.all()[name]) for name in drawn)


def test_herding_by_hand() -> None:
    """Mean 2: first 2 itself; then 1 (mean 1.5) and 3 (2.5) are equally far and the first wins; then 3 (mean 2)."""
    x = torch.tensor([[0.0], [1.0], [2.0], [3.0], [4.0]])
    assert herded(x, 3).tolist() == [2, 1, 3]
    assert herded(x, 5).tolist()[:3] == [2, 1, 3]
    assert sorted(herded(x, 9).tolist()) == [0, 1, 2, 3, 4]


def test_herding_follows_the_mean_better_than_chance() -> None:
    x = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))
    gap = (x[herded(x, 20)].mean(0) - x.mean(0)).norm()
    draws = torch.Generator().manual_seed(1)
    lots = [x[torch.randperm(200, generator=draws)[:20]] for _ in range(50)]
    chance = torch.stack([(lot.mean(0) - x.mean(0)).norm() for lot in lots])
    assert gap < chance.mean() / 3  # of order 1 / 20 instead of 2 / sqrt(20)


def test_what_does_not_go_together_is_said() -> None:
    memory = Memory(4)
    memory.add(x=torch.zeros(2, 3), y=torch.zeros(2, dtype=torch.int64))
    for given in ({"x": torch.zeros(2, 3)}, {"x": torch.zeros(2, 4), "y": torch.zeros(2, dtype=torch.int64)}):
        with pytest.raises(SpoliaError, match="samples of"):
            memory.add(**given)
    with pytest.raises(SpoliaError, match="samples of"):
        memory.add(x=torch.zeros(2, 3), y=torch.zeros(3, dtype=torch.int64))
    with pytest.raises(SpoliaError, match="number of items"):
        Memory()
    with pytest.raises(SpoliaError, match="keep"):
        Memory(4, policy="chosen").put(y=torch.zeros(5))
