"""TALL masks and Consensus TA: the formulas, their limits, and masks that bring experts back."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

State = dict[str, torch.Tensor]


def models(count: int, seed: int = 0) -> tuple[State, list[State]]:
    noise = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=noise) for n, s in {"a.weight": (11, 7), "b": (5,)}.items()}
    return base, [{n: t + torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(count)]


def consensus(base: State, experts: list[State], **given: Any) -> State:
    return spolia.merge(experts, base=base, method="consensus_ta", settings=given)


def used(base: torch.Tensor, experts: list[torch.Tensor], threshold: float) -> torch.Tensor:
    """The authors' form, on weights: [experts, ...]."""
    merged = base + torch.stack([e - base for e in experts]).sum(0)
    return torch.stack([(base - e).abs() > (merged - e).abs() * threshold for e in experts])


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 5),
    active=st.integers(0, 6),
    threshold=st.sampled_from([0.2, 0.4, 1.0]),
    seed=st.integers(0, 99),
)
def test_consensus_is_the_published_form(count: int, active: int, threshold: float, seed: int):
    base, experts = models(count, seed)
    got = consensus(base, experts, active=active, threshold=threshold, scale=0.7)
    for n, start in base.items():
        total = torch.stack([e[n] - start for e in experts]).sum(0)
        kept = used(start, [e[n] for e in experts], threshold).sum(0) >= active
        torch.testing.assert_close(got[n], start + 0.7 * kept * total, rtol=0, atol=1e-5)  # fp32 sums


def test_limits_of_consensus():
    base, experts = models(3)
    plain = spolia.merge(experts, base=base, method="task_arithmetic", settings={"scale": 0.3})
    for n in base:
        torch.testing.assert_close(consensus(base, experts, active=0)[n], plain[n], rtol=0, atol=1e-6)  # fp32 sums
        assert torch.equal(consensus(base, experts, active=4)[n], base[n])
    one = consensus(base, experts[:1], active=1, scale=1.0)
    assert all(torch.allclose(one[n], experts[0][n], atol=1e-6) for n in base)


def test_the_merged_model_is_the_sum_and_masks_follow_the_formula():
    base, experts = models(3)
    merged = spolia.merge(experts, base=base, method="tall_masks")
    found = spolia.masks(dict(zip("xyz", experts, strict=True)), base=base, method="tall_masks")
    assert list(found) == ["x", "y", "z"]
    for n, start in base.items():
        total = torch.stack([e[n] - start for e in experts]).sum(0)
        torch.testing.assert_close(merged[n], start + total, rtol=0, atol=1e-5)  # fp32 sums
        expected = used(start, [e[n] for e in experts], 0.4)
        for row, mask in zip(expected, found.values(), strict=True):
            bits = torch.from_numpy(mask.bits(n, 0, start.numel())).bool().view_as(start)
            assert int((bits != row).sum()) <= 1  # a comparison of two roundings may fall either way
            assert mask.rescaler == 1.0


def test_attach_is_base_plus_masked_sum():
    base, experts = models(3)
    merged = spolia.merge(experts, base=base, method="tall_masks")
    for k, mask in enumerate(spolia.masks(experts, base=base, method="tall_masks").values()):
        got = spolia.attach(merged, mask, base=base)
        for n, start in base.items():
            bits = torch.from_numpy(mask.bits(n, 0, start.numel())).bool().view_as(start)
            assert torch.equal(got[n][~bits], start[~bits])
            torch.testing.assert_close(got[n][bits], merged[n][bits], rtol=0, atol=1e-6)  # there and back: fp32
            before = float((merged[n] - experts[k][n]).abs().sum())
            assert float((got[n] - experts[k][n]).abs().sum()) <= before


def test_one_expert_and_separate_experts_come_back():
    base, (expert, other) = models(2)
    one = spolia.merge([expert], base=base, method="tall_masks")
    mask = spolia.masks([expert], base=base, method="tall_masks")["expert 0"]
    got = spolia.attach(one, mask, base=base)
    assert all(torch.allclose(got[n], expert[n], atol=1e-6) for n in base)
    apart = [dict(base, b=expert["b"]), {**base, "a.weight": other["a.weight"]}]  # nobody shares a weight
    merged = spolia.merge(apart, base=base, method="tall_masks")
    for model, mask in zip(apart, spolia.masks(apart, base=base, method="tall_masks").values(), strict=True):
        got = spolia.attach(merged, mask, base=base)
        assert all(torch.allclose(got[n], model[n], atol=1e-6) for n in base)  # fp32


def test_thresholds_of_each_expert():
    base, experts = models(2)
    found = spolia.masks(experts, base=base, method="tall_masks", settings={"threshold": [0.0, 1e9]})
    kept = [sum(int(m.bits(n, 0, base[n].numel()).sum()) for n in base) for m in found.values()]
    assert kept[0] == sum(t.numel() for t in base.values()) and kept[1] == 0


def test_methods_without_masks_say_which_have_them():
    base, experts = models(2)
    with pytest.raises(SpoliaError, match="emr"):
        spolia.masks(experts, base=base, method="consensus_ta")


def test_order_does_not_count():
    base, experts = models(4)
    straight, turned = consensus(base, experts), consensus(base, experts[::-1])
    for n in base:
        off = (straight[n] - turned[n]).abs()
        assert float(off.median()) < 1e-6 and int((off > 1e-5).sum()) <= 1  # a comparison of roundings may flip
