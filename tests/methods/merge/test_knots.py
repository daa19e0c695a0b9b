"""KnOTS: what it becomes with simpler merges, and that factors and dense changes give the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.methods.merge.knots import Knots, knots, knots_dense

CLOSE = {"rtol": 0, "atol": 1e-11}  # fp64 with norms of some tens


def pairs(ranks: list[int], out: int = 10, into: int = 14, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor]]:
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    return [(draw(out, r), draw(r, into)) for r in ranks]


def trimmed(changes: list[torch.Tensor], density: float) -> torch.Tensor:
    """TIES on the coordinates of a dense SVD, by sorting."""
    wide = torch.cat(changes, dim=1)
    u, s, v = torch.linalg.svd(wide, full_matrices=False)
    kept = s > 1e-5
    parts = (s[kept, None] * v[kept]).split(changes[0].shape[1], dim=1)
    cut = []
    for part in parts:
        flat = part.flatten()
        level = flat.abs().sort(descending=True)[0][round(density * flat.numel()) - 1]
        cut.append(torch.where(part.abs() >= level, part, 0.0))
    stack = torch.stack(cut)
    sign = torch.where(stack.sum(0) >= 0, 1.0, -1.0)
    agree = stack * sign > 0
    return u[:, kept] @ ((stack * agree).sum(0) / agree.sum(0).clamp(min=1))


@settings(max_examples=40, deadline=None)
@given(ranks=st.lists(st.integers(1, 4), min_size=1, max_size=4), seed=st.integers(0, 99))
def test_adding_in_the_basis_is_adding(ranks: list[int], seed: int):
    factors = pairs(ranks, seed=seed)
    total = torch.stack([b @ a for b, a in factors]).sum(0)
    torch.testing.assert_close(knots(factors, Knots(combine="sum", scale=0.5)), 0.5 * total, **CLOSE)
    weights = tuple(float(k + 1) for k in range(len(ranks)))
    weighed = torch.stack([w * b @ a for w, (b, a) in zip(weights, factors, strict=True)]).sum(0)
    torch.testing.assert_close(knots(factors, Knots(combine="sum", scale=1.0, weight=weights)), weighed, **CLOSE)


@settings(max_examples=40, deadline=None)
@given(ranks=st.lists(st.integers(1, 4), min_size=2, max_size=4), seed=st.integers(0, 99))
@pytest.mark.slow
def test_ties_in_the_basis(ranks: list[int], seed: int):
    factors = pairs(ranks, seed=seed)
    changes = [b @ a for b, a in factors]
    expected = trimmed(changes, 0.2)
    # the signs of singular vectors are free, and TIES does not see them: both flip the coordinates of all experts
    torch.testing.assert_close(knots(factors, Knots(scale=1.0)), expected, **CLOSE)
    torch.testing.assert_close(knots_dense(changes, Knots(scale=1.0)), expected, **CLOSE)


@pytest.mark.parametrize(
    "given",
    [
        {"combine": "ties", "density": 1.0},
        {"combine": "dare", "density": 1.0},
        {"combine": "dare_ties", "density": 1.0},
    ],
)
def test_one_adapter_kept_whole_is_itself(given: dict[str, Any]):
    (b, a) = pairs([3])[0]
    torch.testing.assert_close(knots([(b, a)], Knots(scale=1.0, **given)), b @ a, **CLOSE)


@pytest.mark.parametrize("combine", ["dare", "dare_ties"])
def test_coins_follow_seed_and_name(combine: str):
    factors, chosen = pairs([3, 3]), Knots(combine=combine, density=0.5)
    first = knots(factors, chosen, seed=1, name="q")
    assert torch.equal(first, knots(factors, chosen, seed=1, name="q"))
    assert not torch.equal(first, knots(factors, chosen, seed=2, name="q"))
    assert not torch.equal(first, knots(factors, chosen, seed=1, name="v"))


def test_small_directions_are_dropped():
    (b, a), other = pairs([2, 2])
    b[:, 1] *= 1e-8
    got = knots([(b, a), (other[0] * 0, other[1])], Knots(combine="sum", scale=1.0))
    torch.testing.assert_close(got, b @ a, rtol=0, atol=1e-5)  # the floor
    assert torch.linalg.matrix_rank(got) == 1


def test_the_order_of_adapters_does_not_count():
    factors = pairs([2, 3, 1])
    torch.testing.assert_close(knots(factors, Knots()), knots(factors[::-1], Knots()), **CLOSE)
