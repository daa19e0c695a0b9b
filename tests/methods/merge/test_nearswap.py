"""nearswap against its published weights, and its two ends."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

BOUNDS = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},  # one sum in fp32; the published weight divides and multiplies
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}


def draw(shape: tuple[int, ...] = (4, 6), seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(2, *shape, generator=torch.Generator().manual_seed(seed)))


def merge(expert: torch.Tensor, base: torch.Tensor, t: float) -> torch.Tensor:
    return spolia.merge([{"w": expert}], base={"w": base}, method="nearswap", settings={"t": t})["w"]


def dense(expert: torch.Tensor, base: torch.Tensor, t: float) -> torch.Tensor:
    x, b = expert.double(), base.double()
    w = (t / (x - b).abs().clamp(min=1e-300)).clamp(0, 1)
    return w * x + (1 - w) * b


@settings(max_examples=50, deadline=None)
@given(
    shape=st.sampled_from([(), (5,), (3, 4)]), seed=st.integers(0, 99), t=st.floats(0, 3),
    dtype=st.sampled_from(list(BOUNDS)),
)  # fmt: skip
def test_it_is_the_published_weight(shape: tuple[int, ...], seed: int, t: float, dtype: torch.dtype) -> None:
    base, expert = (x.to(dtype) for x in draw(shape, seed))
    torch.testing.assert_close(merge(expert, base, t).double(), dense(expert, base, t), **BOUNDS[dtype])


def test_over_several_blocks() -> None:
    base, expert = draw((300, 1000))
    torch.testing.assert_close(merge(expert, base, 0.7).double(), dense(expert, base, 0.7), **BOUNDS[torch.float32])


@pytest.mark.parametrize("dtype", list(BOUNDS))
def test_its_ends_are_exact(dtype: torch.dtype) -> None:
    base, expert = (x.to(dtype) for x in draw())
    assert torch.equal(merge(expert, base, 0.0), base)
    assert torch.equal(merge(expert, base, 100.0), expert)


def test_nothing_moves_further_than_t_and_what_is_near_is_swapped() -> None:
    base, expert = draw((1000,))
    got, t = merge(expert, base, 0.25), 0.25
    near = (expert - base).abs() <= t
    assert 0 < int(near.sum()) < 1000
    assert torch.equal(got[near], expert[near])
    assert float((got - base).abs().max()) <= t + 3e-7  # the rounding of numbers below 4


def test_wrong_pools_and_settings_are_named() -> None:
    base, expert = draw()
    with pytest.raises(SpoliaError, match="takes 1 experts beside the base, not 2"):
        spolia.merge([{"w": expert}, {"w": expert}], base={"w": base}, method="nearswap")
    with pytest.raises(SpoliaError, match=r"settings\.t"):
        merge(expert, base, -0.1)
