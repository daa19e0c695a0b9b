"""TIES and Breadcrumbs against dense references written here from the papers: whole models flattened, sorted, in fp64."""

from __future__ import annotations

import itertools
import re
import warnings
from fractions import Fraction
from math import floor
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError, SpoliaWarning

State = dict[str, torch.Tensor]
Vectors = dict[str, torch.Tensor]  # tensor name -> task vectors [experts, n], fp64
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}
# A sum of K weighted changes, one division and one addition to the base, all below about 10; then the stored type, where
# a number near the middle of two bf16 may go either way: one unit in the last place.
CLOSE = {
    torch.float32: {"rtol": 1e-6, "atol": 5e-6},
    torch.float64: {"rtol": 1e-13, "atol": 1e-13},
    torch.bfloat16: {"rtol": 2**-7, "atol": 5e-6},
}


# the references


def wanted_count(n: int, density: float, count: str) -> int:
    exact = Fraction(str(density)) * n
    return max(1, min(n, {"round": round(exact), "floor": floor(exact), "legacy": floor(exact) + 1}[count]))


def trim(tau: torch.Tensor, density: float, gamma: float, count: str, exact: bool) -> torch.Tensor:
    """The `density` n largest |tau| after the gamma n largest, of one flat vector; equal ones by index, or all of them."""
    if density >= 1 or tau.numel() == 0:
        return tau
    if density <= 0:
        return torch.zeros_like(tau)
    kept = wanted_count(tau.numel(), density, count)
    top = min(floor(Fraction(str(gamma)) * tau.numel()), tau.numel() - kept)
    order = tau.abs().argsort(descending=True, stable=True)
    mask = torch.zeros(tau.numel(), dtype=torch.bool)
    mask[order[top : top + kept]] = True
    if not exact and top == 0:
        mask = tau.abs() >= tau.abs()[order[kept - 1]]
    return tau * mask


def sparsify(taus: Vectors, rows: dict[str, int], given: dict[str, Any]) -> Vectors:
    scope, rest = given["scope"], (given["count"], given["at_threshold"] == "exact")
    shares = list(zip(given["density"], given["gamma"], strict=True))
    if scope == "model":
        whole = torch.cat([*taus.values()], dim=1)
        whole = torch.stack([trim(t, d, g, *rest) for t, (d, g) in zip(whole, shares, strict=True)])
        return dict(zip(taus, whole.split([t.shape[1] for t in taus.values()], dim=1), strict=True))
    length = {n: (t.shape[1] if scope == "tensor" else rows[n]) or 1 for n, t in taus.items()}
    return {
        n: torch.stack(
            [
                torch.cat([trim(piece, d, g, *rest) for piece in tau.split(length[n])])
                for tau, (d, g) in zip(t, shares, strict=True)
            ]
        )
        for n, t in taus.items()
    }


def combine(kept: Vectors, taus: Vectors, given: dict[str, Any], elect: bool) -> Vectors:
    """The merged task vector of every tensor."""
    weight = torch.tensor(given["weight"], dtype=torch.float64).unsqueeze(1)
    changes = {n: k * weight for n, k in kept.items()}
    if given["rescale"] == "l1":
        for n, k in kept.items():
            left = k.abs().sum(1, keepdim=True)
            changes[n] *= torch.where(left > 0, taus[n].abs().sum(1, keepdim=True) / left.clamp(min=1e-300), 1.0)
    if not elect:
        total = float(weight.sum()) if given["normalize"] and abs(float(weight.sum())) > 1e-8 else 1.0
        return {n: c.sum(0) / total for n, c in changes.items()}
    signs = {n: c.sum(0).sign() for n, c in changes.items()}
    vote = sum(float(s.sum()) for s in signs.values())
    tie = -1.0 if given["zero_sign"] == "majority" and vote < 0 else 1.0
    merged = {}
    for n, c in changes.items():
        sign = torch.where(signs[n] == 0, tie, signs[n])
        agree = (c.sign() == sign).double()
        weights = (agree * weight).sum(0)
        total = torch.where(weights == 0, 1.0, weights) if given["normalize"] else 1.0
        merged[n] = (c * agree).sum(0) / total
    return merged


def dense(base: State, experts: list[State], given: dict[str, Any], elect: bool) -> State:
    # what the names' natural order is: layer 2 before layer 10
    names = sorted(base, key=lambda n: [int(p) if p.isdigit() else p for p in re.split(r"(\d+)", n)])
    wide = torch.float64 if base[names[0]].dtype == torch.float64 else torch.float32
    taus = {n: torch.stack([(e[n].to(wide) - base[n].to(wide)).double().flatten() for e in experts]) for n in names}
    rows = {n: base[n].shape[-1] if base[n].ndim > 1 else base[n].numel() for n in names}
    merged = combine(sparsify(taus, rows, given), taus, given, elect)
    return {n: b.double() + given["scale"] * merged[n].view(b.shape) for n, b in base.items()}


