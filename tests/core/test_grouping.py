from __future__ import annotations

import numpy as np
import pytest
import torch

from spolia.core.grouping import grouped, within
from spolia.core.seeds import generator
from spolia.errors import SpoliaError

WAYS = ("balanced", "homogeneous", "random", "spectral")


def blocks(kinds: int, each: int, seed: int = 0, noise: float = 0.05) -> tuple[torch.Tensor, list[int]]:
    """Dissimilarity .2 within a kind and .7 between, with noise; and each item's kind."""
    kind = np.repeat(np.arange(kinds), each)
    d = np.where(kind[:, None] == kind, 0.2, 0.7)
    shake = noise * generator(seed, "blocks").standard_normal(d.shape)
    d = np.clip(d + (shake + shake.T) / 2, 0.01, None)
    np.fill_diagonal(d, 0.0)
    return torch.from_numpy(d), kind.tolist()


@pytest.mark.parametrize("way", WAYS)
def test_every_item_is_in_one_group(way):
    pytest.importorskip("sklearn")
    d, _ = blocks(3, 7)
    groups = grouped(d, 4, way, generator(0, "g"))
    assert sorted(place for group in groups for place in group) == list(range(21))
    assert groups == sorted(groups)
    if way != "spectral":
        sizes = [len(group) for group in groups]
        assert max(sizes) - min(sizes) <= 1


def test_groups_of_unlike_items_hold_several_kinds():
    d, kind = blocks(3, 10)
    groups = grouped(d, 5, "balanced", generator(0, "g"))
    assert all(len({kind[place] for place in group}) == 3 for group in groups)
    alike = grouped(d, 3, "homogeneous", generator(0, "g"))
    assert all(len({kind[place] for place in group}) == 1 for group in alike)


@pytest.mark.parametrize("seed", range(3))
def test_the_order_of_the_ways(seed):
    """Margins are half of what three kinds of ten items give: balanced .543, random .436, homogeneous far below."""
    d, _ = blocks(3, 10, seed)
    found = {way: within(d, grouped(d, 5, way, generator(seed, way))) for way in ("balanced", "random", "homogeneous")}
    assert found["balanced"] > found["random"] + 0.04
    assert found["random"] > found["homogeneous"] + 0.08


def test_equal_groups_are_at_least_as_unlike_as_the_papers():
    pytest.importorskip("sklearn")
    d, _ = blocks(3, 10)
    ours, theirs = (within(d, grouped(d, 5, way, generator(0, way))) for way in ("balanced", "spectral"))
    chance = np.mean([within(d, grouped(d, 5, "random", generator(i, "random"))) for i in range(20)])
    assert ours >= theirs > chance + 0.02


def test_scale_and_shift_change_nothing():
    d, _ = blocks(2, 6)
    first = grouped(d, 3, "balanced", generator(0, "g"))
    assert grouped(4 * d, 3, "balanced", generator(0, "g")) == first
    moved = d + 0.5
    assert within(moved, grouped(moved, 3, "balanced", generator(0, "g"))) == pytest.approx(
        within(moved, first), abs=1e-9
    )


def test_no_swap_of_two_items_is_left_that_would_help():
    d, _ = blocks(3, 5, noise=0.3)
    groups = grouped(d, 4, "balanced", generator(0, "g"))
    reached = within(d, groups)
    for a in range(len(groups)):
        for b in range(a):
            for i in groups[a]:
                for j in groups[b]:
                    swapped = [[j if x == i else i if x == j else x for x in group] for group in groups]
                    if len(groups[a]) == len(groups[b]):  # else the pairs counted differ
                        assert within(d, swapped) <= reached + 1e-9


def test_small_pools_find_the_best_by_trying_all():
    """Six items in two groups: 10 ways, of which the search must find the best."""
    d, _ = blocks(2, 3, noise=0.4)
    from itertools import combinations

    best = max(within(d, [[0, *two], [x for x in range(1, 6) if x not in two]]) for two in combinations(range(1, 6), 2))
    assert within(d, grouped(d, 2, "balanced", generator(0, "g"))) == pytest.approx(best, abs=1e-12)


def test_one_group_and_one_item_each():
    d, _ = blocks(2, 3)
    assert grouped(d, 1, "balanced", generator(0, "g")) == [list(range(6))]
    assert grouped(d, 6, "balanced", generator(0, "g")) == [[i] for i in range(6)]
    assert within(d, [[i] for i in range(6)]) == 0


def test_what_cannot_be_grouped_is_told():
    d, _ = blocks(2, 3)
    with pytest.raises(SpoliaError, match="7 groups of 6 items"):
        grouped(d, 7, "balanced", generator(0, "g"))
    with pytest.raises(SpoliaError, match="not finite"):
        grouped(d * torch.nan, 2, "balanced", generator(0, "g"))
    with pytest.raises(SpoliaError, match="negative"):
        grouped(d - 1, 2, "spectral", generator(0, "g"))
