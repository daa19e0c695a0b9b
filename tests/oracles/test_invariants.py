"""What every merge of the catalog must keep, whatever its rule; and the limits in which one method becomes another."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spolia
from spolia.catalog import Method, data_free
from spolia.errors import SpoliaError

State = dict[str, torch.Tensor]
Given = dict[str, Any]
MERGES = {m.name: m for m in data_free()}
RANDOM = {name for name in MERGES if name.startswith(("dare", "della"))}
KEEP_ALL: dict[str, Given] = {  # settings in which nothing is dropped and one expert is its own merge
    "task_arithmetic": {"scale": 1.0},
    "ties": {"density": 1.0},
    "slerp": {"t": 1.0},
    "nearswap": {"t": 100.0},
    "magmax": {"scale": 1.0},
    "consensus_ta": {"active": 0, "scale": 1.0},
    "wudi": {"solver": "exact"},
    "knots": {"density": 1.0, "scale": 1.0},
    "awd": {"scale": 1.0},
    **{name: {"density": 1.0, "scale": 1.0} for name in ("breadcrumbs", "breadcrumbs_ties", *RANDOM)},
}
NO_IDENTITY = {"arcee_fusion", "iso_c", "iso_cts", "pcb"}  # one expert is not its own merge under any settings
# decompositions in fp64, so that digits compare; few steps, so that tests are quick
ALWAYS: dict[str, Given] = {
    **{name: {"precision": "float64"} for name in ("tsv", "iso_c", "iso_cts")},
    "wudi": {"precision": "float64", "steps": 3},
    "awd": {"steps": 3},
}
NUMBERS = {"layer.10.w": (4, 6), "layer.2.w": (6, 3), "norm.weight": (5,), "scalar": (), "none": (0, 2)}
# fp32's last digit a few times over, at numbers of size 1
CLOSE = {"rtol": 1e-5, "atol": 2e-6}


def every(test: Callable[..., None]) -> Callable[..., None]:
    """With every merge; a third of them counts as fast."""
    return pytest.mark.sampled(3)(pytest.mark.parametrize("method", MERGES.values(), ids=MERGES)(test))


def draw(count: int, dtype: torch.dtype = torch.float32) -> list[State]:
    """Multiples of 1/16 below 1: their differences and dyadic sums are exact in every type, so order cannot round."""
    noise = torch.Generator().manual_seed(0)

    def state(k: int) -> State:
        drawn = {name: torch.randint(-15, 16, shape, generator=noise) / 16 for name, shape in NUMBERS.items()}
        drawn["scalar"] = torch.tensor((k + 1) / 16)  # the directions of numbers could cancel
        return {name: t.to(dtype) for name, t in drawn.items()}

    return [state(k) for k in range(count)]


def pool(method: Method, dtype: torch.dtype = torch.float32) -> Given:
    """experts and base in the largest number up to 4 and 1 that the method takes."""
    kind = method.settings_class()
    base, *experts = draw(min(4, kind.experts[1] or 4) + 1, dtype)
    return {"experts": experts, "base": base if kind.base == "required" else None}


def models(given: Given) -> list[State]:
    return [*([given["base"]] if given["base"] is not None else []), *given["experts"]]


def mapped(given: Given, change: Callable[[State], Any]) -> Given:
    base = given["base"]
    return {"experts": [change(e) for e in given["experts"]], "base": change(base) if base is not None else None}


def merge(method: Method | str, given: Given, settings: Given | None = None, **more: Any) -> State:
    name = method if isinstance(method, str) else method.name
    return spolia.merge(**given, method=name, settings={**ALWAYS.get(name, {}), **(settings or {})}, **more)


def same(got: State, wanted: State) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        want = wanted[name]
        assert value.dtype == want.dtype and torch.equal(value, want), name


def close(got: State, wanted: State, **bounds: float) -> None:
    assert got.keys() == wanted.keys()
    for name, value in got.items():
        torch.testing.assert_close(value.double(), wanted[name].double(), **{**CLOSE, **bounds})


@every
def test_one_expert_and_nothing_dropped_is_the_expert(method: Method):
    kind = method.settings_class()
    if kind.experts[0] > 1 or method.name in NO_IDENTITY:
        pytest.skip("takes two or more, or leaves something out always")
    base, expert = draw(2)
    given = {"experts": [expert], "base": None if kind.base == "unused" else base}
    close(merge(method, given, settings=KEEP_ALL.get(method.name)), expert)


@every
def test_models_equal_to_the_base_give_the_base(method: Method):
    given = pool(method)
    still = {**given, "experts": [given["experts"][0]] * len(given["experts"])}
    if given["base"] is not None:
        still["base"] = given["experts"][0]
    close(merge(method, still), given["experts"][0], rtol=1e-6, atol=0)  # an average of K rounds K products


@every
def test_the_order_of_experts_does_not_matter(method: Method):
    given, kind = pool(method), method.settings_class()
    if len(given["experts"]) < 4:
        pytest.skip("has a direction")
    weights = (1.0, 0.5, 0.25, 2.0)

    def merged(order: tuple[int, ...]) -> State:
        chosen = dict(KEEP_ALL[method.name]) if method.name in RANDOM else {}  # coins go by place: keep all
        if "weight" in kind.model_fields:
            chosen["weight"] = tuple(weights[k] for k in order)
        return merge(method, {**given, "experts": [given["experts"][k] for k in order]}, settings=chosen)

    close(merged((3, 2, 1, 0)), merged((0, 1, 2, 3)))
    close(merged((1, 3, 0, 2)), merged((0, 1, 2, 3)))


@every
def test_tensors_come_out_in_the_first_models_order_which_changes_nothing(method: Method):
    given = pool(method)
    turned = merge(method, mapped(given, lambda s: dict(reversed(s.items()))))
    assert list(turned) == list(reversed(NUMBERS))
    same(turned, merge(method, given))


@every
def test_integers_are_the_donors_and_inputs_stay_as_they_are(method: Method):
    given = pool(method)
    for k, state in enumerate(models(given)):
        state["position_ids"] = torch.arange(5) + k
        state["mask"] = torch.tensor([True, False, bool(k)])
        state["table"] = torch.full((2, 2), k, dtype=torch.uint8)
    before = mapped(given, lambda s: {n: t.clone() for n, t in s.items()})
    merged = merge(method, given)
    integers = ("position_ids", "mask", "table")
    same({name: merged[name] for name in integers}, {name: models(given)[0][name] for name in integers})
    for state, copy in zip(models(given), models(before), strict=True):
        same(state, copy)


@pytest.mark.slow
@every
def test_threads_memory_and_parts_change_no_bit(method: Method, monkeypatch: pytest.MonkeyPatch):
    noise = torch.Generator().manual_seed(0)
    given = mapped(pool(method), lambda s: {"w": torch.randn(150, 1000, generator=noise), "norm": s["norm.weight"]})
    want = merge(method, given, threads=1)
    same(merge(method, given, threads=3), want)
    same(merge(method, given, threads=2, chunk_memory=60_000_000), want)
    monkeypatch.setattr("spolia.parts.merging.PART", 1 << 17)  # two parts where a tensor may be split
    same(merge(method, given, threads=2), want)


@every
def test_from_files_as_in_memory(method: Method, write_model: Callable[..., Path], tmp_path: Path):
    given = pool(method, dtype=torch.bfloat16)
    want, counter = merge(method, given), itertools.count()
    folders = mapped(given, lambda s: write_model(tmp_path / f"model-{next(counter)}", s, shards=2))
    same(merge(method, folders), want)
    merge(method, folders, out=tmp_path / "out", max_shard_size=50)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 1
    same({name: t for file in files for name, t in load_file(file).items()}, want)


@every
def test_fp64_gives_the_same_to_fp32s_digits(method: Method):
    given = pool(method)
    merged = merge(method, mapped(given, lambda s: {n: t.double() for n, t in s.items()}))
    assert all(t.dtype == torch.float64 for t in merged.values())
    close(merge(method, given), merged)


@every
def test_half_precision_is_the_fp32_result_rounded_once(method: Method):
    given = pool(method, dtype=torch.bfloat16)
    wide = merge(method, mapped(given, lambda s: {n: t.float() for n, t in s.items()}))
    same(merge(method, given), {n: t.bfloat16() for n, t in wide.items()})
    same(merge(method, given, dtype="float32"), wide)


@every
def test_tied_tensors_stay_tied(method: Method):
    given = mapped(pool(method), lambda s: {"head": s["layer.2.w"], **s})
    merged = merge(method, given)
    assert merged["head"].data_ptr() == merged["layer.2.w"].data_ptr()
    same(merged, merge(method, given))


@every
def test_strides_and_gradients_change_nothing(method: Method):
    given = pool(method)
    turned = mapped(given, lambda s: {n: t.mT.contiguous().mT if t.ndim == 2 else t for n, t in s.items()})
    same(merge(method, turned), merge(method, given))
    learned = mapped(given, lambda s: {n: t.clone().requires_grad_() for n, t in s.items()})
    merged = merge(method, learned)
    assert not any(t.requires_grad for t in merged.values())
    same(merged, merge(method, given))


@every
@pytest.mark.parametrize("fault", ["missing", "extra", "shape", "nan"])
def test_what_does_not_fit_is_named(method: Method, fault: str):
    given = pool(method)
    if len(models(given)) == 1 and fault != "nan":
        pytest.skip("nothing to compare with")
    odd = given["experts"][-1]
    if fault == "missing":
        del odd["layer.10.w"]
    elif fault == "extra":
        odd["layer.99.w"] = torch.ones(2)
    elif fault == "shape":
        odd["layer.10.w"] = torch.ones(4, 7)
    else:
        odd["layer.10.w"] = odd["layer.10.w"].clone()
        odd["layer.10.w"][1, 2] = torch.nan
    with pytest.raises(SpoliaError, match=r"layer\.99\.w" if fault == "extra" else r"layer\.10\.w") as caught:
        merge(method, given)
    if fault == "nan":
        assert "first at element 8" in str(caught.value) and f"expert {len(given['experts']) - 1}" in str(caught.value)


@every
def test_no_experts_and_no_base_where_one_is_needed(method: Method):
    given = pool(method)
    for part, none, message in (("experts", [], "experts"), ("base", None, "needs the base")):
        if given[part] is not None:
            with pytest.raises(SpoliaError, match=message):
                merge(method, {**given, part: none})


# where one method becomes another


def changes(count: int, positive: bool = False) -> Given:
    """Base and experts of gaussian changes: no two magnitudes are equal."""
    noise = torch.Generator().manual_seed(1)
    base = {"w": torch.randn(20, 30, generator=noise), "b": torch.randn(11, generator=noise)}
    drawn = [{n: torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(count)]
    return {
        "experts": [{n: base[n] + (t.abs() if positive else t) for n, t in state.items()} for state in drawn],
        "base": base,
    }


WEIGHTS = {"weight": (0.7, 0.4, 1.0)}
SUM = {"normalize": False, "scale": 0.3}
FULL = {"density": 1.0, **SUM, **WEIGHTS}
ADDED = ("task_arithmetic", {"scale": 0.3, **WEIGHTS})
LIMITS: dict[str, tuple[tuple[str, Given], tuple[str, Given]]] = {
    "average is task arithmetic at 1/K": (("average", {}), ("task_arithmetic", {"scale": 1 / 3})),
    "dare at p = 0 is task arithmetic": (("dare", FULL), ADDED),
    "della_linear at p = 0 too": (("della_linear", FULL), ADDED),
    "breadcrumbs that drop nothing too": (("breadcrumbs", FULL), ADDED),
    "dare_ties at p = 0 is ties at density 1": (("dare_ties", FULL), ("ties", FULL)),
    "della at p = 0 too": (("della", FULL), ("ties", FULL)),
    "breadcrumbs_ties that drop nothing too": (("breadcrumbs_ties", FULL), ("ties", FULL)),
    "a common factor of the weights cancels": (("ties", WEIGHTS), ("ties", {"weight": (1.4, 0.8, 2.0)})),
}


@pytest.mark.parametrize("limit", LIMITS)
def test_limits(limit: str):
    ((one, given), (other, wanted)), models = LIMITS[limit], changes(3)
    start = {"base": None} if one == "average" else {}
    close(merge(one, {**models, **start}, settings=given), merge(other, models, settings=wanted))


def test_ties_of_agreeing_signs_is_task_arithmetic():
    models = changes(3, positive=True)
    close(merge("ties", models, settings=FULL), merge("task_arithmetic", models, settings={"scale": 0.3, **WEIGHTS}))


def test_ties_mean_is_sum_over_k_where_all_survive_and_agree():
    models = changes(3)
    mean, added = (merge("ties", models, settings={"density": 0.5, "normalize": n}) for n in (True, False))
    sizes = [torch.cat([(e[n] - b).abs().flatten() for n, b in models["base"].items()]) for e in models["experts"]]
    cuts = torch.stack(sizes).median(1).values  # density 1/2 of an odd number of elements keeps the middle one
    for name, base in models["base"].items():
        taus = torch.stack([e[name] - base for e in models["experts"]])
        survive = (taus.abs() > cuts.view(3, *[1] * base.ndim)).all(0)
        agree = survive & (taus.sign().sum(0).abs() == 3)
        assert bool(agree.any()) or name == "b"
        torch.testing.assert_close(3 * (mean[name] - base)[agree], (added[name] - base)[agree], **CLOSE)


@pytest.mark.parametrize("scope", ["model", "tensor", "row"])
def test_breadcrumbs_without_a_top_trims_by_magnitude(scope: str):
    models = changes(1)
    given = {"density": 0.3, "scope": scope, "scale": 1.0}
    close(merge("breadcrumbs", models, settings={**given, "gamma": 0.0}), merge("ties", models, settings=given))