# the data


SHAPES = {"layer.10.w": (4, 5), "layer.2.w": (3, 2, 4), "layer.2.b": (7,), "scalar": (), "none": (0, 3)}


def pool(count: int, dtype: torch.dtype, seed: int, grid: bool) -> tuple[State, list[State]]:
    """`grid`: multiples of 1/16, so differences are exact in any type and many of them are equal or cancel."""
    noise = torch.Generator().manual_seed(seed)

    def draw(shape: tuple[int, ...]) -> torch.Tensor:
        drawn = torch.randint(-6, 7, shape, generator=noise) / 16 if grid else torch.randn(shape, generator=noise)
        return drawn.to(dtype)

    base, *experts = ({n: draw(shape) for n, shape in SHAPES.items()} for _ in range(count + 1))
    return base, experts


def close(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        want = wanted[name].to(value.dtype)
        torch.testing.assert_close(value, want, **CLOSE[value.dtype], msg=lambda m, n=name: f"{n}: {m}")


def merge(method: str, base: State, experts: list[State], given: dict[str, Any], **more: Any) -> State:
    return spolia.merge(experts, base=base, method=method, settings=given, **more)


DENSITIES = st.sampled_from([0.0, 0.1, 0.2, 0.25, 0.5, 0.75, 0.9, 1.0])
WEIGHTS = st.sampled_from([1.0, 1.0, 0.5, 2.0, -0.5])  # dyadic: votes on a grid cancel exactly


@st.composite
def cases(draw: st.DrawFn) -> tuple[int, str, int, bool, dict[str, Any]]:
    count, grid = draw(st.integers(1, 4)), draw(st.booleans())
    each = {"min_size": count, "max_size": count}
    given = {
        "density": tuple(draw(st.lists(DENSITIES, **each))),
        "weight": tuple(draw(st.lists(WEIGHTS, **each))),
        "gamma": tuple(draw(st.lists(st.sampled_from([0.0, 0.0, 0.1, 0.3]), **each))),
        "scope": draw(st.sampled_from(["model", "tensor", "row"])),
        "count": draw(st.sampled_from(["round", "floor", "legacy"])),
        "at_threshold": draw(st.sampled_from(["all", "exact"])),
        "zero_sign": draw(st.sampled_from(["majority", "+"])),
        "normalize": draw(st.booleans()),
        "rescale": draw(st.sampled_from(["none", "none", "l1"])),
        "scale": draw(st.sampled_from([1.0, 0.3, -1.0])),
    }
    dtype = draw(st.sampled_from(list(DTYPES)))
    ties = grid or dtype == "bf16"  # eight bits: changes of equal size come by chance
    if ties and (given["scope"] == "row" or given["at_threshold"] == "all"):
        given["gamma"] = (0.0,) * count  # a band between two equal thresholds is nobody's definition
    if grid and given["rescale"] == "l1":
        given["zero_sign"] = "+"  # votes scaled by unequal norms cancel by rounding only
    return count, dtype, draw(st.integers(0, 999)), grid, given


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(case=cases(), method=st.sampled_from(["ties", "breadcrumbs", "breadcrumbs_ties"]))
def test_dense_references(case: tuple[int, str, int, bool, dict[str, Any]], method: str):
    count, dtype, seed, grid, given = case
    if (grid or dtype == "bf16") and given["scope"] == "row":
        return  # which of equal magnitudes a row keeps is not promised: test_rows_keep_the_asked_number
    base, experts = pool(count, DTYPES[dtype], seed, grid)
    want = dense(base, experts, given, elect=method != "breadcrumbs")
    if method == "breadcrumbs":
        del given["zero_sign"]  # it elects none, and says so
    close(merge(method, base, experts, given), want)


FULL = {
    "density": 0.2, "gamma": 0.0, "weight": 1.0, "scope": "model", "count": "round", "at_threshold": "all",
    "zero_sign": "majority", "normalize": True, "rescale": "none", "scale": 1.0,
}  # fmt: skip
PER_ROW = {"scope": "row", "density": 0.5, "gamma": 0.2, "normalize": False, "scale": 0.2}
NAMED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {  # method, what is given, what differs from FULL
    "the paper's TIES is the default": ("ties", {}, {}),
    "as many as asked": ("ties", {"at_threshold": "exact"}, {"at_threshold": "exact"}),
    "the published code's count": ("ties", {"count": "legacy"}, {"count": "legacy"}),
    "legacy at density 1": ("ties", {"count": "legacy", "density": 1.0}, {"density": 1.0}),
    "weights are votes and shares": ("ties", {"weight": (2.0, -0.5, 1.0)}, {"weight": (2.0, -0.5, 1.0)}),
    "AdaMerging's sum": ("ties", {"normalize": False, "scale": 0.3}, {"normalize": False, "scale": 0.3}),
    "cancelled votes count as plus": ("ties", {"zero_sign": "+", "density": 0.8}, {"zero_sign": "+", "density": 0.8}),
    "cancelled votes follow the majority": ("ties", {"density": 0.8}, {"density": 0.8}),
    "per tensor": ("ties", {"scope": "tensor", "density": 0.6}, {"scope": "tensor", "density": 0.6}),
    "Breadcrumbs per row": ("breadcrumbs", {"density": 0.5, "gamma": 0.2}, PER_ROW),
    "Breadcrumbs per tensor": (
        "breadcrumbs", {"scope": "tensor", "at_threshold": "exact", "density": 0.5, "gamma": 0.1},
        {**PER_ROW, "scope": "tensor", "at_threshold": "exact", "gamma": 0.1},
    ),
    "Breadcrumbs with votes": (
        "breadcrumbs_ties", {"density": 0.5, "gamma": 0.2, "zero_sign": "+"}, {**PER_ROW, "zero_sign": "+"},
    ),
}  # fmt: skip


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", NAMED)
@pytest.mark.parametrize("dtype", ["fp32", "bf16", pytest.param("fp64", marks=pytest.mark.slow)])
def test_named_variants(name: str, dtype: str):
    method, given, differs = NAMED[name]
    full = {**FULL, **differs}
    for field in ("density", "gamma", "weight"):
        full[field] = full[field] if isinstance(full[field], tuple) else (full[field],) * 3
    for seed, grid in itertools.product(range(2 if dtype == "fp32" else 1), (False, True)):
        if grid and full["scope"] == "row":
            continue
        base, experts = pool(3, DTYPES[dtype], seed, grid)
        close(merge(method, base, experts, given), dense(base, experts, full, elect=method != "breadcrumbs"))


def test_majority_and_plus_differ_where_votes_cancel():
    base, up = torch.zeros(5), torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])
    down = torch.tensor([-1.0, -1.0, -1.0, 0.0, 0.0])

    def first(**given: Any) -> float:
        return float(merge("ties", {"w": base}, [{"w": up}, {"w": down}], {"density": 1.0, **given})["w"][0])

    assert first() == -1.0 and first(zero_sign="+") == 1.0


