"""What DARE and DELLA promise of their coins: means, exact survivors, and numbers that depend on names alone.

Bounds come from the binomial variance at 5 sigma. All seeds are fixed, so a test that passes once always passes.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.core.seeds import TILE
from spolia.core.select import ranks_in_rows
from spolia.core.stream import Stack, TensorPlane
from spolia.methods.merge.sparsifiers import keep_levels
from spolia.methods.merge.sparsify import Della, Sparsified, Ties, sparsified

pytestmark = pytest.mark.sampled(3)  # of many cases alike

State = dict[str, torch.Tensor]
SIGMAS = 5


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def thinned(method: str, tau: torch.Tensor, seed: int = 0, name: str = "w", **given: Any) -> torch.Tensor:
    """The one expert's task vector as `method` keeps it: base 0, weight 1, lambda 1, nothing divided."""
    given = {"scale": 1.0, "normalize": False, **given}
    return spolia.merge([{name: tau}], base={name: torch.zeros_like(tau)}, method=method, settings=given, seed=seed)[
        name
    ]


def expected_levels(row: int, density: float, epsilon: float) -> torch.Tensor:
    """DELLA's keep-probabilities from the smallest to the largest: linear over [d - e, d + e] inside [0, 1]."""
    half = min(epsilon, density, 1 - density) if row > 1 else 0.0
    place = torch.arange(row, dtype=torch.float64) / max(row - 1, 1)
    return density - half + 2 * half * place


# one element at a time


@pytest.mark.parametrize("density", [0.1, 0.3, 0.9])
def test_dare_survivors_are_the_change_over_density(density: float):
    tau = draw(100_000)
    kept = thinned("dare", tau, density=density)
    alive = kept != 0
    # one fp32 division: half a unit in the last place each
    torch.testing.assert_close(kept[alive].double(), tau[alive].double() / density, rtol=2**-23, atol=0)
    sigma = sqrt(density * (1 - density) / tau.numel())
    assert abs(float(alive.float().mean()) - density) < SIGMAS * sigma


def test_dare_rescaled_by_l1_preserves_the_norm():
    tau = torch.ones(100_000) * torch.where(draw(100_000) > 0, 0.5, -0.5)
    kept = thinned("dare", tau, density=0.3, rescale="l1")
    # 1e-5: the fp32 ratio (6e-8), applied to every survivor, and the stored fp32
    assert float(kept.abs().sum(dtype=torch.float64)) == pytest.approx(50_000, rel=1e-5)
    alive = kept != 0
    assert abs(float(alive.float().mean()) - 0.3) < 0.006  # four sigmas
    assert float(kept.abs().max()) == pytest.approx(0.5 / float(alive.double().mean()), rel=1e-6)


@pytest.mark.parametrize("method", ["dare", "della_linear", "ties", "breadcrumbs"])
def test_l1_is_taken_per_expert_and_tensor(method: str):
    taus = [{"w": draw(40, 50, seed=k), "v": 9 * draw(30, seed=9 + k)} for k in range(2)]
    base = {n: torch.zeros_like(t) for n, t in taus[0].items()}
    for k, weight in enumerate([(1.0, 0.0), (0.0, 1.0)]):
        given = {"density": 0.5, "rescale": "l1", "scale": 1.0, "normalize": False, "weight": weight}
        merged = spolia.merge(taus, base=base, method=method, settings=given)
        for n, tau in taus[k].items():
            assert float(merged[n].abs().sum()) == pytest.approx(float(tau.abs().sum()), rel=1e-5), (n, k)


def test_dare_without_rescaling_leaves_survivors_alone():
    tau = draw(1000)
    kept = thinned("dare", tau, density=0.5, rescale="none")
    assert torch.equal(kept, torch.where(kept != 0, tau, 0.0)) and 0 < int((kept != 0).sum()) < 1000


@pytest.mark.parametrize("method", ["dare", "dare_ties", "della", "della_linear"])
@pytest.mark.parametrize("rescale", ["none", "inverse_p", "l1"])
def test_density_one_keeps_all_and_zero_none(method: str, rescale: str):
    base, expert = {"w": draw(7, 9)}, {"w": draw(7, 9, seed=1)}
    given = {"scale": 1.0, "normalize": False, "rescale": rescale}

    def merged(density: float) -> torch.Tensor:
        return spolia.merge([expert], base=base, method=method, settings={"density": density, **given})["w"]

    torch.testing.assert_close(merged(1.0), expert["w"], rtol=1e-6, atol=1e-6)  # base + (expert - base) in fp32
    assert torch.equal(merged(0.0), base["w"])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "given"),
    [
        ("dare", {"density": 0.3}),
        ("dare_ties", {"density": 0.3}),
        ("della_linear", {"density": 0.3, "epsilon": 0.2}),
        ("della", {"density": 0.6, "epsilon": 0.4}),
    ],
)
def test_unbiased_over_many_seeds(method: str, given: dict[str, Any]):
    tau, seeds = draw(4, 8), 600
    mean = sum(thinned(method, tau, seed=s, **given).double() for s in range(seeds)) / seeds
    p = torch.full((4, 8), given["density"], dtype=torch.float64)
    if "epsilon" in given:
        ranks = tau.abs().argsort(dim=1).argsort(dim=1)
        p = expected_levels(8, given["density"], given["epsilon"])[ranks]
    # tau/p with probability p: variance tau^2 (1 - p)/p a seed; 2^-16 is the grid on which DELLA's p lie
    bound = SIGMAS * tau.abs() * ((1 - p) / p / seeds).clamp(min=0).sqrt() + tau.abs() * 2**-16 / p
    assert bool(((mean - tau).abs() <= bound + 1e-6).all())


