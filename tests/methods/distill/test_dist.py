"""DIST against numpy's correlations, what it does not see, its bounds, one sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from spolia.methods.distill.dist import Dist, dist


def test_it_is_numpys_correlation(drawn: Callable[..., Any]) -> None:
    s, t, _ = drawn(12, 7)
    p, q = (x.softmax(-1).numpy() for x in (s, t))
    inter = [1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)]
    intra = 1 - np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    parts = dist(Dist(beta=1.0, gamma=3.0)).parts(s, t)
    # epsilon 1e-8 beside products of norms of order 0.1
    np.testing.assert_allclose(parts["inter"], inter, atol=1e-6)
    np.testing.assert_allclose(parts["intra"], np.full(12, 3 * intra), atol=1e-6)


def test_it_does_not_see_a_shift_and_has_bounds(drawn: Callable[..., Any]) -> None:
    s, t, _ = drawn(12, 7)
    objective = dist()
    torch.testing.assert_close(objective(s, t + 5), objective(s, t))
    assert objective(t, t).abs().max() < 1e-6  # epsilon again
    for seed in range(10):
        losses = objective(*drawn(12, 7, seed=seed, scale=5.0)[:2])
        assert ((losses >= 0) & (losses <= 8)).all()  # 2 (beta + gamma)
    opposite = dist(Dist(gamma=0.0))(-t[:, :2], t[:, :2])  # two classes, swapped
    # epsilon 1e-8 beside norms that are small where both classes are alike
    torch.testing.assert_close(opposite, torch.full((12,), 4.0, dtype=torch.float64), rtol=1e-4, atol=0)


def test_of_one_sample_there_is_no_relation_among_samples(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(1, 7)
    s.requires_grad_()
    parts = dist().parts(s, t, y)
    assert not parts["intra"].any()
    sum(parts.values()).sum().backward()
    assert s.grad.isfinite().all()


def test_the_temperature(drawn: Callable[..., Any]) -> None:
    s, t, _ = drawn(6, 5)
    torch.testing.assert_close(dist(Dist(temperature=2.0))(s, t), 4 * dist()(s / 2, t / 2))
