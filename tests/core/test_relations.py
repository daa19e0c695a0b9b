"""Relations of samples: correlations against numpy, distances and angles of hand-made points, Gram matrices."""

from __future__ import annotations

import numpy as np
import torch

from spolia.core import relations as r


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_pearson_is_numpys() -> None:
    x, y = drawn(6, 9), drawn(6, 9, seed=1)
    rows = [np.corrcoef(a, b)[0, 1] for a, b in zip(x, y, strict=True)]
    columns = [np.corrcoef(a, b)[0, 1] for a, b in zip(x.T, y.T, strict=True)]
    # epsilon 1e-8 beside a product of norms of order ten
    np.testing.assert_allclose(r.pearson(x, y, 1), rows, atol=1e-8)
    np.testing.assert_allclose(r.pearson(x, y, 0), columns, atol=1e-8)


def test_a_constant_correlates_with_nothing() -> None:
    x = torch.ones(4, 5, dtype=torch.float64, requires_grad=True)
    found = r.pearson(x, drawn(4, 5), 1)
    assert not found.any()
    assert not r.pearson(drawn(4, 5), torch.ones(4, 5), 1).any()


def test_distances_of_a_right_triangle() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    mean = (3 + 4 + 5) / 3
    expected = torch.tensor([[0.0, 3, 4], [3, 0, 5], [4, 5, 0]]) / mean
    torch.testing.assert_close(r.distances(points), expected)
    torch.testing.assert_close(r.distances(7 * points + 2), expected)  # scale and place are not related


def test_angles_of_a_right_triangle() -> None:
    points = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    cosines = r.cosines(points)
    found = [float(cosines[0, 1, 2]), float(cosines[1, 0, 2]), float(cosines[2, 0, 1])]
    np.testing.assert_allclose(found, [0.0, 3 / 5, 4 / 5], atol=1e-6)  # fp32
    ones = [(i, j, j) for i in range(3) for j in range(3) if i != j]
    np.testing.assert_allclose([float(cosines[place]) for place in ones], 1.0, rtol=1e-6)
    assert not any(cosines[i, i].any() or cosines[i, :, i].any() for i in range(3))


def test_points_that_coincide_have_a_gradient() -> None:
    points = torch.tensor([[1.0, 2.0], [1.0, 2.0], [0.0, 1.0]], requires_grad=True)
    for relation in (r.distances, r.cosines):
        (slope,) = torch.autograd.grad(relation(points).square().sum(), points)
        assert slope.isfinite().all()
        assert slope.abs().max() < 100
    same = torch.zeros(3, 2, requires_grad=True)
    assert not r.distances(same).any()
    assert not r.distances(torch.ones(1, 4)).any()


def test_gradients() -> None:
    points = drawn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(r.distances, points)
    assert torch.autograd.gradcheck(r.cosines, points)
    assert torch.autograd.gradcheck(lambda x: r.pearson(x, drawn(4, 3, seed=1), 0), points)


def test_grams_element_by_element() -> None:
    p, q = drawn(3, 4).softmax(-1), drawn(3, 4, seed=1).softmax(-1)
    rows = [sum(float(q[i] @ q[j] - p[i] @ p[j]) ** 2 for j in range(3)) for i in range(3)]
    np.testing.assert_allclose(r.sample_gram(p, q), rows, rtol=1e-12)
    kept = torch.tensor([True, False, False, True])
    apart = [[float(q[:, a] @ q[:, b] - p[:, a] @ p[:, b]) ** 2 for b in range(4)] for a in range(4)]
    np.testing.assert_allclose(float(r.class_gram(p, q)), np.sum(apart) / 4, rtol=1e-12)
    np.testing.assert_allclose(float(r.class_gram(p, q, kept)), np.array(apart)[:, [0, 3]].sum() / 4, rtol=1e-12)
