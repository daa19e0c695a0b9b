"""The low-rank core against dense SVDs."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.lowrank import shared_basis, shared_basis_dense, svd_of_sum

CLOSE = {"rtol": 0, "atol": 1e-11}  # fp64 with norms of some tens
Pairs = list[tuple[torch.Tensor, torch.Tensor]]


def pairs(out: int, into: int, ranks: list[int], seed: int = 0) -> Pairs:
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise, dtype=torch.float64)

    return [(draw(out, r), draw(r, into)) for r in ranks]


shapes = st.tuples(st.integers(1, 12), st.integers(1, 12))
ranks = st.lists(st.integers(1, 5), min_size=1, max_size=4)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, ranks=ranks, seed=st.integers(0, 99))
def test_the_sum(shape: tuple[int, int], ranks: list[int], seed: int):
    factors = pairs(*shape, ranks, seed)
    total = torch.stack([b @ a for b, a in factors]).sum(0)
    u, s, vt = svd_of_sum(factors)
    torch.testing.assert_close((u * s) @ vt, total, **CLOSE)
    torch.testing.assert_close(s, torch.linalg.svdvals(total)[: len(s)], **CLOSE)
    assert len(s) == min(*shape, sum(ranks))
    for side in (u.t() @ u, vt @ vt.t()):
        torch.testing.assert_close(side, torch.eye(len(s), dtype=torch.float64), **CLOSE)


@settings(max_examples=60, deadline=None)
@given(shape=shapes, ranks=ranks, seed=st.integers(0, 99))
def test_the_shared_basis(shape: tuple[int, int], ranks: list[int], seed: int):
    factors = pairs(*shape, ranks, seed)
    changes = [b @ a for b, a in factors]
    thin, dense = shared_basis(factors), shared_basis_dense(changes)
    torch.testing.assert_close(thin.values, dense.values[: len(thin.values)], **CLOSE)
    for found in (thin, dense):
        for coordinates, change in zip(found.coordinates, changes, strict=True):
            torch.testing.assert_close(found.basis @ coordinates, change, **CLOSE)
        square = torch.stack([c @ c.t() for c in found.coordinates]).sum(0)  # S V^T V S
        torch.testing.assert_close(square, torch.diag(found.values**2), rtol=0, atol=1e-9)  # squares of some tens
        eye = torch.eye(len(found.values), dtype=torch.float64)
        torch.testing.assert_close(found.basis.t() @ found.basis, eye, **CLOSE)


def test_vectors_agree_up_to_sign():
    factors = pairs(30, 20, [3, 3])
    thin = shared_basis(factors)
    dense = torch.linalg.svd(torch.cat([b @ a for b, a in factors], 1), full_matrices=False)
    cosines = (thin.basis * dense[0][:, :6]).sum(0).abs()
    torch.testing.assert_close(cosines, torch.ones(6, dtype=torch.float64), rtol=0, atol=1e-12)  # well apart


def test_the_floor_drops_directions():
    factors = pairs(8, 8, [2])
    factors[0][0][:, 1] *= 1e-9
    assert len(shared_basis(factors, 1e-5).values) == 1
    assert len(shared_basis_dense([b @ a for b, a in factors], 1e-5).values) == 1
    assert len(shared_basis(factors).values) == 2
    empty = shared_basis([(torch.zeros(4, 2), torch.zeros(2, 3))], 1e-5)
    assert empty.basis.shape == (4, 0) and empty.coordinates[0].shape == (0, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_comes_in_and_fp64_goes_out(dtype: torch.dtype):
    factors = [(b.to(dtype), a.to(dtype)) for b, a in pairs(6, 5, [2, 2])]
    found = shared_basis(factors)
    assert found.basis.dtype == torch.float64
    torch.testing.assert_close(
        found.basis @ found.coordinates[0], factors[0][0].double() @ factors[0][1].double(), **CLOSE
    )
