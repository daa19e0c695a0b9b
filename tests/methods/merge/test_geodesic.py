"""nuslerp, multislerp and karcher against dense formulas in fp64, and the geometry they promise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

# fp32 inputs and one combination of them in fp32; shares are fp64
CLOSE = {"rtol": 1e-5, "atol": 3e-6}
BOUNDS = {torch.float64: {"rtol": 1e-9, "atol": 1e-9}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3}}
SHAPES = st.sampled_from([(2,), (9,), (3, 4), (4, 1), (1, 5), (2, 3, 5)])
DTYPES = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])


def draw(count: int, shape: tuple[int, ...] = (4, 6), seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


def merge(method: str, experts: list[torch.Tensor], base: torch.Tensor | None = None, **given: Any) -> torch.Tensor:
    start = {"w": base} if base is not None else None
    return spolia.merge([{"w": x} for x in experts], base=start, method=method, settings=given)["w"]


def unit(experts: list[torch.Tensor]) -> list[torch.Tensor]:
    return [x / x.norm() for x in experts]


# the references, on vectors in fp64


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Along the last dimension."""
    cosine = (a * b).sum(-1, keepdim=True) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True))
    angle = cosine.clamp(-1, 1).acos()
    mixed = (torch.sin((1 - t) * angle) * a + torch.sin(t * angle) * b) / angle.sin()
    return torch.where(angle.sin() < 1e-7, (1 - t) * a + t * b, mixed)


def dense_nuslerp(a: torch.Tensor, b: torch.Tensor, t: float, scope: str) -> torch.Tensor:
    if scope == "tensor" or a.ndim < 2:
        return arc(a.flatten(), b.flatten(), t).view(a.shape)
    if scope == "row":
        return arc(a, b, t)
    return arc(a.transpose(0, -1), b.transpose(0, -1), t).transpose(0, -1)


def dense_multislerp(experts: list[torch.Tensor], weight: torch.Tensor) -> torch.Tensor:
    """With the way to the tangent plane and back, as it is published."""
    x = torch.stack(experts).flatten(1)
    norms = x.norm(dim=1)
    u = x / norms[:, None]
    mean = weight @ u
    mean = mean / mean.norm()
    tangent = weight @ (u - (u @ mean)[:, None] * mean)
    length = tangent.norm() + 1e-8
    there = mean * torch.cos(length) + tangent * torch.sin(length) / length
    return (there * (weight @ norms)).view(experts[0].shape)


