"""Task arithmetic against the paper's formula in fp64, and its algebra: linear in every task vector, negation undoes."""

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
# a few roundings of numbers up to about 10; then the stored type, where bf16 may differ by one unit in the last place
RTOL = {torch.float32: 1e-6, torch.float64: 1e-13, torch.bfloat16: 2**-7}
ATOL = {torch.float32: 2e-5, torch.float64: 1e-13, torch.bfloat16: 2e-5}


def pool(count: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[State, list[State]]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"w": (3, 5), "b": (4,), "s": ()}

    def draw() -> State:
        return {name: torch.randn(shape, generator=noise).to(dtype) for name, shape in shapes.items()}

    return draw(), [draw() for _ in range(count)]


def dense(base: State, experts: list[State], weights: tuple[float, ...], factor: float) -> State:
    return {
        n: b.double() + factor * sum(w * (e[n].double() - b.double()) for w, e in zip(weights, experts, strict=True))
        for n, b in base.items()
    }


def close(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        want = wanted[name].to(value.dtype)
        torch.testing.assert_close(value, want, rtol=RTOL[value.dtype], atol=ATOL[value.dtype])


def merge(base: State, experts: list[State], **given: Any) -> State:
    return spolia.merge(experts, base=base, method="task_arithmetic", settings=given)


@settings(max_examples=40, deadline=None)
@given(
    weights=st.lists(st.sampled_from([1.0, 0.5, -0.25, 2.0, 0.3, 0.0]), min_size=1, max_size=6),
    scale=st.sampled_from([0.3, 1.0, -1.0, 0.0]),
    normalize=st.booleans(),
    dtype=st.sampled_from(list(DTYPES)),
    seed=st.integers(0, 99),
)
@example(weights=[0.5, -0.5], scale=0.3, normalize=True, dtype="fp32", seed=0)
def test_base_plus_scaled_sum(weights: list[float], scale: float, normalize: bool, dtype: str, seed: int):
    base, experts = pool(len(weights), DTYPES[dtype], seed)
    total = sum(weights)
    if normalize and 0 < abs(total) < 0.2:
        return  # a small divisor magnifies every rounding
    factor = scale / total if normalize and total else scale  # weights that cancel are not divided by
    got = merge(base, experts, weight=tuple(weights), scale=scale, normalize=normalize)
    close(got, dense(base, experts, tuple(weights), factor))


def test_the_default_is_the_papers_scale_for_eight_tasks():
    base, experts = pool(8)
    close(merge(base, experts), dense(base, experts, (1.0,) * 8, 0.3))


def test_scale_zero_is_the_base_and_one_expert_at_scale_one_is_the_expert():
    base, experts = pool(1)
    assert all(torch.equal(v, base[n]) for n, v in merge(base, experts, scale=0.0).items())
    close(merge(base, experts, scale=1.0), experts[0])


def test_scale_one_over_k_is_the_average():
    base, experts = pool(4)
    close(merge(base, experts, scale=0.25), spolia.merge(experts))
    close(merge(base, experts, scale=1.0, normalize=True), spolia.merge(experts))


def test_negation_forgets_what_addition_learned():
    base, experts = pool(1)
    learned = merge(base, experts, scale=0.7)
    change = {n: learned[n] - base[n] for n in base}
    forgot = merge(base, experts, weight=-1.0, scale=0.7)
    close(forgot, {n: base[n].double() - change[n].double() for n in base})


def test_linear_in_each_task_vector():
    base, experts = pool(2)
    alone = [merge(base, [e], scale=0.4) for e in experts]
    together = {n: base[n].double() + sum(a[n].double() - base[n].double() for a in alone) for n in base}
    close(merge(base, experts, scale=0.4), together)


def test_the_same_expert_twice_counts_twice():
    base, experts = pool(1)
    close(merge(base, experts * 2, scale=0.3), dense(base, experts, (1.0,), 0.6))


def test_a_tensor_that_one_expert_lacks_takes_the_others_weights():
    base, experts = pool(2)
    base["lm_head.weight"], experts[1]["lm_head.weight"] = torch.zeros(2, 2), torch.ones(2, 2)
    merged = merge(base, experts, weight=(5.0, 0.5), scale=1.0)
    assert torch.equal(merged["lm_head.weight"], torch.full((2, 2), 0.5))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"weight": (1.0, 2.0, 3.0)}, r"settings\.weight.*3 values for 2 experts"),
        ({"lambda": 0.3}, r"settings\.lambda.*no such setting"),
        ({"scal": 0.3}, r"did you mean `scale`"),
        ({"scale": (0.3, 0.3)}, r"settings\.scale"),
    ],
)
def test_wrong_settings_are_named(given: dict[str, Any], message: str):
    base, experts = pool(2)
    with pytest.raises(SpoliaError, match=message):
        merge(base, experts, **given)


def test_without_a_base_it_is_refused():
    with pytest.raises(SpoliaError, match="needs the base model"):
        spolia.merge(pool(2)[1], method="task_arithmetic")
