"""Weighted averages against plain sums in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

State = dict[str, torch.Tensor]
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
# K roundings of sums of K numbers of size 1 to 4 with weights up to 2; then the stored type, where bf16 may differ by
# one unit in the last place
ATOL = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2e-5}
RTOL = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2**-7}


def experts(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> list[State]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 5), "b": (4,), "s": ()}
    return [
        {name: torch.randn(shape, generator=noise).to(dtype) for name, shape in shapes.items()} for _ in range(count)
    ]


def close(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        want = wanted[name].to(value.dtype)
        torch.testing.assert_close(value, want, rtol=RTOL[value.dtype], atol=ATOL[value.dtype])


@settings(max_examples=25, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1.0, 0.5, 0.25, -0.25, 2.0, 0.3, 0.0]), min_size=1, max_size=6),
    dtype=st.sampled_from(list(DTYPES)),
    normalize=st.booleans(),
    seed=st.integers(0, 99),
)
@example(weights=[1.0] * 6, dtype="bf16", normalize=True, seed=0)
def test_weighted_sum_over_the_sum_of_weights(weights: list[float], dtype: str, normalize: bool, seed: int):
    pool = experts(len(weights), DTYPES[dtype], seed)
    total = sum(weights)
    if normalize and abs(total) < 0.2:
        return  # see test_weights_that_cancel
    summed = {n: sum(w * e[n].double() for w, e in zip(weights, pool, strict=True)) for n in pool[0]}
    wanted = {n: v / (total if normalize else 1.0) for n, v in summed.items()}
    given_weights: Any = tuple(weights)
    close(spolia.merge(pool, settings={"weight": given_weights, "normalize": normalize}), wanted)


def test_one_weight_for_all_cancels_out():
    pool = experts(3)
    uniform = {n: torch.stack([e[n] for e in pool]).double().mean(0) for n in pool[0]}
    close(spolia.merge(pool), uniform)
    close(spolia.merge(pool, settings={"weight": 0.1}), uniform)
    close(spolia.merge(pool, settings={"weight": 0.1, "normalize": False}), {n: 0.3 * v for n, v in uniform.items()})


def test_linear_is_its_other_name():
    pool = experts(2)
    ours, theirs = (spolia.merge(pool, method=name) for name in ("average", "linear"))
    assert all(torch.equal(ours[n], theirs[n]) for n in ours)


def test_the_base_is_left_aside():
    pool, base = experts(2), experts(1, seed=7)[0]
    alone = spolia.merge(pool)
    with pytest.warns(Warning, match="does not use the base"):
        beside = spolia.merge(pool, base=base)
    assert all(torch.equal(alone[n], beside[n]) for n in alone)


def test_weights_that_cancel_are_refused():
    with pytest.raises(SpoliaError, match="weight"):
        spolia.merge(experts(2), settings={"weight": (1.0, -1.0)})


def test_a_tensor_that_one_expert_lacks_is_the_mean_of_the_others():
    pool = experts(3)
    for k in (0, 2):  # heads may be missing; who has one weighs as before
        pool[k]["lm_head.weight"] = torch.full((2, 2), float(k + 1))
    merged = spolia.merge(pool, settings={"weight": (1.0, 5.0, 3.0)})
    torch.testing.assert_close(merged["lm_head.weight"], torch.full((2, 2), (1 * 1 + 3 * 3) / 4))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": (1.0, 2.0)}, r"settings\.weight.*2 values for 3 experts"),
        ({"wieght": 1.0}, r"settings\.wieght.*no such setting[\s\S]*did you mean `weight`"),
        ({"weight": "much"}, r"settings\.weight"),
        ({"normalize": "perhaps"}, r"settings\.normalize"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str):
    with pytest.raises(SpoliaError, match=message):
        spolia.merge(experts(3), settings=given)


@pytest.mark.parametrize("weight", [1e308, -1e31, (1e308, 1.0)])
def test_a_weight_beyond_the_arithmetic_is_refused(weight: float | tuple[float, float]):
    """1e308 twice sums to inf, and dividing by it would write zeros."""
    with pytest.raises(spolia.SpoliaError, match="more than the arithmetic can carry"):
        spolia.merge([{"a": torch.ones(2)}] * 2, method="average", settings={"weight": weight})