# DELLA's probabilities


@settings(max_examples=80, deadline=None)
@given(row=st.integers(1, 40), density=st.floats(0.01, 0.99), epsilon=st.floats(0, 1))
def test_keep_levels_rise_linearly_inside_zero_and_one(row: int, density: float, epsilon: float):
    levels = keep_levels(torch.arange(row, dtype=torch.int32).view(1, -1), row, density, epsilon)[0].double() / 65536
    # two units of the grid of 2^-16: the rounding, and the unit by which the window stays clear of 0
    torch.testing.assert_close(levels, expected_levels(row, density, epsilon), rtol=0, atol=2 * 2.0**-16)
    assert float(levels.min()) > 0 and float(levels.max()) <= 1


def test_ranks_run_from_the_smallest_of_the_row():
    tau = draw(6, 11)
    for dtype in (torch.float32, torch.float64):
        assert torch.equal(ranks_in_rows(tau.to(dtype).abs()).long(), tau.abs().argsort(dim=1).argsort(dim=1))
    assert ranks_in_rows(torch.tensor([[2.0, 1.0, 2.0, 0.0, 1.0]])).tolist() == [[3, 1, 4, 0, 2]]


@pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")  # of the narrowed window
@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.2), (0.2, 0.5), (0.9, 0.3), (0.5, 0.0)])
def test_della_keeps_large_changes_more_often(density: float, epsilon: float):
    rows, row = 5_000, 6
    tau = draw(rows, row)
    rank = tau.abs().argsort(dim=1).argsort(dim=1)
    kept = thinned("della_linear", tau, density=density, epsilon=epsilon)
    p = expected_levels(row, density, epsilon)
    for r in range(row):
        here = rank == r
        share = float((kept[here] != 0).double().mean())
        assert abs(share - float(p[r])) <= SIGMAS * sqrt(float(p[r] * (1 - p[r])) / rows) + 2**-15, r
    alive = kept != 0
    ratio = kept[alive].double() * p[rank[alive]] / tau[alive].double()
    # survivors carry their own 1/p, on the grid of 2^-16
    assert bool((ratio - 1).abs().le(2 * 2**-16 / p[rank[alive]] + 1e-6).all())


@pytest.mark.parametrize("shape", [(20_000, 1), (20_000, 1, 1)])
def test_rows_of_one_element_have_the_density(shape: tuple[int, ...]):
    kept = thinned("della_linear", torch.ones(shape), density=0.25, epsilon=0.2)
    assert set(kept.flatten().tolist()) == {0.0, 4.0}
    assert abs(float((kept != 0).float().mean()) - 0.25) < SIGMAS * sqrt(0.25 * 0.75 / 20_000)


def test_one_element_tensors():
    for method in ("dare", "della", "della_linear", "dare_ties"):
        seen = {float(thinned(method, torch.tensor(1.0), seed=s, density=0.5)) for s in range(40)}
        assert seen == {0.0, 2.0}, method


def test_della_without_a_window_is_dare():
    tau = draw(300, 200)
    dare, della = (
        thinned(method, tau, density=0.3, **more) for method, more in (("dare", {}), ("della_linear", {"epsilon": 0.0}))
    )
    levels = [float((kept != 0).float().mean()) for kept in (dare, della)]
    assert abs(levels[0] - levels[1]) < SIGMAS * sqrt(2 * 0.3 * 0.7 / tau.numel())
    both = (dare != 0) & (della != 0)
    # 0.3 lies between two of DELLA's 65536 levels: relative 1/(0.3 * 65536) / 2
    torch.testing.assert_close(dare[both], della[both], rtol=3e-5, atol=0)
    by_rank = tau.abs().argsort(dim=1).argsort(dim=1)
    for half in (by_rank < 100, by_rank >= 100):  # no favour for large changes
        share = float((della[half] != 0).float().mean())
        assert abs(share - 0.3) < SIGMAS * sqrt(0.3 * 0.7 / (tau.numel() / 2))


# what the coins depend on


RANDOM = ["dare", "dare_ties", "della", "della_linear"]


