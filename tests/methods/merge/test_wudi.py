"""WUDI-Merging: its loss, its steps against torch's Adam on that loss, and the exact minimiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError


def change(base: torch.Tensor, changes: list[torch.Tensor], **given: Any) -> torch.Tensor:
    experts = [{"w": base + tau} for tau in changes]
    return spolia.merge(experts, base={"w": base}, method="wudi", settings=given)["w"].double() - base.double()


def loss(merged: torch.Tensor, changes: list[torch.Tensor]) -> torch.Tensor:
    """The paper's, as it stands there."""
    return torch.stack([((merged - tau) @ tau.t()).square().sum() / tau.square().sum() for tau in changes]).sum()


def tasks(shape: tuple[int, int], count: int, seed: int = 0, size: float = 1.0) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [size * torch.randn(shape, generator=noise) for _ in range(count)]


def gradient(merged: torch.Tensor, changes: list[torch.Tensor]) -> torch.Tensor:
    merged = merged.clone().requires_grad_(True)
    loss(merged, changes).backward()
    assert merged.grad is not None
    return merged.grad


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from([(8, 6), (5, 12), (9, 9)]), count=st.integers(1, 4), seed=st.integers(0, 99))
def test_exact_is_the_minimiser(shape: tuple[int, int], count: int, seed: int):
    changes = tasks(shape, count, seed)
    got = change(torch.zeros(shape), changes, solver="exact")
    wide = [tau.double() for tau in changes]
    # the result is rounded to fp32: 1e-7 of values whose gradient is of order 1
    size = float(gradient(torch.stack(wide).sum(0), wide).abs().max()) + 1
    assert float(gradient(got, wide).abs().max()) < 1e-5 * size
    assert float(loss(got, wide)) <= float(loss(torch.stack(wide).sum(0), wide)) + 1e-9
    # the shortest: every row lies in what the tasks' rows span
    rows = torch.linalg.svd(torch.cat(wide), full_matrices=False)[2][: min(len(torch.cat(wide)), shape[1])]
    torch.testing.assert_close(got @ rows.t() @ rows, got, rtol=0, atol=1e-4)  # fp32, amplified by small eigenvalues


def test_exact_on_tasks_that_do_not_meet_is_the_sum_and_on_one_task_itself():
    changes = tasks((6, 12), 3)
    apart = [torch.zeros(6, 12) for _ in range(3)]
    for k, tau in enumerate(changes):
        apart[k][:, 4 * k : 4 * k + 4] = tau[:, :4]
    total = torch.stack(apart).double().sum(0)
    torch.testing.assert_close(change(torch.zeros(6, 12), apart, solver="exact"), total, rtol=0, atol=1e-5)  # fp32
    one = changes[:1]
    torch.testing.assert_close(change(torch.zeros(6, 12), one, solver="exact"), one[0].double(), rtol=0, atol=1e-5)
    # every task of the disjoint three is met exactly, so Adam has nothing to do
    assert float(loss(total, [t.double() for t in apart])) < 1e-20


@pytest.mark.parametrize("precision", ["float32", "float64"])
@pytest.mark.parametrize("count", [1, 3])
def test_steps_are_those_of_adam_on_the_loss(precision: str, count: int):
    changes = tasks((7, 5), count, size=0.01)
    merged = torch.nn.Parameter(torch.stack(changes).double().sum(0))
    optimizer = torch.optim.Adam([merged], lr=1e-4)
    wide = [tau.double() for tau in changes]
    for _ in range(40):
        optimizer.zero_grad()
        loss(merged, wide).backward()
        optimizer.step()
    got = change(torch.zeros(7, 5), changes, steps=40, step_size=1e-4, precision=precision)
    # forty steps of 1e-4. With one task the first gradient is rounding noise: it vanishes at the start
    if count == 1:
        assert float((got - wide[0]).abs().max()) < 40e-4
    else:
        torch.testing.assert_close(got, merged.detach(), rtol=0, atol=2e-6 if precision == "float32" else 1e-8)


def test_small_gradients_meet_adams_epsilon():
    """Adam does not see the gradient's size, but for its epsilon of 1e-8: with gradients near it the size shows."""
    changes = [tau.double() for tau in tasks((7, 5), 3, size=1e-7)]
    merged = torch.nn.Parameter(torch.stack(changes).sum(0))
    optimizer = torch.optim.Adam([merged], lr=1e-9)
    for _ in range(20):
        optimizer.zero_grad()
        loss(merged, changes).backward()
        optimizer.step()
    got = change(torch.zeros(7, 5).double(), changes, steps=20, step_size=1e-9)
    torch.testing.assert_close(got, merged.detach(), rtol=0, atol=1e-13)  # fp64; the steps are 1e-9


def test_no_step_is_the_sum_and_steps_lower_the_loss():
    changes = tasks((9, 9), 4, size=0.02)
    wide = [tau.double() for tau in changes]
    start = change(torch.zeros(9, 9), changes, steps=0)
    torch.testing.assert_close(start, torch.stack(wide).sum(0), rtol=0, atol=1e-8)  # fp32 sums of hundredths
    losses = [float(loss(change(torch.zeros(9, 9), changes, steps=n), wide)) for n in (0, 50, 300)]
    assert losses[0] > losses[1] > losses[2] > float(loss(change(torch.zeros(9, 9), changes, solver="exact"), wide))


def test_a_ridge_shortens():
    changes = tasks((9, 6), 3)
    norms = [float(change(torch.zeros(9, 6), changes, solver="exact", ridge=r).norm()) for r in (0.0, 0.1, 10.0)]
    assert norms[0] > norms[1] > norms[2]


def test_unchanged_experts_and_order():
    changes, base = tasks((6, 8), 2, size=0.1), tasks((6, 8), 1, 7)[0]
    still = torch.zeros(6, 8)
    for chosen in ({}, {"solver": "exact"}):
        straight = change(base, changes, **chosen)
        assert torch.equal(straight, change(base, [*changes, still], **chosen))
        # fp32 sums in another order; near a zero of the gradient Adam's steps of 1e-5 may differ
        torch.testing.assert_close(straight, change(base, changes[::-1], **chosen), rtol=0, atol=5e-5)
        assert torch.equal(change(base, [still, still], **chosen), still.double())


@pytest.mark.parametrize(("others", "share"), [("mean", 1.0), ("base", 0.0)])
def test_other_tensors(others: str, share: float):
    base = {"b": torch.arange(4.0), "wte.weight": torch.ones(3, 3)}
    experts = [{n: t + k for n, t in base.items()} for k in (1.0, 3.0)]
    merged = spolia.merge(experts, base=base, method="wudi", settings={"others": others, "scale": 0.5})
    for name, start in base.items():
        assert torch.equal(merged[name], start + share * 0.5 * 2.0)


def test_bf16_is_the_fp32_result_rounded_once():
    base, *changes = (t.bfloat16() for t in tasks((6, 5), 3))
    experts = [(base.float() + t.float()).bfloat16() for t in changes]
    low = spolia.merge([{"w": e} for e in experts], base={"w": base}, method="wudi")["w"]
    high = spolia.merge([{"w": e.float()} for e in experts], base={"w": base.float()}, method="wudi")["w"]
    assert torch.equal(low, high.bfloat16())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_expert_is_named(bad: float):
    first, second = torch.ones(2, 4, 4)
    second[0, 3] = bad
    with pytest.raises(SpoliaError, match=r"second.*`w` holds NaN or Inf, first at element 3"):
        spolia.merge({"first": {"w": first}, "second": {"w": second}}, base={"w": torch.zeros(4, 4)}, method="wudi")