def test_the_majority_is_that_of_the_changes_that_are_merged():
    # L1 rescaling happens before the vote: one kept element of 2 stands for 2 + 4 * 1, three times itself
    one = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0])
    two, base = torch.tensor([-3.0, -2.5, -0.5, 0.0, 0.0]), torch.zeros(5)
    given = {"scope": "tensor", "density": (0.2, 0.4), "rescale": "l1"}
    other = {"a": torch.tensor([1.0, -1.0]), "w": one}, {"a": torch.tensor([-1.0, 1.0]), "w": two}
    states = [dict(state) for state in other]
    full = {**FULL, **given, "gamma": (0.0, 0.0), "weight": (1.0, 1.0)}
    start = {"a": torch.zeros(2), "w": base}
    close(merge("ties", start, states, given), dense(start, states, full, elect=True))


@settings(max_examples=40, deadline=None)
@given(n=st.integers(1, 9), density=DENSITIES, gamma=st.sampled_from([0.0, 0.1, 0.3]), seed=st.integers(0, 99))
@example(n=1, density=0.1, gamma=0.3, seed=0)
def test_rows_keep_the_asked_number(n: int, density: float, gamma: float, seed: int):
    tau = torch.randint(1, 4, (5, n), generator=torch.Generator().manual_seed(seed)).float()  # ties, no zeros
    given = {"density": density, "gamma": gamma, "scale": 1.0}
    kept = merge("breadcrumbs", {"w": torch.zeros_like(tau)}, [{"w": tau}], given)["w"]
    for row, left in zip(tau, kept, strict=True):
        want = trim(row.double(), density, gamma, "round", exact=True)
        assert sorted(left.tolist()) == sorted(want.tolist())  # which of equal ones is kept is not promised
        assert all(a in (0.0, b) for a, b in zip(left.tolist(), row.tolist(), strict=True))


def test_equal_magnitudes_are_not_all_lost_to_the_top_trim():
    # a bias whose changes are one size: none is an outlier
    base, expert = {"w": torch.zeros(20)}, {"w": torch.ones(20)}
    for scope in ("row", "tensor", "model"):
        merged = merge("breadcrumbs", base, [expert], {"scope": scope, "density": 0.5, "gamma": 0.1, "scale": 1.0})["w"]
        assert int(merged.sum()) >= 10, scope