def merge(states: list[State], method: str, **more: Any) -> State:
    base = {n: torch.zeros_like(t) for n, t in states[0].items()}
    given = {"density": 0.5, "scale": 1.0, "normalize": False} | more.pop("settings", {})
    return spolia.merge(states, base=base, method=method, settings=given, **more)


@pytest.mark.parametrize("method", RANDOM)
def test_the_order_of_tensors_the_threads_and_the_neighbours_change_nothing(method: str):
    state = {f"layer.{i}": draw(500, 600, seed=i) for i in range(3)}  # more than two blocks each
    want = merge([state], method, seed=4, threads=1)
    others = [
        merge([dict(reversed(state.items()))], method, seed=4, threads=1),
        merge([state], method, seed=4, threads=4),
        merge([state], method, seed=4, chunk_memory=20_000_000),
        merge([{"layer.1": state["layer.1"]}], method, seed=4),
    ]
    for other in others:
        assert all(torch.equal(value, want[name]) for name, value in other.items())


@pytest.mark.parametrize("method", RANDOM)
def test_seed_name_and_expert_each_give_other_coins(method: str):
    tau = draw(50, 50)

    def kept(**more: Any) -> torch.Tensor:
        return thinned(method, tau, density=0.5, **more) != 0

    want = kept()
    assert torch.equal(kept(), want)
    second = merge([{"w": torch.zeros_like(tau)}, {"w": tau}], method)["w"] != 0
    for other in (kept(seed=1), kept(name="v"), second):
        # independent coins of p = 0.5 (DELLA: 0.43 to 0.57) agree in about half the 2500 places: sigma 0.01
        assert abs(float((other == want).float().mean()) - 0.5) < 0.06


def test_blocks_of_one_tensor_have_coins_of_their_own():
    kept = (thinned("dare", torch.ones(2 * TILE), density=0.5) != 0).view(2, TILE)
    assert abs(float((kept[0] == kept[1]).float().mean()) - 0.5) < SIGMAS * 0.5 / sqrt(TILE)


def test_equal_changes_are_counted_over_blocks_and_tensors():
    given = {"density": 0.75, "at_threshold": "exact", "scale": 1.0}
    base, expert = ({n: v * torch.ones(2 * TILE) for n in ("a.2", "a.10")} for v in (0, 1))
    merged = spolia.merge([expert], base=base, method="ties", settings=given)
    assert bool(merged["a.2"].all()) and int(merged["a.10"].sum()) == TILE == int(merged["a.10"][:TILE].sum())
    alone = spolia.merge([expert], base=base, method="ties", settings={**given, "scope": "tensor"})["a.2"]
    assert int(alone.sum()) == 3 * TILE // 2 == int(alone[: 3 * TILE // 2].sum())


@pytest.mark.parametrize("method", ["dare", "della_linear"])
def test_an_experts_coins_do_not_depend_on_the_experts_after_it(method: str):
    first, second = {"w": draw(40, 40)}, {"w": draw(40, 40, seed=1)}
    alone = merge([first], method)["w"]
    assert torch.equal(merge([first, second], method, settings={"weight": (1.0, 0.0)})["w"], alone)


@pytest.mark.parametrize("method", RANDOM)
def test_each_expert_has_its_own_density(method: str):
    taus = [{"w": torch.ones(100, 200)}, {"w": 100 * torch.ones(100, 200)}]
    given = {"density": (0.2, 0.7), "rescale": "none"} | ({"epsilon": (0.0, 0.1)} if "della" in method else {})
    merged = merge(taus, method, settings=given)["w"]
    small, large = (merged % 100).round(), (merged / 100).floor()
    for kept, density in ((small, 0.2), (large, 0.7)):
        assert abs(float(kept.mean()) - density) < SIGMAS * sqrt(density * (1 - density) / merged.numel())


# the function itself, as the engine calls it


def stack(base: np.ndarray, experts: list[np.ndarray], name: str = "w") -> Stack:
    from spolia.core.checkpoint import storage

    planes = [
        TensorPlane(str(k), storage(torch.from_numpy(a)), torch.from_numpy(a).flatten())
        for k, a in enumerate((base, *experts))
    ]
    return Stack(name, base.shape, planes[0], planes[1:], list(range(len(experts))), 0, (0, base.size), 1 << 30)


@pytest.mark.parametrize(
    "chosen",
    [
        Ties(scope="tensor", rescale="l1"),
        Ties(scope="row", density=0.5),
        Della(rescale="l1"),
        Della(density=(0.2, 0.8), epsilon=(0.1, 0.0)),
    ],
)
def test_memory_between_sweeps_changes_nothing(chosen: Sparsified):
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((200, 700), dtype=np.float32) for _ in range(3)]
    results = []
    for spare in (1 << 30, 0):  # the kept mask remembered, or drawn again
        one = stack(arrays[0], arrays[1:])
        one.spare_bytes = spare
        results.append(torch.cat([values.clone() for _, values in sparsified(one, chosen)]))
    assert results[0].numel() == 140_000 and torch.equal(*results)
