"""The closed form against its definition: ridge by least squares, the best map of each rank, sums over portions."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from spolia.methods.surgery.closed_form import Gram, ridge_map, solve

D, N = 12, 200


def rows(seed: int, count: int = N) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    merged = torch.randn(count, D, generator=draws) + 0.5
    return merged, merged + 0.5 * torch.tanh(merged @ torch.randn(D, D, generator=draws) / D**0.5)


def error(bottleneck: torch.nn.Module, merged: Tensor, expert: Tensor) -> float:
    with torch.no_grad():
        return float((bottleneck(merged) - expert).double().square().mean())


def test_a_change_of_rank_r_is_found_exactly() -> None:
    draws = torch.Generator().manual_seed(0)
    merged = torch.randn(N, D, generator=draws)
    change = torch.randn(D, 3, generator=draws) @ torch.randn(3, D, generator=draws) / 3
    expert = merged - merged @ change
    for rank, ridge in ((3, 0.0), (3, 1e-12), (D, 0.0)):
        made = solve(Gram.empty(D).add(merged, expert), ridge, rank)
        with torch.no_grad():
            assert float((made(merged) - expert).abs().max()) < 1e-5  # the map itself is stored in fp32


def test_an_offset_is_found_exactly() -> None:
    merged, _ = rows(0)
    offset = torch.linspace(-1, 1, D)
    made = solve(Gram.empty(D).add(merged, merged - offset), 0.0, 1)
    with torch.no_grad():
        assert float((made(merged) - merged + offset).abs().max()) < 1e-5  # as above


def test_more_rank_is_never_worse_and_full_rank_is_best() -> None:
    merged, expert = rows(1)
    gram = Gram.empty(D).add(merged, expert)
    errors = [error(solve(gram, 0.0, rank), merged, expert) for rank in range(1, D + 1)]
    assert all(more <= less * (1 + 1e-5) for less, more in itertools.pairwise(errors))  # maps are fp32
    assert errors[-1] < 0.5 * errors[0]


def test_ridge_is_that_of_the_stacked_least_squares() -> None:
    """min |A W - B|^2 + lambda |W|^2 as a plain least-squares problem, and its best map of rank r by an SVD."""
    merged, expert = (x.double() for x in rows(2))
    gram, ridge = Gram.empty(D).add(merged, expert), 0.03
    a = torch.cat([merged, torch.ones(N, 1, dtype=torch.float64)], 1)
    penalty = ridge * (a.T @ a).diagonal().mean()
    tall = torch.cat([a, penalty.sqrt() * torch.eye(D + 1, dtype=torch.float64)])
    right = torch.cat([merged - expert, torch.zeros(D + 1, D, dtype=torch.float64)])
    whole = torch.linalg.lstsq(tall, right).solution
    torch.testing.assert_close(ridge_map(gram, ridge), whole, rtol=0, atol=1e-10)  # normal equations, condition 30
    leading = torch.linalg.svd(tall @ whole).Vh[:4].T
    best = whole @ leading @ leading.T
    made = solve(gram, ridge, 4)
    assert made.shift is not None
    found = torch.cat([made.down.T, made.shift[None]]) @ made.up.T
    torch.testing.assert_close(found.double(), best, rtol=0, atol=1e-6)  # factors are stored in fp32


@given(st.permutations(range(20)), st.lists(st.integers(1, 19), max_size=5))
def test_portions_and_order_do_not_matter(order: list[int], cuts: list[int]) -> None:
    merged, expert = rows(3, 20)
    whole = Gram.empty(D).add(merged, expert)
    ends = [0, *sorted(cuts), 20]
    total = Gram.empty(D)
    for start, stop in itertools.pairwise(ends):
        places = order[start:stop]
        total = total + Gram.empty(D).add(merged[places], expert[places])
    torch.testing.assert_close(total.aa, whole.aa, rtol=1e-13, atol=1e-13)  # fp64 sums of 20 numbers, reordered
    torch.testing.assert_close(ridge_map(total, 0.01), ridge_map(whole, 0.01), rtol=0, atol=1e-9)  # condition below 1e4


@pytest.mark.parametrize("count", [1, 5])
def test_fewer_rows_than_channels_are_fitted_without_a_fault(count: int) -> None:
    merged, expert = rows(4, count)
    for ridge in (0.0, 0.01):
        made = solve(Gram.empty(D).add(merged, expert), ridge, D)
        assert all(p.isfinite().all() for p in made.parameters())
    made = solve(Gram.empty(D).add(merged, expert), 0.0, D)
    with torch.no_grad():
        # as many unknowns as rows allow: an exact fit, up to fp64 sums whose small eigenvalues are cut at 1e-13
        assert float((made(merged) - expert).abs().max()) < 1e-3
