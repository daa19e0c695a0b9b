"""magmax against an argmax in fp64, and what choosing element by element implies."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia

BOUNDS = {
    torch.float32: {"rtol": 1e-6, "atol": 1e-6},  # a difference, a product and a sum in fp32
    torch.float64: {"rtol": 1e-14, "atol": 1e-14},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}


def draw(count: int, shape: tuple[int, ...] = (4, 6), seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


def merge(experts: list[torch.Tensor], base: torch.Tensor, scale: float = 0.5) -> torch.Tensor:
    return spolia.merge([{"w": x} for x in experts], base={"w": base}, method="magmax", settings={"scale": scale})["w"]


def dense(experts: list[torch.Tensor], base: torch.Tensor, scale: float) -> torch.Tensor:
    taus = torch.stack([x.double() - base.double() for x in experts])
    return base.double() + scale * taus.gather(0, taus.abs().argmax(0, keepdim=True))[0]


@settings(max_examples=50, deadline=None)
@given(
    shape=st.sampled_from([(), (5,), (3, 4)]), count=st.integers(1, 5), seed=st.integers(0, 99),
    scale=st.floats(-1, 2), dtype=st.sampled_from(list(BOUNDS)),
)  # fmt: skip
def test_it_is_the_largest_change(
    shape: tuple[int, ...], count: int, seed: int, scale: float, dtype: torch.dtype
) -> None:
    base, *experts = (x.to(dtype) for x in draw(count + 1, shape, seed))
    torch.testing.assert_close(merge(experts, base, scale).double(), dense(experts, base, scale), **BOUNDS[dtype])


def test_over_several_blocks() -> None:
    base, *experts = draw(4, (300, 1000))
    torch.testing.assert_close(merge(experts, base).double(), dense(experts, base, 0.5), **BOUNDS[torch.float32])


def test_one_expert_at_full_scale_is_the_expert() -> None:
    base, expert = (x.round(decimals=1) for x in draw(2))
    torch.testing.assert_close(merge([expert], base, 1.0), expert, **BOUNDS[torch.float32])
    assert torch.equal(merge([expert], base, 0.0), base)


def test_changes_that_do_not_meet_are_added() -> None:
    base = draw(1, (6,))[0]
    experts = [base + torch.eye(6)[k] for k in range(3)]
    summed = spolia.merge(
        [{"w": x} for x in experts], base={"w": base}, method="task_arithmetic", settings={"scale": 1}
    )
    assert torch.equal(merge(experts, base, 1.0), summed["w"])


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_equally_large_changes_are_decided_by_sign(order: tuple[int, ...]) -> None:
    experts = [torch.tensor([1.0, -2.0, -0.5]), torch.tensor([-1.0, -2.0, 0.25]), torch.tensor([0.5, 2.0, 0.5])]
    got = merge([experts[k] for k in order], torch.zeros(3), 1.0)
    assert torch.equal(got, torch.tensor([1.0, 2.0, 0.5]))
