"""Finite-difference gradients against true ones: exactness, bias, variance, cosine, and what is asked for."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from spolia.core import zeroth
from spolia.core.seeds import generator
from spolia.errors import SpoliaError

D = 64


def counted(f):
    """f with the number of values it was asked for, in `asked`."""
    counts = {"asked": 0}

    def wrapped(points: Tensor) -> Tensor:
        counts["asked"] += points.shape[0] * points.shape[1]
        return f(points)

    return wrapped, counts


def linear(n: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Points v and slopes g [n, D] in fp64: F(x) = <g, x>, another g for each sample."""
    draws = torch.Generator().manual_seed(seed)
    return (torch.randn(n, D, generator=draws, dtype=torch.float64) for _ in range(2))


def cosines(a: Tensor, b: Tensor) -> Tensor:
    return torch.nn.functional.cosine_similarity(a, b, dim=1)


def test_all_directions_at_right_angles_give_the_gradient() -> None:
    v, g = linear(5)
    found = zeroth.estimate(lambda x: (x * g).sum(-1), v, D, generator(0), kind="orthogonal")
    torch.testing.assert_close(found.gradient, g, rtol=0, atol=2e-5)  # directions are fp32, 64 of them
    assert float(found.variance.max()) < 1e-9
    assert found.queries == 5 * (D + 1)


def test_both_sides_cancel_a_curvature_that_one_side_feels() -> None:
    v, g = linear(4)
    curved = lambda x: (x * g).sum(-1) + 3 * x.square().sum(-1)  # noqa: E731
    truth = g + 6 * v
    two = zeroth.estimate(curved, v, D, generator(0), kind="orthogonal", antithetic=True, radius=0.1)
    one = zeroth.estimate(curved, v, D, generator(0), kind="orthogonal", radius=0.1)
    torch.testing.assert_close(two.gradient, truth, rtol=0, atol=2e-4)  # fp32 directions, slopes of tens
    assert float((one.gradient - truth).abs().max()) > 0.1  # radius times curvature
    assert (two.queries, one.queries) == (4 * 2 * D, 4 * (D + 1))


@pytest.mark.parametrize("kind", ["sphere", "orthogonal"])
def test_no_bias_for_a_quadratic_even_with_a_large_radius(kind: str) -> None:
    """The mean over many samples at one point, in units of its standard error as the estimator itself reports it."""
    one, g = (x[0] for x in linear(1))
    n = 8000
    quadratic = lambda x: (x * g).sum(-1) + 0.5 * (x * x * g.abs()).sum(-1)  # noqa: E731
    found = zeroth.estimate(quadratic, one.expand(n, D).clone(), 4, generator(1), kind=kind, radius=0.5)
    truth = g + g.abs() * one
    error = (found.gradient.mean(0) - truth).square().sum()
    expected = found.variance.mean() / n  # of the mean, summed over components
    assert float(error / expected) < 1.6  # of chi square with 64 degrees, over 64: 1.6 is beyond 1 in 1,000


@pytest.mark.parametrize("kind", ["sphere", "orthogonal"])
def test_the_variance_reported_is_the_one_there_is(kind: str) -> None:
    v, g = linear(3000)
    q = 8
    found = zeroth.estimate(lambda x: (x * g).sum(-1), v, q, generator(2), kind=kind)
    lengths = g.square().sum(1)
    missed = ((found.gradient - g).square().sum(1) / lengths).mean()
    reported = (found.variance / lengths).mean()
    theory = (D - q) / q if kind == "orthogonal" else (D - 1) / q
    assert float(missed) == pytest.approx(theory, rel=0.05)  # 3,000 samples: 1 % each
    assert float(reported) == pytest.approx(theory, rel=0.05)


@pytest.mark.parametrize(("kind", "q"), [("sphere", 1), ("sphere", 8), ("sphere", 64), ("orthogonal", 8)])
def test_the_cosine_grows_with_the_directions_as_said(kind: str, q: int) -> None:
    v, g = linear(1500)
    found = zeroth.estimate(lambda x: (x * g).sum(-1), v, q, generator(3), kind=kind)
    reached = cosines(found.gradient, g).square().mean().sqrt()
    assert float(reached) == pytest.approx(
        zeroth.expected_cosine(q, D, kind), rel=0.06
    )  # formula good to 2 %, noise to 3 %


def test_the_mean_cosine_of_one_direction_is_below_its_root_mean_square() -> None:
    """E |u_1| on the sphere is Gamma(d/2) / (sqrt pi Gamma((d+1)/2)): 0.0999 at d = 64, where the root mean square is 1/8."""
    v, g = linear(20000)
    found = zeroth.estimate(lambda x: (x * g).sum(-1), v, 1, generator(4))
    exact = math.exp(math.lgamma(D / 2) - math.lgamma((D + 1) / 2)) / math.sqrt(math.pi)
    assert float(cosines(found.gradient, g).mean()) == pytest.approx(exact, rel=0.02)  # deviation 0.075, 20,000 samples
    assert exact == pytest.approx(0.0999, abs=1e-3)


def test_orthogonal_directions_are_orthogonal_and_of_no_preference() -> None:
    u = zeroth.orthogonal(5, 4000, 6, generator(5))  # [5, 4000, 6]
    gram = torch.einsum("ind,jnd->nij", u, u)
    torch.testing.assert_close(gram, torch.eye(5).expand(4000, 5, 5), rtol=0, atol=1e-5)
    assert float(u.mean((0, 1)).abs().max()) < 0.02  # 20,000 of deviation 0.41
    second = torch.einsum("qnd,qne->de", u, u) / 20000
    torch.testing.assert_close(second, torch.eye(6) / 6, rtol=0, atol=0.01)