def logs(u: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Tangent vectors at u that lead to unit vectors `points` [k, n]."""
    cosine = (points @ u).clamp(-1, 1)
    angle = cosine.acos()
    return (angle / angle.sin().clamp(min=1e-12))[:, None] * (points - cosine[:, None] * u)


# nuslerp


@settings(max_examples=80, deadline=None)
@given(
    shape=SHAPES, scope=st.sampled_from(["tensor", "row", "column"]), weight=st.tuples(*[st.floats(0.1, 2)] * 2),
    seed=st.integers(0, 99), dtype=DTYPES, based=st.booleans(),
)  # fmt: skip
def test_nuslerp_is_the_formula(
    shape: tuple[int, ...], scope: str, weight: tuple[float, float], seed: int, dtype: torch.dtype, based: bool
) -> None:
    a, b, base = (x.to(dtype) for x in draw(3, shape, seed))
    x, y, start = (z.double() if based else w.double() for z, w in ((a - base, a), (b - base, b), (base, 0 * base)))
    if based:  # the differences as fp32 sees them
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        x, y = ((z.to(wide) - base.to(wide)).double() for z in (a, b))
    want = dense_nuslerp(x, y, weight[1] / sum(weight), scope) + start
    got = merge("nuslerp", [a, b], base if based else None, weight=weight, scope=scope)
    assert got.dtype == dtype
    largest = max(float(x.abs().max()), float(y.abs().max()))
    if float(dense_nuslerp(x, y, 0.5, scope).abs().max()) < 20 * largest:  # else nearly antiparallel: all is magnified
        # factors of up to 20 on fp32 roundings of numbers near 1
        torch.testing.assert_close(got.double(), want, **BOUNDS.get(dtype, {"rtol": 1e-4, "atol": 5e-5}))


@pytest.mark.parametrize("scope", ["tensor", "row", "column"])
@pytest.mark.parametrize("shape", [(300, 1000), (1, 300_000), (7, 5, 9000), (300_000,)])
def test_nuslerp_over_several_blocks(shape: tuple[int, ...], scope: str) -> None:
    a, b, base = draw(3, shape)
    want = dense_nuslerp((a - base).double(), (b - base).double(), 0.3, scope) + base.double()
    got = merge("nuslerp", [a, b], base, weight=(0.7, 0.3), scope=scope)
    assert float((want - base).abs().max()) < 50, "rows of this data are too nearly antiparallel to compare"
    torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=5e-5)  # factors of up to 50 on fp32 roundings


def test_nuslerp_at_equal_weights_is_slerp_half_way() -> None:
    a, b = draw(2)
    torch.testing.assert_close(merge("nuslerp", [a, b]), merge("slerp", [a, b], t=0.5), **CLOSE)
    torch.testing.assert_close(merge("nuslerp", [a, b], weight=(3, 1)), merge("slerp", [b, a], t=0.75), **CLOSE)


@pytest.mark.parametrize("scope", ["tensor", "row", "column"])
def test_nuslerp_ends_and_lines(scope: str) -> None:
    a, b = draw(2)
    torch.testing.assert_close(merge("nuslerp", [a, b], weight=(1, 0), scope=scope), a, **CLOSE)
    torch.testing.assert_close(merge("nuslerp", [a, b], weight=(0, 2), scope=scope), b, **CLOSE)
    torch.testing.assert_close(merge("nuslerp", [a, 3 * a], weight=(3, 1), scope=scope), 1.5 * a, **CLOSE)
    # weights that cancel: half way
    half = merge("nuslerp", [a, b], scope=scope)
    torch.testing.assert_close(merge("nuslerp", [a, b], weight=(1, -1), scope=scope), half, **CLOSE)


def test_an_unchanged_tensor_stands_at_a_right_angle() -> None:
    base, a = draw(2)
    want = base + (a - base) * 2**-0.5  # sin(45 degrees)
    torch.testing.assert_close(merge("nuslerp", [a, base], base), want, **CLOSE)
    torch.testing.assert_close(merge("nuslerp", [base, base], base), base, rtol=0, atol=0)


def test_rows_keep_their_norm_where_both_ends_have_it() -> None:
    a, b = (x / x.norm(dim=1, keepdim=True) for x in draw(2, (50, 8)))
    norms = merge("nuslerp", [a, b], weight=(1, 2), scope="row").norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(50), rtol=1e-5, atol=0)  # a dozen fp32 roundings


# multislerp


@settings(max_examples=60, deadline=None)
@given(
    shape=SHAPES, count=st.integers(2, 5), seed=st.integers(0, 99), dtype=DTYPES, normalize=st.booleans(),
    based=st.booleans(),
)  # fmt: skip
def test_multislerp_is_the_published_formula(
    shape: tuple[int, ...], count: int, seed: int, dtype: torch.dtype, normalize: bool, based: bool
) -> None:
    base, *experts = (x.to(dtype) for x in draw(count + 1, shape, seed))
    weight = torch.rand(count, generator=torch.Generator().manual_seed(seed)).double() + 0.1
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    x = [(e.to(wide) - (base.to(wide) if based else 0)).double() for e in experts]
    share = weight / weight.sum() if normalize else weight
    mean = sum(w * v / v.norm() for w, v in zip(share, x, strict=True))
    if float(torch.as_tensor(mean).norm()) < 0.05:
        return  # directions that nearly cancel magnify every rounding
    want = dense_multislerp(x, share) + (base.double() if based else 0)
    given = {"weight": tuple(weight.tolist()), "normalize": normalize}
    got = merge("multislerp", experts, base if based else None, **given)
    # 1e-7 in fp64: what the 1e-8 in the norms leaves
    bounds = {torch.float64: {"rtol": 1e-7, "atol": 1e-6}, torch.bfloat16: {"rtol": 2**-7, "atol": 1e-2}}
    torch.testing.assert_close(got.double(), want, **bounds.get(dtype, {"rtol": 1e-4, "atol": 5e-5}))


def test_multislerp_and_karcher_over_several_blocks() -> None:
    experts = draw(3, (300, 1000))
    wide = [x.double() for x in experts]
    third = torch.full((3,), 1 / 3, dtype=torch.float64)
    want = dense_multislerp(wide, third)
    torch.testing.assert_close(merge("multislerp", experts).double(), want, **CLOSE)
    # so many random numbers are as good as orthogonal: both means are the same direction to the angle's spread
    torch.testing.assert_close(merge("karcher", experts).double(), want, rtol=0, atol=0.02)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_two_unit_vectors_of_equal_weight_are_slerp_half_way(method: str) -> None:
    a, b = unit(draw(2))
    torch.testing.assert_close(merge(method, [a, b]), merge("slerp", [a, b], t=0.5), **CLOSE)


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_the_norm_is_the_mean_norm(method: str) -> None:
    experts, weight = draw(3), (0.5, 0.3, 0.2)
    want = sum(w * float(x.norm()) for w, x in zip(weight, experts, strict=True))
    got = float(merge(method, experts, weight=weight).norm())
    assert got == pytest.approx(want, rel=1e-6)  # fp32 roundings average out over 24 elements


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_of_one_kind_nothing_changes(method: str) -> None:
    a, base = draw(2)
    torch.testing.assert_close(merge(method, [a, a, a]), a, **CLOSE)
    nothing = [torch.zeros(3)] * 3
    assert not merge(method, nothing).any()
    if method == "multislerp":
        torch.testing.assert_close(merge(method, [base, base, base], base), base, rtol=0, atol=0)


def test_opposite_directions() -> None:
    a = torch.tensor([1.0, 0.0])
    assert torch.equal(merge("multislerp", [a, -3 * a]), -a)  # the straight line
    turned = [torch.tensor([1.0, 0.0]), torch.tensor([-0.5, 3**0.5 / 2]), torch.tensor([-0.5, -(3**0.5) / 2])]
    with pytest.raises(SpoliaError, match=r"(?s)w: the experts' directions cancel.*karcher"):
        merge("multislerp", turned)
    assert torch.isfinite(merge("karcher", turned)).all() and torch.isfinite(merge("karcher", [a, -a])).all()


# karcher


@settings(max_examples=40, deadline=None)
@given(count=st.integers(1, 6), seed=st.integers(0, 99), shape=st.sampled_from([(8,), (5, 4)]))
def test_at_karchers_mean_the_pulls_cancel(count: int, seed: int, shape: tuple[int, ...]) -> None:
    """The condition that defines it: sum_k w_k log_u(u_k) = 0."""
    offset = draw(1, shape, 1000 + seed)[0] * 2  # within a hemisphere, where the mean is unique
    experts = [(offset + x).double() for x in draw(count, shape, seed)]
    weight = torch.arange(1, count + 1).double()
    got = merge("karcher", experts, weight=tuple(weight.tolist())).flatten()
    points = torch.stack([x.flatten() / x.norm() for x in experts])
    pull = (weight / weight.sum()) @ logs(got / got.norm(), points)
    assert float(pull.norm()) < 1e-6  # the iteration stops below 1e-7


def test_karcher_of_two_is_the_point_on_their_arc() -> None:
    a, b = unit(draw(2))
    for t in (0.1, 0.5, 0.75):
        got = merge("karcher", [a, b], weight=(1 - t, t))
        torch.testing.assert_close(got, merge("slerp", [a, b], t=t), **CLOSE)


def test_a_zero_has_a_norm_but_no_direction() -> None:
    a, b = draw(2)
    got = merge("karcher", [a, b, torch.zeros_like(a)])
    torch.testing.assert_close(got, merge("karcher", [a, b]) * (2 / 3), **CLOSE)


def test_iterations_can_be_left_out() -> None:
    experts = draw(3)
    first = merge("karcher", experts, max_iter=0)
    torch.testing.assert_close(first, merge("multislerp", experts), **CLOSE)  # the normalised mean
    assert not torch.allclose(first, merge("karcher", experts), atol=1e-4)


# who takes part


@pytest.mark.parametrize(
    ("method", "count", "based", "message"),
    [
        ("nuslerp", 1, False, "takes 2 experts, not 1"),
        ("nuslerp", 3, True, "takes 2 experts beside the base, not 3"),
        ("multislerp", 1, True, "takes at least 2 experts beside the base, not 1"),
    ],
)
def test_numbers_of_models(method: str, count: int, based: bool, message: str) -> None:
    with pytest.raises(SpoliaError, match=message):
        merge(method, draw(count), draw(1)[0] if based else None)


@pytest.mark.parametrize(
    ("method", "given", "message"),
    [
        ("multislerp", {"weight": (1, -1)}, "sum to zero"),
        ("karcher", {"weight": 0}, "sum to zero"),
        ("nuslerp", {"scope": "rows"}, r"settings\.scope"),
    ],
)
def test_wrong_settings_are_named(method: str, given: dict[str, Any], message: str) -> None:
    with pytest.raises(SpoliaError, match=message):
        merge(method, draw(2), **given)


def test_multislerp_bears_a_zero_sum_where_it_does_not_divide() -> None:
    a, b = draw(2)
    assert torch.isfinite(merge("multislerp", [a, b], weight=(1, -1), normalize=False)).all()


def test_a_tensor_of_one_expert_is_copied() -> None:
    (a, b), head = draw(2), torch.arange(4.0).view(2, 2)
    for method in ("nuslerp", "multislerp", "karcher"):
        merged = spolia.merge([{"w": a, "lm_head.weight": head}, {"w": b}], method=method)
        assert torch.equal(merged["lm_head.weight"], head)
