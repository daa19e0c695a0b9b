"""Merges that write masks, and models with a mask put on: folders equal memory, a stopped merge goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.errors import SpoliaError
from spolia.runs import merging

Write = Callable[..., Path]
METHODS = ["emr", "tall_masks"]


@pytest.fixture
def pool(tmp_path: Path, write_model: Write) -> tuple[Path, dict[str, Path]]:
    """Folders: a base and two experts in bf16, with a tensor of more than one block and an integer buffer."""
    noise = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (700, 300), "layers.0.weight": (16, 16), "norm": (5,)}
    base = {n: torch.randn(s, generator=noise).bfloat16() for n, s in shapes.items()}
    paths = {}
    for name in ("base", "math", "code"):
        size = 0.0 if name == "base" else 0.5
        state = {n: (t.float() + size * torch.randn(t.shape, generator=noise)).bfloat16() for n, t in base.items()}
        state["steps"] = torch.tensor([3])
        paths[name] = write_model(tmp_path / name, state, {"model_type": "llama"})
    return paths.pop("base"), paths


def difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    return sum(float((a[n].float() - b[n].float()).abs().sum()) for n in a)


@pytest.mark.parametrize("method", METHODS)
def test_folders_and_memory_agree(method: str, pool: tuple[Path, dict[str, Path]], tmp_path: Path):
    base, experts = pool
    out = spolia.merge(experts, base=base, method=method, out=tmp_path / "out", max_shard_size=300_000)
    assert sorted(f.name for f in (out / "masks").iterdir()) == ["code.safetensors", "math.safetensors"]
    assert json.loads((out / "spolia.json").read_text())["masks"] == [
        "masks/math.safetensors",
        "masks/code.safetensors",
    ]
    found = spolia.masks(experts, base=base, method=method)
    merged = spolia.merge(experts, base=base, method=method)
    for name in experts:
        folder = spolia.attach(out, name, base=base, out=tmp_path / f"with-{name}")
        direct = spolia.attach(out, name, base=base)
        states = read_tensors(base), {n: read_tensors(p) for n, p in experts.items()}
        memory = spolia.attach(merged, found[name], base=states[0])
        written = read_tensors(folder)
        assert written.keys() == direct.keys() == memory.keys()
        for n, tensor in written.items():
            assert torch.equal(tensor, direct[n]) and torch.equal(tensor, memory[n])
        assert int(written["steps"]) == 3
        assert (folder / "config.json").is_file() and not (folder / "masks").exists()
        expert = states[1][name]
        assert difference(written, expert) < 0.9 * difference(states[0], expert)  # nearer than the base is


@pytest.mark.parametrize("method", METHODS)
def test_a_mask_takes_less_than_a_bit_and_a_header(method: str, pool: tuple[Path, dict[str, Path]], tmp_path: Path):
    base, experts = pool
    plan = spolia.merge(experts, base=base, method=method, out=tmp_path / "out")
    weights = sum(t.numel() for t in read_tensors(base).values() if t.is_floating_point())
    for file in (plan / "masks").iterdir():
        assert file.stat().st_size <= weights / 8 + 1000  # names and shapes of three tensors


def test_the_plan_counts_the_masks(pool: tuple[Path, dict[str, Path]], tmp_path: Path):
    base, experts = pool
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"spolia: 1\npool: {{base: {base}, experts: [{experts['math']}, {experts['code']}]}}\nmethod: {{name: emr}}\n"
    )
    plan = spolia.plan(recipe)
    out = spolia.merge(experts, base=base, method="emr", out=tmp_path / "out")
    written = sum(f.stat().st_size for f in out.rglob("*.safetensors"))
    headers = 2000  # the plan counts tensors, not the header of the shards
    assert written - headers <= plan.bytes_out <= written
    assert {"masks/math.safetensors", "masks/code.safetensors"} <= set(plan.files)


def test_a_stopped_merge_goes_on_and_writes_whole_masks(
    pool: tuple[Path, dict[str, Path]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    base, experts = pool
    whole = spolia.merge(experts, base=base, method="emr", out=tmp_path / "whole")
    real = merging.make_masks

    def killed(merge: Any, method: Any, folder: Path, progress: Any) -> None:
        real(merge, method, folder, progress)
        for file in (folder / "masks").iterdir():
            file.write_bytes(file.read_bytes()[:100])  # half-written
        raise KeyboardInterrupt

    monkeypatch.setattr(merging, "make_masks", killed)
    with pytest.raises(KeyboardInterrupt):
        spolia.merge(experts, base=base, method="emr", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()
    monkeypatch.setattr(merging, "make_masks", real)
    out = spolia.merge(experts, base=base, method="emr", out=tmp_path / "out")
    for file in ("model.safetensors", "masks/math.safetensors", "masks/code.safetensors"):
        assert (out / file).read_bytes() == (whole / file).read_bytes()


def test_threads_do_not_change_a_bit(pool: tuple[Path, dict[str, Path]], tmp_path: Path):
    base, experts = pool
    outs = [spolia.merge(experts, base=base, method="emr", out=tmp_path / str(n), threads=n) for n in (1, 3)]
    for file in ("masks/math.safetensors", "masks/code.safetensors"):
        assert (outs[0] / file).read_bytes() == (outs[1] / file).read_bytes()


def test_tied_tensors_stay_tied():
    noise = torch.Generator().manual_seed(1)

    def state(origin: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        shared = torch.randn(6, 4, generator=noise) + (origin if origin is not None else 0)
        return {"wte.weight": shared, "lm_head.weight": shared}

    base = state()
    experts = [state(base["wte.weight"]) for _ in range(2)]
    merged = spolia.merge(experts, base=base, method="emr")
    for mask in spolia.masks(experts, base=base, method="emr").values():
        got = spolia.attach(merged, mask, base=base)
        assert got["wte.weight"].data_ptr() == got["lm_head.weight"].data_ptr()
        assert not torch.equal(got["wte.weight"], merged["wte.weight"])


def test_two_experts_of_one_name_are_refused(pool: tuple[Path, dict[str, Path]], tmp_path: Path):
    base, experts = pool
    twice = [experts["math"], experts["math"]]
    for call in (
        lambda: spolia.masks(twice, base=base, method="emr"),
        lambda: spolia.merge(twice, base=base, method="emr", out=tmp_path / "out"),
    ):
        with pytest.raises(SpoliaError, match="name of two experts"):
            call()
    spolia.merge(twice, base=base, method="ties", out=tmp_path / "fine")  # no masks, no matter


def test_masks_of_another_merge_and_names_without_masks_are_refused(pool: tuple[Path, dict[str, Path]], tmp_path: Path):
    base, experts = pool
    out = spolia.merge(experts, base=base, method="emr", out=tmp_path / "out")
    plain = spolia.merge(experts, base=base, method="average", out=tmp_path / "plain")
    with pytest.raises(SpoliaError, match="holds no masks"):
        spolia.attach(plain, "math", base=base)
    with pytest.raises(SpoliaError, match="in memory holds no masks"):
        spolia.attach(read_tensors(out), "math", base=base)
    mask = next(iter(spolia.masks([{"norm": torch.ones(9)}], base={"norm": torch.zeros(9)}, method="emr").values()))
    with pytest.raises(SpoliaError, match=r"`?norm`?.*\[9\] in the mask"):
        spolia.attach(out, mask, base=base)


def test_the_folder_is_whole_for_other_readers(pool: tuple[Path, dict[str, Path]], tmp_path: Path):
    """The masks lie beside the weights and are taken for none of them."""
    base, experts = pool
    out = spolia.merge(experts, base=base, method="tall_masks", out=tmp_path / "out")
    assert read_tensors(out).keys() == read_tensors(base).keys() == load_file(out / "model.safetensors").keys()