def test_a_tiny_tensor_keeps_one_element():
    base, expert = {"w": torch.zeros(3)}, {"w": torch.tensor([1.0, -3.0, 2.0])}
    merged = merge("ties", base, [expert], {"scope": "tensor", "density": 0.1, "count": "floor"})["w"]
    assert merged.tolist() == [0.0, -3.0, 0.0]


@pytest.mark.parametrize("given", [{"density": (0.5, 0.5)}, {"weight": (1.0, 3.0)}, {"gamma": (0.1, 0.1)}])
@pytest.mark.parametrize("lacking", [0, 1])
def test_a_tensor_that_one_expert_lacks(given: dict[str, Any], lacking: int):
    base, experts = pool(2, torch.float32, 0, grid=False)
    head = torch.Generator().manual_seed(5)
    for state in (base, *experts):
        state["lm_head.weight"] = torch.randn(3, 4, generator=head)
    complete = [dict(e) for e in experts]
    complete[lacking]["lm_head.weight"] = base["lm_head.weight"]  # who lacks a tensor has not changed it
    del experts[lacking]["lm_head.weight"]
    close(merge("ties", base, experts, given), merge("ties", base, complete, given))


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties", "dare", "dare_ties", "della"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"density": 1.5}, r"settings\.density.*0\.\.1"),
        ({"density": (0.5, -0.1)}, r"settings\.density.*0\.\.1"),
        ({"density": (0.1, 0.2, 0.3)}, r"settings\.density.*3 values for 2 experts"),
        ({"densty": 0.5}, r"settings\.densty.*no such setting[\s\S]*did you mean `density`"),
        ({"rescale": "p"}, r"settings\.rescale"),
        ({"zero_sign": "-"}, r"settings\.zero_sign"),
    ],
)
def test_wrong_settings_are_named(method: str, given: dict[str, Any], message: str):
    base, experts = pool(2, torch.float32, 0, grid=False)
    with pytest.raises(SpoliaError, match=message):
        merge(method, base, experts, given)


def test_every_wrong_setting_is_told_at_once():
    base, experts = pool(2, torch.float32, 0, grid=False)
    with pytest.raises(SpoliaError) as caught:
        merge("ties", base, experts, {"density": 2, "gamma": -1, "epsilon": 0.1})
    assert [p.where for p in caught.value.problems] == ["settings.density", "settings.gamma", "settings.epsilon"]


@pytest.mark.parametrize("method", ["ties", "breadcrumbs", "breadcrumbs_ties"])
def test_no_probability_to_rescale_by(method: str):
    base, experts = pool(2, torch.float32, 0, grid=False)
    with pytest.raises(SpoliaError, match=r"settings\.rescale.*no probability.*`l1` or `none`"):
        merge(method, base, experts, {"rescale": "inverse_p"})


@pytest.mark.parametrize(("method", "other"), [("dare", "+"), ("breadcrumbs", "+"), ("della_linear", "majority")])
def test_a_sign_nobody_elects_is_told(method: str, other: str):
    base, experts = pool(2, torch.float32, 0, grid=False)
    with pytest.warns(SpoliaWarning, match=r"settings\.zero_sign: `.*` has no effect"):
        got = merge(method, base, experts, {"zero_sign": other})
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpoliaWarning)
        plain = merge(method, base, experts, {})
    assert all(torch.equal(got[name], plain[name]) for name in plain)


@pytest.mark.parametrize("method", ["della", "della_linear"])
@pytest.mark.parametrize(
    ("given", "window"),
    [
        ({"density": 0.3, "epsilon": 0.4}, r"1\.52588e-05\.\.0\.599985"),
        ({"density": (0.3, 0.9), "epsilon": 0.2}, r"0\.8\.\.1"),
        ({"density": 0.9, "epsilon": (0.05, 0.2)}, r"0\.8\.\.1"),
        ({"density": (0.5, 0.9), "epsilon": (0.3, 0.2)}, r"0\.8\.\.1"),
    ],
)
def test_a_narrowed_window_is_told_once(method: str, given: dict[str, Any], window: str):
    base, experts = pool(2, torch.float32, 0, grid=False)
    with pytest.warns(SpoliaWarning) as caught:
        merge(method, base, experts, given)
    (told,) = (str(w.message) for w in caught if issubclass(w.category, SpoliaWarning))
    assert re.search(rf"settings\.epsilon: density .* leave 0\.\.1\n  mend: the window is narrowed to {window};", told)


@pytest.mark.parametrize(
    "given", [{}, {"density": (1.0, 0.0), "epsilon": 0.5}, {"density": 0.5, "epsilon": (0.4, 0.0)}]
)
def test_a_window_that_fits_is_not_told(given: dict[str, Any]):
    base, experts = pool(2, torch.float32, 0, grid=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", SpoliaWarning)
        merge("della", base, experts, given)
