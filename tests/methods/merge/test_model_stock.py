"""model_stock against the paper's ratio in fp64, and the cases in which it is one of its two ends."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

BOUNDS = {
    torch.float32: {"rtol": 1e-5, "atol": 3e-6},  # a sum of K products in fp32; t is fp64
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},  # one unit of 8 bits
}


def draw(count: int, shape: tuple[int, ...] = (4, 6), seed: int = 0) -> list[torch.Tensor]:
    return list(torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)))


def merge(experts: list[torch.Tensor], base: torch.Tensor, **given: Any) -> torch.Tensor:
    return spolia.merge([{"w": x} for x in experts], base={"w": base}, method="model_stock", settings=given)["w"]


def dense(
    experts: list[torch.Tensor], base: torch.Tensor, scope: str = "tensor", clamp: bool = True, least: float = 0.0
) -> torch.Tensor:
    """Everything in fp64 along the last dimension."""
    if scope == "tensor":
        return dense([x.flatten() for x in experts], base.flatten(), "row", clamp, least).view(base.shape)
    cosines = [
        (a * b).sum(-1, keepdim=True) / (a.norm(dim=-1, keepdim=True) * b.norm(dim=-1, keepdim=True)).clamp(min=least)
        for a, b in combinations([(x - base).double() for x in experts], 2)
    ]
    cosine = torch.stack(cosines).mean(0)
    if clamp:
        cosine = cosine.clamp(min=0)
    n = len(experts)
    t = n * cosine / (1 + (n - 1) * cosine)
    return t * torch.stack(experts).double().mean(0) + (1 - t) * base.double()


@settings(max_examples=80, deadline=None)
@given(
    shape=st.sampled_from([(2,), (9,), (3, 4), (2, 3, 5)]), count=st.integers(2, 5), seed=st.integers(0, 99),
    scope=st.sampled_from(["tensor", "row"]), together=st.floats(0, 2), dtype=st.sampled_from(list(BOUNDS)),
)  # fmt: skip
def test_it_is_the_papers_ratio(
    shape: tuple[int, ...], count: int, seed: int, scope: str, together: float, dtype: torch.dtype
) -> None:
    base, common, *own = draw(count + 2, shape, seed)
    experts, base = [(base + together * common + x).to(dtype) for x in own], base.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    want = dense([x.to(wide) for x in experts], base.to(wide), scope)
    got = merge(experts, base, scope=scope)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, **BOUNDS[dtype])


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_over_several_blocks(scope: str) -> None:
    base, common, *own = draw(5, (300, 1000))
    experts = [base + common + x for x in own]
    want = dense(experts, base, scope)
    torch.testing.assert_close(merge(experts, base, scope=scope).double(), want, **BOUNDS[torch.float32])


@pytest.mark.parametrize("scope", ["tensor", "row"])
def test_fine_tunes_that_agree_give_themselves(scope: str) -> None:
    base, expert = draw(2)
    torch.testing.assert_close(merge([expert] * 3, base, scope=scope), expert, **BOUNDS[torch.float32])


def test_orthogonal_changes_give_the_base() -> None:
    base = draw(1, (4,))[0]
    assert torch.equal(merge([base + 2 * torch.eye(4)[k] for k in range(3)], base), base)


def test_of_two_it_is_twice_the_cosine_over_one_plus_it() -> None:
    base = torch.zeros(2)
    for cosine in (0.1, 0.5, 0.96):
        a, b = torch.tensor([1.0, 0.0]), torch.tensor([cosine, (1 - cosine**2) ** 0.5])
        want = 2 * cosine / (1 + cosine) * (a + b) / 2
        torch.testing.assert_close(merge([a, b], base), want, **BOUNDS[torch.float32])


def test_the_scale_of_the_changes_does_not_matter() -> None:
    base, common, *own = draw(4)
    t = [merge([s * (common + x) for x in own], 0 * base) / s for s in (1.0, 2.0**-10)]
    torch.testing.assert_close(t[0], t[1], **BOUNDS[torch.float32])
    # mergekit divides by no less than 1e-6: small changes look orthogonal there
    small = merge([2.0**-13 * (common + x) for x in own], 0 * base, least_product=1e-6) * 2**13
    torch.testing.assert_close(
        small.double(),
        dense([2.0**-13 * (common + x) for x in own], 0 * base, least=1e-6) * 2**13,
        **BOUNDS[torch.float32],
    )
    assert float(small.norm()) < 0.9 * float(t[0].norm())


def test_opposed_changes_lead_to_the_base_or_beyond() -> None:
    base, a, *more = draw(4)
    experts = [base + a, base - a + 0.1 * more[0], base - a + 0.1 * more[1]]
    assert torch.equal(merge(experts, base), base)
    torch.testing.assert_close(
        merge(experts, base, clamp=False).double(), dense(experts, base, clamp=False), rtol=1e-4, atol=1e-5
    )  # t is about -2
    with pytest.raises(SpoliaError, match="NaN or Inf"):  # cosine -1 of two: t is 2 * -1 / 0
        merge([torch.ones(4, 4), -torch.ones(4, 4)], torch.zeros(4, 4), clamp=False)


def test_no_change_is_no_angle() -> None:
    (base,) = draw(1)
    assert torch.equal(merge([base, base], base), base)


def test_a_tensor_of_one_expert_stays_the_bases() -> None:
    (a, b, base), head = draw(3), torch.arange(4.0).view(2, 2)
    merged = spolia.merge(
        [{"w": a, "lm_head.weight": head + 1}, {"w": b}], base={"w": base, "lm_head.weight": head}, method="model_stock"
    )
    assert torch.equal(merged["lm_head.weight"], head)


def test_one_expert_is_too_few() -> None:
    with pytest.raises(SpoliaError, match="takes at least 2 experts"):
        merge(draw(1), draw(1)[0])