def test_chunks_ask_the_same_points() -> None:
    v, g = linear(3)
    seen: list[list[Tensor]] = []
    for chunk in (None, 2, 5):
        points: list[Tensor] = []
        keep = lambda x, points=points: points.append(x) or (x * g).sum(-1)  # noqa: E731
        found = zeroth.estimate(keep, v, 7, generator(6), chunk=chunk)
        seen.append([torch.cat(points), found.gradient])
    for points, gradient in seen[1:]:
        assert torch.equal(points, seen[0][0])
        torch.testing.assert_close(gradient, seen[0][1], rtol=1e-12, atol=1e-10)  # another order of adding


def test_a_known_value_is_not_asked_again() -> None:
    v, g = linear(3)
    f, counts = counted(lambda x: (x * g).sum(-1))
    known = zeroth.estimate(f, v, 4, generator(7), value=(v * g).sum(-1))
    assert counts["asked"] == known.queries == 12
    unknown = zeroth.estimate(f, v, 4, generator(7))
    assert counts["asked"] == 12 + 15 and unknown.queries == 15
    assert torch.equal(known.gradient, unknown.gradient)


def test_a_subspace_gives_the_gradients_part_in_it() -> None:
    basis = zeroth.coarse(1, 8, 4).double()  # [16, 64]
    torch.testing.assert_close(basis @ basis.T, torch.eye(16, dtype=torch.float64), rtol=0, atol=1e-6)
    v, g = linear(4)
    found = zeroth.estimate(lambda x: (x * g).sum(-1), v, 16, generator(8), kind="orthogonal", basis=basis)
    torch.testing.assert_close(found.gradient, g @ basis.T @ basis, rtol=0, atol=2e-5)  # fp32 directions
    smooth = g @ basis.T @ basis  # a gradient that lies in it: an eighth of the directions do what many did
    few = zeroth.estimate(lambda x: (x * smooth).sum(-1), v, 8, generator(8), basis=basis)
    many = zeroth.estimate(lambda x: (x * smooth).sum(-1), v, 8, generator(8))
    assert float(cosines(few.gradient, smooth).mean()) > float(cosines(many.gradient, smooth).mean()) + 0.1


def test_along_given_directions_it_is_the_projection_on_their_span() -> None:
    v, g = linear(3)
    ways = torch.randn(5, 3, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    ways = torch.cat([ways, 3 * ways[:2]])  # two of them twice: nothing new
    found = zeroth.along(lambda x: (x * g).sum(-1), v, ways)
    for i in range(3):
        span = ways[:5, i].T
        wanted = span @ torch.linalg.lstsq(span, g[i]).solution
        torch.testing.assert_close(found.gradient[i], wanted, rtol=0, atol=1e-6)  # differences at radius 1e-3 in fp64
    assert found.queries == 3 * 8
    assert found.variance.isnan().all()


def test_generator_space_sees_what_a_generator_can_reach() -> None:
    """Images that are a linear function of 4 numbers: 4 directions of these suffice for all that it can change."""
    draws = torch.Generator().manual_seed(10)
    matrix = torch.randn(4, D, generator=draws, dtype=torch.float64)
    z, g = (
        torch.randn(6, 4, generator=draws, dtype=torch.float64),
        torch.randn(6, D, generator=draws, dtype=torch.float64),
    )
    moves = torch.randn(4, 6, 4, generator=draws, dtype=torch.float64)
    ways = (z + 0.1 * moves) @ matrix - z @ matrix
    found = zeroth.along(lambda x: (x * g).sum(-1), z @ matrix, ways)
    torch.testing.assert_close(found.gradient @ matrix.T, g @ matrix.T, rtol=0, atol=1e-5)  # by z: exact
    assert not torch.allclose(found.gradient, g, atol=0.1)


def test_the_radius_grows_until_rounding_does_not_hide_the_change() -> None:
    v = torch.zeros(16, D, dtype=torch.float64)
    slope = torch.ones(D, dtype=torch.float64)

    def rounded(x: Tensor) -> Tensor:
        y = x @ slope
        return (torch.stack([y, -y], 1) * 100).round() / 100

    radius, asked = zeroth.clear_radius(rounded, v, generator(11), start=1e-3, most=10.0, resolution=0.01)
    change = (rounded(v + radius * zeroth.sphere(1, 16, D, generator(11))[0].double()) - rounded(v)).abs().amax(1)
    assert float(change.median()) >= zeroth.CLEAR * 0.01
    tries = asked // 16 - 1
    assert radius == pytest.approx(1e-3 * 4 ** (tries - 1))
    assert zeroth.clear_radius(rounded, v, generator(11), resolution=0.0) == (1e-3, 0)
    flat = zeroth.clear_radius(lambda x: torch.zeros(len(x), 2), v, generator(11), most=0.5, resolution=0.01)
    assert flat[0] == 0.5


@pytest.mark.parametrize(
    "how", [{"count": 0}, {"count": 3, "radius": 0.0}, {"count": 3, "chunk": 0}, {"count": D + 1, "kind": "orthogonal"}]
)
def test_what_makes_no_estimate_is_told(how: dict) -> None:
    v, g = linear(2)
    with pytest.raises(SpoliaError, match="give"):
        zeroth.estimate(lambda x: (x * g).sum(-1), v, draws=generator(12), **how)
