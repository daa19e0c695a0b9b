"""A merge gives the same bits whatever the threads, memory, shards or place; bad numbers and bad targets are refused."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spolia
from spolia.catalog import find
from spolia.core.stream import BLOCK
from spolia.errors import SpoliaError
from spolia.runs.merging import plan_merge, run_merge
from spolia.runs.request import MergeRequest, ModelRef

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")
State = dict[str, torch.Tensor]
Write = Callable[..., Path]
METHODS = [
    ("average", {"weight": (1.0, 2.0, 0.5)}), ("task_arithmetic", {}), ("slerp", {"t": 0.3}), ("ties", {}),
    ("ties", {"at_threshold": "exact", "density": (0.2, 0.5, 1.0)}), ("ties", {"scope": "tensor", "rescale": "l1"}),
    ("dare", {}), ("dare_ties", {"zero_sign": "majority"}), ("dare", {"rescale": "l1"}), ("della", {}), ("breadcrumbs", {}),
    *(("awd", {"granularity": granularity, "steps": 20}) for granularity in ("global", "tensor", "row")),
]  # fmt: skip


def state(seed: int, size: int = 3 * BLOCK + 5) -> State:
    """A small model with every kind of tensor; one of `size` elements, more than a block."""
    noise = torch.Generator().manual_seed(seed)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=noise)

    numbers = {f"layers.{i}.weight": draw(37, 53) for i in range(11)}
    others = {
        "bias": draw(7),
        "scale": draw(),
        "none": draw(0, 5),
        "ids": torch.arange(seed, seed + 9),
        "on": draw(5) > 0,
    }
    halves = {"half": draw(30, 20).half(), "brain": draw(size).bfloat16(), "double": draw(11, 3).double()}
    return numbers | others | halves


def same(a: State, b: State) -> bool:
    def bits(t: torch.Tensor) -> torch.Tensor:
        return t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else torch.empty(0)

    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and torch.equal(bits(a[n]), bits(b[n])) for n in a
    )


def load(folder: Path) -> State:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def refused(make: Callable[[], Any], *words: str) -> str:
    with pytest.raises(SpoliaError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(problem.where and problem.mend for problem in caught.value.problems)
    return str(caught.value)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> list[Path]:
    """A base and three experts, each in other shards."""
    parent = tmp_path_factory.mktemp("models")
    return [write_model(parent / f"m{i}", state(i), {"model_type": "x"}, shards=i + 1) for i in range(4)]


def pool(method: str, models: list[Any]) -> dict[str, Any]:
    return {
        "experts": models[1:2] if method == "slerp" else models[1:],
        "base": None if method == "average" else models[0],
    }


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_bits_do_not_depend_on_how_it_is_done(
    method: str, settings: dict[str, Any], folders: list[Path], tmp_path: Path
) -> None:
    call = {"method": method, "settings": settings, "seed": 3}
    told = refused(lambda: spolia.merge(**pool(method, folders), **call, chunk_memory=1), "MB", "chunk_memory")
    least = int(re.findall(r"at least (\d+) MB", told)[0]) * 1_000_000
    expected = spolia.merge(**pool(method, [state(i) for i in range(4)]), **call, threads=1)
    for options in ({"threads": 2}, {"threads": 3, "chunk_memory": least}):
        assert same(spolia.merge(**pool(method, folders), **call, **options), expected), options
    for shard in (10_000, 5_000_000_000):
        spolia.merge(**pool(method, folders), **call, out=tmp_path / str(shard), max_shard_size=shard)
        assert same(load(tmp_path / str(shard)), expected)
    for name in ("ids", "on"):  # integers are the first model's, never merged
        assert torch.equal(expected[name], state(1 if method == "average" else 0)[name])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "dare", "breadcrumbs"])
def test_tensors_of_several_parts(method: str) -> None:
    """Above 32 blocks a tensor is split over workers."""
    models = [{"w": state(i, 33 * BLOCK + 7)["brain"].view(-1, 1).float()} for i in range(3)]
    models = [{"w": m["w"].view(1, -1)} for m in models] if method == "breadcrumbs" else models
    found = [spolia.merge(**pool(method, models), method=method, threads=n) for n in (1, 3)]
    assert same(*found)
    if method == "average":
        # fp32 sum of two numbers: one rounding.
        torch.testing.assert_close(found[0]["w"], (models[1]["w"] + models[2]["w"]) / 2, rtol=2e-7, atol=1e-7)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_out_types_are_one_rounding_of_the_wide_result(dtype: str, folders: list[Path], tmp_path: Path) -> None:
    kind = getattr(torch, dtype)
    wide = spolia.merge(folders[1:], dtype="float64" if dtype == "float64" else "float32")
    double = spolia.merge(folders[1:], dtype="float64")["double"]  # its arithmetic is fp64
    spolia.merge(folders[1:], dtype=dtype, out=tmp_path / "m")
    found = load(tmp_path / "m")
    for name, tensor in found.items():
        origin = double if name == "double" else wide[name]
        assert tensor.dtype == (kind if origin.is_floating_point() else origin.dtype), name
        assert torch.equal(tensor, origin.to(tensor.dtype)), name
    refused(lambda: spolia.merge(folders[1:], dtype="floot16"), "floot16", "float16")


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("who", "element"), [(0, 0), (1, 2 * BLOCK + 17), (3, 3 * BLOCK + 4)])
@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "slerp"])
def test_nan_and_inf_are_traced(bad: float, who: int, element: int, method: str) -> None:
    models = [{"v": torch.randn(5), "w": torch.randn(3 * BLOCK + 5)} for _ in range(4)]
    if method == "slerp":
        models = models[:2] if who == 0 else [models[0], models[who]]
    models[min(who, len(models) - 1)]["w"][element] = bad
    names = dict(zip(["math", "code", "law"], models[1:], strict=False))
    owner = "base" if who == 0 else list(names)[min(who, len(models) - 1) - 1]
    told = refused(lambda: spolia.merge(names, base=models[0], method=method, threads=2), "`w`", f"element {element}")
    assert told.startswith(f"{owner}: ")


def test_overflow_is_refused_with_a_cure(tmp_path: Path, write_model: Write) -> None:
    big = {"v": torch.ones(3), "w": torch.full((BLOCK + 1,), 7e4)}
    models = [write_model(tmp_path / n, big) for n in "ab"]
    refused(lambda: spolia.merge(models, dtype="float16", out=tmp_path / "m"), "70000", "`w`", "float16", "float32")
    assert not (tmp_path / "m").exists()
    large = {"w": torch.full((BLOCK,), 3e38)}  # finite elements whose sum is not
    assert torch.isfinite(spolia.merge([large, large])["w"]).all()
    refused(lambda: spolia.merge([large, large], settings={"normalize": False}), "w", "scale")
    copied = {"w": torch.ones(2), "h.attn.masked_bias": torch.tensor(-1e9)}
    refused(lambda: spolia.merge([{"w": torch.ones(2)}], base=copied, method="dare", dtype="float16"), "float16")


class Meddler:
    """A progress bar that does something to the world after the first part."""

    def __init__(self, act: Callable[[], object]):
        self.act, self.told = act, list[int]()

    def start(self, *_: object) -> None: ...
    def finish(self) -> None: ...
    def advance(self, amount: int) -> None:
        self.told.append(amount)
        if len(self.told) == 2:  # the first tells what an earlier attempt had done
            self.act()


@pytest.mark.parametrize("how", ["cut", "replaced", "deleted", "touched"])
def test_an_input_that_changes_is_refused(how: str, tmp_path: Path, write_model: Write) -> None:
    models = [write_model(tmp_path / n, state(i)) for i, n in enumerate("ab")]
    file = models[1] / "model.safetensors"

    def act() -> None:
        if how == "cut":
            os.truncate(file, 5000)
        elif how == "replaced":
            file.with_name("x").write_bytes(file.read_bytes())
            file.with_name("x").replace(file)
        elif how == "deleted":
            file.unlink()
        else:
            os.utime(file, ns=(1, 1))

    told = refused(lambda: spolia.merge(models, out=tmp_path / "m", progress=Meddler(act), threads=1))
    assert str(file) in told and not (tmp_path / "m").exists()


def test_a_stopped_merge_goes_on(folders: list[Path], tmp_path: Path) -> None:
    def stop() -> None:
        raise KeyError("stop")

    call = {**pool("dare", folders), "method": "dare"}
    with pytest.raises(KeyError):
        spolia.merge(**call, out=tmp_path / "m", progress=Meddler(stop), threads=1)
    again = Meddler(lambda: None)
    spolia.merge(**call, out=tmp_path / "m", progress=again, threads=1)
    assert again.told[0] > 0  # some parts were kept
    assert sum(again.told) == sum(t.nbytes for t in load(tmp_path / "m").values())
    spolia.merge(**call, out=tmp_path / "whole" / "m")
    assert digest(tmp_path / "m") == digest(tmp_path / "whole" / "m")


# --- targets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["base", "a", "link", "../pool/a", ".", "base-left-aside"])
def test_no_input_is_ever_overwritten(target: str, tmp_path: Path, write_model: Write) -> None:
    parent = tmp_path / "pool"
    base, a, b = (write_model(parent / n, {"w": torch.ones(2)}) for n in ("base", "a", "b"))
    (tmp_path / "link").symlink_to(a)
    out = {"link": tmp_path / "link", "base-left-aside": base}.get(target, parent / target)
    method = "average" if target == "base-left-aside" else "task_arithmetic"
    for overwrite in (False, True):
        refused(lambda: spolia.merge([a, b], base=base, method=method, out=out, overwrite=overwrite), str(out))  # noqa: B023
    assert all((m / "model.safetensors").exists() for m in (base, a, b))


def test_refusals_come_before_any_work(folders: list[Path], tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    for call, word in (
        ({"out": tmp_path / "full"}, "full"), ({"out": tmp_path / "m", "chunk_memory": 1000}, "chunk_memory"),
        ({"out": tmp_path / "m", "method": "ties"}, "base"), ({"out": tmp_path / "m", "method": "slerp"}, "3"),
        ({"out": tmp_path / "m", "method": "avrage"}, "average"), ({"out": tmp_path / "m", "settings": {"wait": 1}}, "weight"),
        ({"out": tmp_path / "m", "settings": {"weight": (1.0,)}}, "settings.weight"),
    ):  # fmt: skip
        refused(lambda: spolia.merge(folders[1:], **call), word)  # noqa: B023
    assert [p.name for p in tmp_path.iterdir()] == ["full"]
    refused(lambda: spolia.merge([], method="average"), "average")


def test_a_failed_swap_brings_the_old_model_back(folders: list[Path], tmp_path: Path) -> None:
    (out := tmp_path / "m").mkdir()
    (out / "old").write_text("x")
    rename, calls = os.rename, list[Any]()

    def fails(a: Any, b: Any) -> None:
        calls.append((a, b))
        if len(calls) == 2:  # the old model is aside, the new one not yet in place
            raise OSError(5, "Input/output error")
        rename(a, b)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(os, "rename", fails)
        refused(lambda: spolia.merge(folders[1:], out=out, overwrite=True), "check the disk")
    assert (out / "old").read_text() == "x"


def test_long_rows_count_as_memory() -> None:
    """Breadcrumbs ranks whole rows: one of 32 MB does not fit 16."""
    models = [{"w": torch.randn(1, 8_000_000)} for _ in range(3)]
    refused(lambda: spolia.merge(**pool("breadcrumbs", models), method="breadcrumbs", chunk_memory=16_000_000), "MB")


# --- what lies beside the weights -------------------------------------------------------------------------------------


def request(models: list[Path], **others: Any) -> MergeRequest:
    refs = [ModelRef(m.name, m) for m in models]
    method = find("task_arithmetic")
    return MergeRequest(method, refs[1:], lambda name: method.settings_class()(), refs[0], **others)


def test_the_plan_is_what_happens(folders: list[Path], tmp_path: Path) -> None:
    (folders[0] / "tokenizer.json").write_text("{}")
    (folders[0] / "pytorch_model.bin").write_text("pickle")
    asked = request(folders, recipe="spolia: 1\n", out_dtype="bfloat16")
    plan = plan_merge(asked, tmp_path / "m", max_shard_size=200_000)
    run_merge(asked, tmp_path / "m", max_shard_size=200_000, card=lambda *_: "card")
    found = {f.name for f in (tmp_path / "m").iterdir()}
    assert set(plan.files) == found and "pytorch_model.bin" not in found
    assert plan.bytes_out == sum(f.stat().st_size for f in (tmp_path / "m").glob("*.safetensors"))
    assert plan.tensors == len(load(tmp_path / "m")) and plan.seeds == [0]
    assert plan.bytes_in == sum(t.nbytes for i in range(4) for t in state(i).values())
    texts = [f.read_text() for f in (tmp_path / "m").iterdir() if f.suffix in (".json", ".yaml", ".md")]
    assert not any(str(folders[0].parent) in text for text in texts)  # no path of this machine


@pytest.mark.parametrize("embed", ["model.embed_tokens.weight", "transformer.wte.weight"])
def test_a_cut_vocabulary_changes_the_config(embed: str, tmp_path: Path, write_model: Write) -> None:
    config = {"vocab_size": 10, "torch_dtype": "float32"}
    positions = "encoder.embed_positions.weight"  # an embedding, too, but of no vocabulary
    models = [
        write_model(tmp_path / n, {embed: torch.ones(rows, 3), positions: torch.ones(99, 3)}, config)
        for n, rows in (("base", 10), ("a", 8))
    ]
    run_merge(request(models, on_size_mismatch="truncate", out_dtype="bfloat16"), tmp_path / "m")
    assert json.loads((tmp_path / "m" / "config.json").read_text()) == {"vocab_size": 8, "torch_dtype": "bfloat16"}
    refused(lambda: run_merge(request(models), tmp_path / "n"), embed, "[10, 3]", "[8, 3]", "truncate")
