"""EMR-Merging: the election element by element, exact return of one expert, and the norm that masks keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia

State = dict[str, torch.Tensor]


def models(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[State, list[State]]:
    noise = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=noise) for n, s in {"a.weight": (11, 7), "b": (5,)}.items()}
    experts = [{n: t + torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(count)]
    base, *experts = ({n: t.to(dtype) for n, t in state.items()} for state in [base, *experts])
    return base, experts


def elected(changes: list[float]) -> float:
    """The largest change of those with the sign of the sum; minus wins a tie."""
    sign = 1.0 if sum(changes) > 0 else -1.0
    return sign * max([c * sign for c in changes if c * sign > 0], default=0.0)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 99))
def test_the_election_element_by_element(count: int, seed: int):
    base, experts = models(count, seed)
    base, experts = ({n: t.double() for n, t in base.items()}, [{n: t.double() for n, t in e.items()} for e in experts])
    merged = spolia.merge(experts, base=base, method="emr")
    found = spolia.masks(experts, base=base, method="emr")
    for n, start in base.items():
        for i, origin in enumerate(start.flatten().tolist()):
            changes = [float(e[n].flatten()[i]) - origin for e in experts]
            assert float(merged[n].flatten()[i]) == pytest.approx(origin + elected(changes), abs=1e-12)  # fp64
            kept = [bool(m.bits(n, i, i + 1)[0]) for m in found.values()]
            assert kept == [c * elected(changes) > 0 for c in changes]


@settings(max_examples=25, deadline=None)
@given(count=st.integers(1, 5), seed=st.integers(0, 99))
def test_every_expert_keeps_the_l1_norm_of_its_change(count: int, seed: int):
    base, experts = models(count, seed)
    merged = spolia.merge(experts, base=base, method="emr")
    for mask, expert in zip(spolia.masks(experts, base=base, method="emr").values(), experts, strict=True):
        got = spolia.attach(merged, mask, base=base)
        before = sum(float((expert[n] - base[n]).double().abs().sum()) for n in base)
        after = sum(float((got[n].double() - base[n].double()).abs().sum()) for n in base)
        assert after == pytest.approx(before, rel=1e-6)  # fp32 roundings average out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_expert_comes_back(dtype: torch.dtype):
    base, experts = models(1, dtype=dtype)
    merged = spolia.merge(experts, base=base, method="emr")
    (mask,) = spolia.masks(experts, base=base, method="emr").values()
    assert mask.rescaler == 1.0
    got = spolia.attach(merged, mask, base=base)
    for n in base:
        if dtype == torch.bfloat16:  # what is elected is an expert's own value, so nothing is rounded
            assert torch.equal(merged[n], experts[0][n]) and torch.equal(got[n], experts[0][n])
        torch.testing.assert_close(got[n], experts[0][n], rtol=0, atol=1e-6)  # there and back in fp32


def test_equal_experts_come_back_and_opposed_ones_elect_minus():
    base, (expert,) = models(1)
    merged = spolia.merge([expert] * 3, base=base, method="emr")
    assert all(torch.allclose(merged[n], expert[n], atol=1e-6) for n in base)  # fp32
    still = spolia.merge([base, base], base=base, method="emr")
    assert all(torch.equal(still[n], base[n]) for n in base)
    zero = {"w": torch.zeros(2)}
    opposed = [{"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([-1.0, 2.0])}]
    assert spolia.merge(opposed, base=zero, method="emr")["w"].tolist() == [-1.0, -2.0]


def test_tensor_means_weigh_a_bias_as_much_as_a_matrix():
    base, experts = models(3)
    found = spolia.masks(experts, base=base, method="emr", settings={"rescale": "tensors"})
    merged = spolia.merge(experts, base=base, method="emr")
    for mask, expert in zip(found.values(), experts, strict=True):
        before = sum(float((expert[n] - base[n]).abs().double().mean()) for n in base)
        kept = {n: torch.from_numpy(mask.bits(n, 0, t.numel())).view_as(t) for n, t in base.items()}
        after = sum(float(((merged[n] - base[n]) * kept[n]).abs().double().mean()) for n in base)
        assert mask.rescaler == pytest.approx(before / after, rel=1e-5)  # merged is rounded to fp32
    plain = spolia.masks(experts, base=base, method="emr")
    assert [m.rescaler for m in plain.values()] != [m.rescaler for m in found.values()]


def test_order_does_not_count():
    base, experts = models(4)
    straight, turned = (spolia.merge(e, base=base, method="emr") for e in (experts, experts[::-1]))
    assert all(torch.equal(straight[n], turned[n]) for n in base)  # no sum of random numbers is within rounding of 0


def test_changes_too_small_to_multiply_are_kept():
    base = {"w": torch.zeros(3)}
    experts = [{"w": torch.tensor([1e-30, -1e-30, 0.0])}] * 2
    (mask, _) = list(spolia.masks(dict(zip("ab", experts, strict=True)), base=base, method="emr").values())
    assert mask.bits("w", 0, 3).tolist() == [1, 1, 0]
