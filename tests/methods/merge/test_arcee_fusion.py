"""arcee_fusion against softmax, KL and sorted quantiles in fp64, and what is taken and what is left."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

DTYPES = [torch.float32, torch.float64, torch.bfloat16]


def draw(shape: tuple[int, ...] = (4, 6), seed: int = 0, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=noise)
    return [base.to(dtype), (base + torch.randn(shape, generator=noise) * 0.3).to(dtype)]


def merge(expert: torch.Tensor, base: torch.Tensor, **given: Any) -> torch.Tensor:
    return spolia.merge([{"w": expert}], base={"w": base}, method="arcee_fusion", settings=given)["w"]


def importance(expert: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    x, b = expert.double(), base.double()
    p, q = x.softmax(-1) + 1e-8, b.softmax(-1) + 1e-8
    return (x - b).abs() * (p * (p / q).log()).sum(-1, keepdim=True)


def threshold(values: torch.Tensor, spread: float) -> float:
    ordered = values.flatten().sort().values
    low, median, high = (float(ordered[int(q * (len(ordered) - 1))]) for q in (0.25, 0.5, 0.75))
    return median + spread * (high - low)


def check(base: torch.Tensor, expert: torch.Tensor, got: torch.Tensor, spread: float) -> None:
    """Every element is one of the two; only those within a rounding of the threshold may go either way."""
    values = importance(expert, base)
    cut = threshold(values, spread)
    want = torch.where(values >= cut, expert, base)
    sure = (values - cut).abs() > 1e-5 * abs(cut) + 1e-12  # importances are fp32, from rows of fp64
    assert torch.equal(got[sure], want[sure])
    assert bool(((got == expert) | (got == base)).all())


@settings(max_examples=60, deadline=None)
@given(
    shape=st.sampled_from([(5,), (3, 4), (2, 3, 5), (4, 1)]), seed=st.integers(0, 99),
    spread=st.sampled_from([0.0, 0.4, 1.5, 3.0]), dtype=st.sampled_from(DTYPES),
)  # fmt: skip
def test_it_is_the_published_threshold(shape: tuple[int, ...], seed: int, spread: float, dtype: torch.dtype) -> None:
    base, expert = draw(shape, seed, dtype)
    got = merge(expert, base, spread=spread)
    assert got.dtype == dtype
    check(base, expert, got, spread)


@pytest.mark.parametrize("shape", [(300, 1000), (2, 200_000), (300_000,), (100_000, 3)])
def test_over_several_blocks(shape: tuple[int, ...]) -> None:
    base, expert = draw(shape)
    got = merge(expert, base)
    check(base, expert, got, 1.5)
    assert 0.01 < float((got == expert).float().mean()) < 0.3  # what stands out is a small share


def test_a_fine_tune_so_close_that_fp32_loses_its_divergence() -> None:
    """KL of about 1e-9 beside sums of about 1: the rows still rank as in fp64."""
    base, change = draw((40, 500))
    expert = base + 1e-4 * (change - base) * torch.logspace(0, -1, 40)[:, None]
    check(base, expert, merge(expert, base), 1.5)


def test_no_change_is_the_expert_and_no_number_is_lost() -> None:
    base, expert = draw()
    assert torch.equal(merge(base, base), base)
    assert torch.equal(merge(expert, base, spread=-1e9), expert)
    assert torch.equal(merge(expert, base, spread=1e9), base)


def test_what_few_rows_changed_is_taken_whole() -> None:
    """The median and the quartiles are 0, and so is the threshold."""
    base, change = draw((20, 8))
    expert = base.clone()
    expert[3] = change[3]
    assert torch.equal(merge(expert, base), expert)


@pytest.mark.parametrize("broken", ["expert", "base"])
def test_nan_is_found(broken: str) -> None:
    base, expert = draw()
    (expert if broken == "expert" else base)[1, 2] = torch.nan
    with pytest.raises(SpoliaError, match="first at element 8"):
        merge(expert, base)


def test_two_experts_are_too_many() -> None:
    base, expert = draw()
    with pytest.raises(SpoliaError, match="takes 1 experts beside the base, not 2"):
        spolia.merge([{"w": expert}, {"w": expert}], base={"w": base}, method="arcee_fusion")
