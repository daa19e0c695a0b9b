"""sce against select, calculate and erase written densely in fp64, its ties, and where it becomes other methods."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

BOUNDS = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},  # a weighted sum, a quotient and a sum in fp32
    torch.float64: {"rtol": 1e-12, "atol": 1e-12},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}


def draw(count: int, shape: tuple[int, ...] = (4, 6), seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


def merge(experts: list[torch.Tensor], base: torch.Tensor, **given: Any) -> torch.Tensor:
    return spolia.merge([{"w": x} for x in experts], base={"w": base}, method="sce", settings=given)["w"]


def dense(experts: list[torch.Tensor], base: torch.Tensor, density: float = 1.0, floor: float = 0.0) -> torch.Tensor:
    wide = torch.float64 if base.dtype == torch.float64 else torch.float32
    taus = torch.stack([x.to(wide) - base.to(wide) for x in experts]).reshape(
        len(experts), -1
    )  # differences as fp32 sees them
    if density < 1:
        variance = taus.double().var(0, correction=0)
        kept = int(density * int((variance > 0).sum()) + 1e-9)
        order = variance.argsort(descending=True, stable=True)
        mask = torch.zeros(taus.shape[1])
        mask[order[:kept]] = 1
        taus = taus * mask
    taus = taus.double()
    energy = taus.square().mean(1)
    weight = energy / energy.sum() if energy.sum() > floor else torch.full_like(energy, 1 / len(energy))
    majority = torch.where(taus.sum(0) >= 0, 1.0, -1.0)
    keep = (taus.sign() == majority) * weight[:, None]
    return (taus * keep).sum(0).div(keep.sum(0).clamp(min=max(floor, 1e-300))).view(base.shape) + base.double()


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(), (7,), (3, 4)]), count=st.integers(1, 5), seed=st.integers(0, 99),
    density=st.sampled_from([0.0, 0.1, 0.29, 0.5, 1.0]), dtype=st.sampled_from(list(BOUNDS)),
)  # fmt: skip
def test_it_is_select_calculate_erase(
    shape: tuple[int, ...], count: int, seed: int, density: float, dtype: torch.dtype
) -> None:
    base, *experts = (x.to(dtype) for x in draw(count + 1, shape, seed))
    got = merge(experts, base, density=density)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), dense(experts, base, density), **BOUNDS[dtype])


@pytest.mark.parametrize("density", [0.1, 1.0])
def test_over_several_blocks(density: float) -> None:
    base, *experts = draw(4, (300, 1000))
    want = dense(experts, base, density)
    torch.testing.assert_close(merge(experts, base, density=density).double(), want, **BOUNDS[torch.float32])


def test_equal_variances_are_taken_by_index() -> None:
    """Over several blocks, so that the places left must be remembered from one to the next."""
    n = 300_000
    base, signs = torch.zeros(n), torch.where(torch.arange(n) % 3 == 0, -1.0, 1.0)
    got = merge([signs, 3 * signs], base, density=0.6)  # variance 1 everywhere
    assert int((got != 0).sum()) == 180_000 and not got[180_000:].any()
    torch.testing.assert_close(got[:180_000], 2.8 * signs[:180_000])  # shares .1 and .9; default fp32 tolerance


def test_only_elements_that_differ_are_counted() -> None:
    base = torch.zeros(10)
    a, b = torch.ones(10), torch.ones(10)
    b[:4] = torch.tensor([2.0, 3.0, 4.0, 5.0])
    got = merge([a, b], base, density=0.5)  # half of four
    assert got.nonzero().flatten().tolist() == [2, 3]


def test_equal_changes_of_one_sign_are_the_average() -> None:
    base, a = draw(2)
    b = base + (a - base).flatten().flip(0).view(4, 6).abs()
    a = base + (a - base).abs()  # the same squares, other places, no minority
    average = spolia.merge([{"w": a}, {"w": b}], method="average")["w"]
    torch.testing.assert_close(merge([a, b], base), average, **BOUNDS[torch.float32])


def test_one_expert_is_itself_but_has_no_variance() -> None:
    base, a = draw(2)
    torch.testing.assert_close(merge([a], base), a, **BOUNDS[torch.float32])
    assert torch.equal(merge([a], base, density=0.5), base)
    assert torch.equal(merge([base, base], base), base)


def test_small_changes_weigh_equally_below_the_floor() -> None:
    base, a, b = draw(3)
    small = [base + 1e-4 * a, base + 3e-4 * b]  # mean squares of about 1e-8 and 1e-7
    for floor in (0.0, 1e-6):
        want = dense(small, base, floor=floor)
        torch.testing.assert_close(merge(small, base, floor=floor).double(), want, rtol=0, atol=5e-7)
    assert float((dense(small, base) - dense(small, base, floor=1e-6)).abs().max()) > 1e-5  # the two differ


def test_the_minority_is_erased_and_a_tie_is_positive() -> None:
    base = torch.zeros(3)
    experts = [torch.tensor([1.0, 1.0, 2.0]), torch.tensor([1.0, -1.0, -3.0]), torch.tensor([-1.0, 0.0, 2.0])]
    got = merge(experts, base)
    assert float(got[0]) == 1 and float(got[1]) == 1 and float(got[2]) == 2


def test_wrong_settings_are_named() -> None:
    with pytest.raises(SpoliaError, match=r"settings\.density.*less than or equal to 1"):
        merge(draw(2), draw(1)[0], density=1.5)
