"""Spherical interpolation against the formula in fp64, and its geometry."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

State = dict[str, torch.Tensor]
# two products and a sum in fp32, at factors up to 1/sin(angle)
CLOSE = {"rtol": 1e-5, "atol": 1e-6}


def arc(a: torch.Tensor, b: torch.Tensor, t: float) -> torch.Tensor:
    """Shoemake's formula on the flattened tensors: fp64."""
    x, y = a.double().flatten(), b.double().flatten()
    angle = torch.acos((x @ y / (x.norm() * y.norm())).clamp(-1, 1))
    mixed = (torch.sin((1 - t) * angle) * x + torch.sin(t * angle) * y) / torch.sin(angle)
    return mixed.view(a.shape)


def pair(shape: tuple[int, ...] = (4, 6), seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, *shape, generator=noise)
    return a, b


def slerp(a: torch.Tensor, b: torch.Tensor, t: float, **given: Any) -> torch.Tensor:
    return spolia.merge([{"w": a}, {"w": b}], method="slerp", settings={"t": t, **given})["w"]


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(2,), (7,), (3, 4), (2, 3, 5)]),
    t=st.floats(0, 1),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_the_formula_on_the_flattened_tensor(shape: tuple[int, ...], t: float, seed: int, dtype: torch.dtype):
    a, b = (end.to(dtype) for end in pair(shape, seed))
    x, y = a.double().flatten(), b.double().flatten()
    if abs(x @ y / (x.norm() * y.norm())) > 0.999:
        return  # 1/sin magnifies fp32's roundings: test_small_angles
    got = slerp(a, b, t)
    assert got.dtype == dtype
    # bf16 is the fp32 result rounded once: half a unit in 8 bits
    bound = {torch.float64: {"rtol": 1e-12, "atol": 1e-12}, torch.bfloat16: {"rtol": 2**-8, "atol": 1e-3}}
    torch.testing.assert_close(got.double(), arc(a, b, t), **bound.get(dtype, {"rtol": 1e-4, "atol": 3e-5}))


def test_ends_are_exact():
    for seed in range(20):
        a, b = pair(seed=seed)
        assert torch.equal(slerp(a, b, 0.0), a) and torch.equal(slerp(a, b, 1.0), b)
    close = a + 1e-7 * b  # so near that the way is straight
    assert torch.equal(slerp(a, close, 0.0), a) and torch.equal(slerp(a, close, 1.0), close)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_symmetric(t: float):
    a, b = pair()
    torch.testing.assert_close(slerp(a, b, t), slerp(b, a, 1 - t), **CLOSE)


@pytest.mark.parametrize("t", [0.1, 0.5, 0.8])
def test_equal_norms_keep_the_norm(t: float):
    a, b = pair()
    b = b * (a.norm() / b.norm())
    assert float(slerp(a, b, t).norm()) == pytest.approx(float(a.norm()), rel=1e-6)  # fp32 roundings average out


@pytest.mark.parametrize("factor", [3.0, 0.5, -2.0])
def test_along_one_line_it_is_linear(factor: float):
    a, _ = pair()
    torch.testing.assert_close(slerp(a, factor * a, 0.3), torch.lerp(a, factor * a, 0.3), **CLOSE)


@pytest.mark.parametrize("threshold", [1 - 1e-9, 1.0])
@pytest.mark.parametrize("factor", [1.0, 2.0, -1.0])
def test_along_one_line_at_any_threshold(factor: float, threshold: float):
    a, _ = pair()
    got = slerp(a, factor * a, 0.3, dot_threshold=threshold)
    torch.testing.assert_close(got, torch.lerp(a, factor * a, 0.3), **CLOSE)


def test_small_angles():
    a, b = pair()
    near = a + 1e-3 * b  # an angle of about 1e-3: cos differs from 1 in the seventh digit, fp32 alone would lose it
    # 1e-7 is fp32's last digit at size 1: linear interpolation differs by about as much, so only gross errors show
    torch.testing.assert_close(slerp(a, near, 0.3).double(), arc(a, near, 0.3), rtol=1e-5, atol=1e-6)
    apart = torch.tensor([math.cos(0.03), math.sin(0.03)])  # |cos| = 0.99955, beyond mergekit's threshold
    ahead = torch.tensor([1.0, 0.0])
    assert abs(float(slerp(ahead, apart, 0.5).norm()) - 1) < 2e-7  # on the circle: one fp32 rounding
    assert float(slerp(ahead, apart, 0.5, dot_threshold=0.9995).norm()) < 1 - 1e-4  # on the chord: 1 - 0.03^2 / 8


def test_a_zero_tensor_is_walked_to_in_a_straight_line():
    a, _ = pair()
    for t in (0.0, 0.25, 1.0):
        assert torch.equal(slerp(a, torch.zeros_like(a), t), torch.lerp(a, torch.zeros_like(a), t))
        assert torch.equal(slerp(torch.zeros_like(a), a, t), torch.lerp(torch.zeros_like(a), a, t))
    assert not slerp(torch.zeros(3), torch.zeros(3), 0.5).any()


def test_every_tensor_has_its_own_angle():
    first, second = pair(seed=1), pair((5,), seed=2)
    a, b = ({"w": first[k], "v": second[k]} for k in (0, 1))
    merged = spolia.merge([a, b], method="slerp", settings={"t": 0.4})
    for name, ends in (("w", first), ("v", second)):
        torch.testing.assert_close(merged[name].double(), arc(*ends, 0.4), **CLOSE)


def test_the_base_is_where_it_starts():
    a, b = pair()
    beside = spolia.merge([{"w": b}], base={"w": a}, method="slerp", settings={"t": 0.2})["w"]
    assert torch.equal(beside, slerp(a, b, 0.2))


def test_a_tensor_that_only_one_has_is_copied():
    (a, b), head = pair(), torch.arange(4.0).view(2, 2)
    one, other = {"w": a, "lm_head.weight": head}, {"w": b}
    for pool in ([one, other], [other, one]):
        assert torch.equal(spolia.merge(pool, method="slerp")["lm_head.weight"], head)
    for expert, base in ((one, other), (other, one)):
        with pytest.warns(Warning, match="lm_head.weight: copied from"):
            merged = spolia.merge([expert], base=base, method="slerp")
        assert torch.equal(merged["lm_head.weight"], head)


@pytest.mark.parametrize(
    ("experts", "base", "message"),
    [
        (1, False, "takes 2 experts, not 1"),
        (3, False, "takes 2 experts, not 3"),
        (2, True, "takes 1 experts beside the base, not 2"),
    ],
)
def test_two_models_in_all(experts: int, base: bool, message: str):
    pool = [{"w": torch.ones(2)} for _ in range(experts)]
    with pytest.raises(SpoliaError, match=message):
        spolia.merge(pool, base={"w": torch.zeros(2)} if base else None, method="slerp")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"t": (0.1, 0.2)}, r"settings\.t:"),
        ({"dot_threshold": 1.1}, r"settings\.dot_threshold.*less than or equal to 1"),
        ({"dot_treshold": 0.9}, r"did you mean `dot_threshold`"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str):
    with pytest.raises(SpoliaError, match=message):
        spolia.merge([{"w": torch.ones(2)}, {"w": torch.zeros(2)}], method="slerp", settings=given)
