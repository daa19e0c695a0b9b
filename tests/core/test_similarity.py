"""Linear CKA: its definition through Gram matrices, what leaves it alone, and its gradient at identity."""

from __future__ import annotations

import pytest
import torch

from spolia.core.similarity import linear_cka
from spolia.errors import SpoliaError


def normal(*sizes: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize(("n", "d", "e"), [(50, 6, 9), (7, 20, 30)])
def test_it_is_its_definition_by_either_way(n: int, d: int, e: int) -> None:
    a, b = normal(n, d), normal(n, e, seed=1)
    centre = torch.eye(n, dtype=torch.float64) - 1 / n
    k, m = centre @ a @ a.T @ centre, centre @ b @ b.T @ centre
    wanted = (k * m).sum() / (k.norm() * m.norm())
    torch.testing.assert_close(linear_cka(a, b), wanted, rtol=1e-10, atol=0)  # fp64


def test_rotations_scales_and_shifts_change_nothing() -> None:
    a = normal(40, 8)
    turn = torch.linalg.qr(normal(8, 8, seed=2)).Q
    torch.testing.assert_close(linear_cka(a, 3 * a @ turn + 5), torch.ones((), dtype=torch.float64), rtol=1e-10, atol=0)


def test_independent_features_are_hardly_alike() -> None:
    assert float(linear_cka(normal(4000, 5), normal(4000, 5, seed=3))) < 0.01  # (d e)^1/2 / n is 0.001


def test_its_gradient_is_finite_where_both_are_one() -> None:
    a = normal(30, 4).requires_grad_()
    linear_cka(a, a.detach()).backward()
    assert a.grad is not None and a.grad.isfinite().all()
    assert float(a.grad.abs().max()) < 1e-8  # a maximum


def test_features_that_do_not_vary_are_alike_by_nothing() -> None:
    assert float(linear_cka(torch.ones(5, 3), torch.ones(5, 3))) == 0.0
    with pytest.raises(SpoliaError, match="same n inputs"):
        linear_cka(torch.ones(5, 3), torch.ones(4, 3))
