"""ram and ramplus against counting in fp64, over tensors and over the model, and their limits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia

State = dict[str, torch.Tensor]
BOUNDS = {
    torch.float32: {"rtol": 1e-6, "atol": 2e-6},  # a mean and a sum in fp32
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.bfloat16: {"rtol": 2**-7, "atol": 1e-3},
}


def draw(count: int, shapes: dict[str, tuple[int, ...]], seed: int = 0, dtype: torch.dtype = torch.float32) -> Any:
    """Base and experts, each of which changed about half of the elements."""
    noise = torch.Generator().manual_seed(seed)
    base = {n: torch.randn(s, generator=noise) for n, s in shapes.items()}
    experts = [
        {n: (b + torch.randn(b.shape, generator=noise) * (torch.rand(b.shape, generator=noise) < 0.5)).to(dtype)
         for n, b in base.items()}
        for _ in range(count)
    ]  # fmt: skip
    return {n: b.to(dtype) for n, b in base.items()}, experts


def merge(method: str, experts: list[State], base: State, **given: Any) -> State:
    return spolia.merge(experts, base=base, method=method, settings=given)


def dense(
    experts: list[State], base: State, epsilon: float, boost: float = 0.0, cap: float = 0.0, over: str = "model"
) -> State:
    taus = {}
    for name, b in base.items():
        wide = torch.float64 if b.dtype == torch.float64 else torch.float32  # differences as fp32 sees them
        taus[name] = torch.stack([(e[name].to(wide) - b.to(wide)) for e in experts])
    active = {name: t.abs() > epsilon for name, t in taus.items()}

    def ratio(names: list[str]) -> torch.Tensor:
        alone = sum((active[n] & (active[n].sum(0) == 1)).reshape(len(experts), -1).sum(1) for n in names)
        shared = sum(active[n].reshape(len(experts), -1).sum(1) for n in names) - alone
        return torch.as_tensor(shared).double() / torch.as_tensor(alone).clamp(min=1)

    merged = {}
    for name, tau in taus.items():
        rho = ratio(list(base)) if over == "model" else ratio([name])
        factor = (1 + boost * rho.clamp(0, cap)).view(-1, *[1] * (tau.ndim - 1))
        kept, count = tau.double() * active[name], active[name].sum(0)
        kept = torch.where(count == 1, kept * factor, kept)
        merged[name] = base[name].double() + kept.sum(0) / count.clamp(min=1)
    return merged


def close(got: State, want: State, dtype: torch.dtype = torch.float32) -> None:
    for name, tensor in want.items():
        torch.testing.assert_close(got[name].double(), tensor, **BOUNDS[dtype])


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 4), seed=st.integers(0, 99), epsilon=st.sampled_from([0.0, 1e-5, 0.3]),
    scope=st.sampled_from(["model", "tensor"]), dtype=st.sampled_from(list(BOUNDS)),
)  # fmt: skip
def test_it_is_the_mean_of_the_active_and_a_little_more(
    count: int, seed: int, epsilon: float, scope: str, dtype: torch.dtype
) -> None:
    base, experts = draw(count, {"w": (5, 6), "v": (7,), "s": ()}, seed, dtype)
    close(merge("ram", experts, base, epsilon=epsilon), dense(experts, base, epsilon), dtype)
    given = {"epsilon": epsilon, "boost": 0.5, "cap": 0.8}
    got = merge("ramplus", experts, base, scope=scope, **given)
    close(got, dense(experts, base, over=scope, **given), dtype)


def test_over_several_blocks_and_tensors() -> None:
    base, experts = draw(3, {"w": (300, 1000), "v": (200_000,), "u": (11,)})
    for scope in ("model", "tensor"):
        given = {"epsilon": 0.1, "boost": 1.0, "cap": 5.0}
        close(merge("ramplus", experts, base, scope=scope, **given), dense(experts, base, over=scope, **given))


def test_changes_that_all_share_are_averaged() -> None:
    noise = torch.Generator().manual_seed(0)
    base = {"w": torch.randn(50, generator=noise)}
    experts = [{"w": base["w"] + 1 + torch.rand(50, generator=noise)} for _ in range(3)]
    average = spolia.merge(experts, method="average")
    for method in ("ram", "ramplus"):
        close(merge(method, experts, base), {"w": average["w"].double()})


def test_changes_that_nobody_shares_are_added() -> None:
    base = {"w": torch.ones(6)}
    experts = [{"w": base["w"] + torch.eye(6)[k]} for k in range(3)]
    summed = spolia.merge(experts, base=base, method="task_arithmetic", settings={"scale": 1.0})
    for method in ("ram", "ramplus"):  # nothing shared: nothing to make up for
        assert torch.equal(merge(method, experts, base)["w"], summed["w"])


def test_a_change_of_epsilon_is_none() -> None:
    base, expert = {"w": torch.zeros(3)}, {"w": torch.tensor([0.25, 0.250001, -0.25])}
    assert merge("ram", [expert], base, epsilon=0.25)["w"].nonzero().flatten().tolist() == [1]
    assert torch.equal(merge("ram", [expert], base, epsilon=0.0)["w"], expert["w"])
    assert torch.equal(merge("ram", [expert], base, epsilon=10.0)["w"], base["w"])


def test_without_boost_it_is_ram() -> None:
    base, experts = draw(3, {"w": (5, 6)})
    for without in ({"boost": 0.0}, {"cap": 0.0}):
        assert torch.equal(merge("ramplus", experts, base, **without)["w"], merge("ram", experts, base)["w"])


def test_the_boost_stops_at_the_cap() -> None:
    base = {"w": torch.zeros(4)}
    experts = [{"w": torch.tensor([1.0, 1.0, 1.0, 0.0])}, {"w": torch.tensor([1.0, 1.0, 0.0, 0.0])}]
    for cap, want in ((0.2, 1.1), (1.0, 1.5), (9.0, 2.0)):  # two shared, one its own: rho 2
        got = merge("ramplus", experts, base, boost=0.5, cap=cap)["w"]
        torch.testing.assert_close(got, torch.tensor([1.0, 1.0, want, 0.0]), rtol=1e-6, atol=0)  # one fp32 product


def test_over_the_model_and_over_a_tensor_differ() -> None:
    base = {"v": torch.zeros(2), "w": torch.zeros(2)}
    experts = [{"v": torch.ones(2), "w": torch.tensor([1.0, 0.0])}, {"v": torch.ones(2), "w": torch.zeros(2)}]
    given = {"boost": 1.0, "cap": 10.0}
    assert float(merge("ramplus", experts, base, **given)["w"][0]) == 3  # two shared, one its own
    assert float(merge("ramplus", experts, base, scope="tensor", **given)["w"][0]) == 1  # none shared in w


@pytest.mark.parametrize("method", ["ram", "ramplus"])
def test_an_expert_that_lacks_a_tensor_is_not_asked(method: str) -> None:
    base = {"w": torch.zeros(3), "lm_head.weight": torch.zeros(2)}
    experts = [{"w": torch.ones(3)}, {"w": torch.eye(3)[0], "lm_head.weight": torch.tensor([2.0, 0.0])}]
    merged = merge(method, experts, base)
    assert torch.equal(merged["lm_head.weight"][1:], torch.zeros(1)) and float(merged["lm_head.weight"][0]) >= 2
