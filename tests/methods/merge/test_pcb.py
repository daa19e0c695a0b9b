"""PCB-Merging against the published procedure on whole sorted vectors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError

State = dict[str, torch.Tensor]


def published(base: State, experts: list[State], r: float = 0.1, clip: float = 1e-4) -> State:
    """The root file of the authors' repository, in fp64: sorts, min-max over whole vectors."""
    flat = torch.stack([torch.cat([e[n].flatten() - base[n].flatten() for n in base]) for e in experts]).double()
    count, d = flat.shape

    def clamp(x: torch.Tensor, low: float, high: float) -> torch.Tensor:
        ordered = x.sort(dim=1)[0]
        return x.clamp(ordered[:, int(d * low), None], ordered[:, max(int(d * (1 - high) - 1), 0), None])

    def minmax(x: torch.Tensor) -> torch.Tensor:
        low, high = x.amin(1, keepdim=True), x.amax(1, keepdim=True)
        return torch.where(high > low, (x - low) / (high - low), 0.0)

    size = clamp(flat.abs(), clip, clip)
    score = torch.exp(count * minmax(size) ** 2) * torch.tanh(flat * flat.sum(0))
    share = minmax(clamp(score, 1 - r, 0))
    mix = (flat.sign() * size * share).sum(0) / share.sum(0).clamp(min=1e-12)
    parts = mix.split([t.numel() for t in base.values()])
    return {n: t + part.view_as(t) for (n, t), part in zip(base.items(), parts, strict=True)}


def models(count: int, seed: int = 0, size: float = 0.1, **shapes: tuple[int, ...]) -> tuple[State, list[State]]:
    noise = torch.Generator().manual_seed(seed)
    chosen = shapes or {"a.weight": (11, 7), "b": (5,), "c": (3, 2, 4)}
    base = {n: torch.randn(s, generator=noise) for n, s in chosen.items()}
    return base, [{n: t + size * torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(count)]


def pcb(base: State, experts: list[State], **given: Any) -> State:
    return spolia.merge(experts, base=base, method="pcb", settings=given)


@settings(max_examples=25, deadline=None)
@given(
    count=st.integers(1, 5),
    r=st.sampled_from([0.05, 0.1, 0.5, 1.0]),
    clip=st.sampled_from([0.0, 1e-4, 0.05]),
    size=st.sampled_from([1e-3, 0.1, 1.0]),
    seed=st.integers(0, 99),
)
@pytest.mark.slow
def test_the_published_procedure(count: int, r: float, clip: float, size: float, seed: int):
    base, experts = models(count, seed, size)
    got, expected = pcb(base, experts, density=r, clip=clip), published(base, experts, r, clip)
    for name in base:
        off = (got[name] - expected[name]).abs()
        # fp32 scores, exp(K minmax^2) times their rounding; where all shares are tiny their ratio is less exact
        assert float(off.median()) < 1e-6 and float(off.max()) < 2e-2 * size + 1e-6


def test_opposed_experts_have_scores_below_zero():
    """Three against one: the fourth's scores are all negative, so its threshold is too."""
    base, (first, *_) = models(1)
    experts = [first, first, first, {n: 2 * base[n] - t for n, t in first.items()}]
    got, expected = pcb(base, experts), published(base, experts)
    for name in base:
        torch.testing.assert_close(got[name].double(), expected[name], rtol=0, atol=2e-5)  # fp32 scores


def test_one_expert_keeps_what_wins():
    base, experts = models(1)
    got = pcb(base, experts, clip=0.0)
    change = torch.cat([(experts[0][n] - base[n]).flatten() for n in base])
    kept = torch.cat([(got[n] - base[n]).flatten() for n in base])
    won = kept != 0
    torch.testing.assert_close(kept[won], change[won], rtol=0, atol=1e-6)  # share over share is one
    assert float(change[won].abs().min()) > float(change[~won].abs().max())
    assert round(0.1 * len(change)) - 2 <= int(won.sum()) <= round(0.1 * len(change)) + 1


def test_unchanged_experts_have_no_say():
    base, (expert, other) = models(2)
    assert all(torch.equal(t, base[n]) for n, t in pcb(base, [base, base]).items())
    # a still expert changes K and so the contest, but never pulls: what is merged points where the others point
    for n, t in pcb(base, [expert, base], density=1.0).items():
        assert bool((((t - base[n]) * (expert[n] - base[n])) >= 0).all())
    assert not torch.equal(pcb(base, [expert, other])["b"], base["b"])


def test_weight_scale_and_order():
    base, experts = models(3)
    plain, doubled, turned = (pcb(base, e, **g) for e, g in
                              ((experts, {}), (experts, {"scale": 2.0}), (experts[::-1], {})))  # fmt: skip
    weighted = pcb(base, experts, weight=[2.0, 2.0, 2.0])
    for n in base:
        torch.testing.assert_close(plain[n], turned[n], rtol=0, atol=1e-5)  # fp32 sums in another order
        torch.testing.assert_close(doubled[n], base[n] + 2 * (plain[n] - base[n]), rtol=0, atol=1e-6)
        torch.testing.assert_close(weighted[n], doubled[n], rtol=0, atol=1e-6)


@pytest.mark.slow
def test_many_experts_do_not_overflow():
    base, experts = models(100)
    assert all(bool(torch.isfinite(t).all()) for t in pcb(base, experts).values())


@pytest.mark.parametrize("threads", [1, 2])
def test_several_blocks_and_files(threads: int, tmp_path, write_model):
    """More than a block and a tensor, from files and from memory: the same bits."""
    base, experts = models(2, a=(400, 401), b=(30,))
    folders = [write_model(tmp_path / str(k), state) for k, state in enumerate([base, *experts])]
    memory = spolia.merge(experts, base=base, method="pcb", threads=1)
    merged = spolia.merge(folders[1:], base=folders[0], method="pcb", out=tmp_path / "out", threads=threads)
    from safetensors.torch import load_file

    found = load_file(merged / "model.safetensors")
    assert all(torch.equal(found[n], memory[n]) for n in base)
    expected = published(base, experts)
    for n in base:
        off = (memory[n] - expected[n]).abs()
        assert float(off.median()) < 1e-6 and float(off.max()) < 2e-3  # as above; changes are tenths


def test_bf16_is_the_fp32_result_rounded_once():
    base, experts = models(3)
    low = [{n: t.bfloat16() for n, t in state.items()} for state in [base, *experts]]
    high = [{n: t.float() for n, t in state.items()} for state in low]
    got, wide = pcb(low[0], low[1:]), pcb(high[0], high[1:])
    assert all(torch.equal(got[n], wide[n].bfloat16()) for n in base)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_expert_is_named(bad: float):
    base, (first, second) = models(2)
    second["b"][3] = bad
    with pytest.raises(SpoliaError, match=r"second.*`b` holds NaN or Inf, first at element 3"):
        spolia.merge({"first": first, "second": second}, base=base, method="pcb")
