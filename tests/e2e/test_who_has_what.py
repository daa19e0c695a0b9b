"""What this package promises beside its peers, one short proof for each line; the thorough tests stand in the other files."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.core.stream import BLOCK, FilePlane
from spolia.errors import SpoliaError
from spolia.runs.verbs import merge_recipe

Write = Callable[..., Path]
State = dict[str, torch.Tensor]


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def state(seed: int, layers: int = 4) -> State:
    """A model of some layers, as decoders name their tensors."""
    made = {"model.embed_tokens.weight": rand(6, 4, seed=seed)}
    for i in range(layers):
        made[f"model.layers.{i}.mlp.up_proj.weight"] = rand(8, 4, seed=100 * seed + 2 * i)
        made[f"model.layers.{i}.self_attn.q_proj.weight"] = rand(4, 4, seed=100 * seed + 2 * i + 1)
    return made | {"lm_head.weight": rand(6, 4, seed=seed + 50)}


@pytest.fixture
def models(tmp_path: Path, write_model: Write) -> dict[str, Path]:
    """base, A and B with four layers each, six tokens, and a tokenizer of their own."""
    found = {}
    for seed, name in enumerate(("base", "A", "B")):
        config = {"model_type": "llama", "num_hidden_layers": 4, "vocab_size": 6, "tie_word_embeddings": False}
        found[name] = write_model(tmp_path / name, state(seed), config)
        words = ["a", "b", "c", "d", "e", name]
        vocabulary = {"type": "BPE", "vocab": {word: i for i, word in enumerate(words)}, "merges": []}
        (found[name] / "tokenizer.json").write_text(json.dumps({"model": vocabulary, "added_tokens": []}))
    return found


def by_recipe(text: str, folder: Path, **options: Any) -> Any:
    file = folder / "recipe.yml"
    file.write_text(text)
    return merge_recipe(file, folder / "out", **options)


def digest(folder: Path) -> dict[str, str]:
    files = (file for file in sorted(folder.rglob("*")) if file.is_file())
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_streaming_and_shards_with_parallel_reading_merging_and_writing(
    tmp_path: Path, write_model: Write, monkeypatch: pytest.MonkeyPatch
):
    """Two workers are inside a read at one time, and two inside a write; no read is longer than two blocks."""
    states = [{f"layers.{i}.w": rand(900, 300, seed=10 * m + i) for i in range(4)} for m in range(3)]
    folders = [write_model(tmp_path / f"m{m}", tensors, shards=2) for m, tensors in enumerate(states)]
    lengths, met, lock = list[int](), {"read": set[int](), "write": set[int]()}, threading.Lock()
    meeting = {"read": threading.Barrier(2), "write": threading.Barrier(2)}

    def meet(place: str) -> None:
        """The first two workers that come here wait for each other; one alone would wait in vain."""
        with lock:
            first = len(met[place]) < 2 and threading.get_ident() not in met[place]
            if first:
                met[place].add(threading.get_ident())
        if first:
            meeting[place].wait(timeout=60)

    read, pwrite = FilePlane.read, os.pwrite

    def watched(self: FilePlane, start: int, stop: int, out: torch.Tensor) -> None:
        lengths.append(stop - start)
        meet("read")
        read(self, start, stop, out)

    def written(fd: int, data: Any, at: int) -> int:
        if threading.current_thread() is not threading.main_thread():
            meet("write")
        return pwrite(fd, data, at)

    monkeypatch.setattr(FilePlane, "read", watched)
    monkeypatch.setattr(os, "pwrite", written)
    out = spolia.merge(
        folders[1:], base=folders[0], method="ties", out=tmp_path / "out", threads=2, max_shard_size=10**6
    )
    assert len(met["read"]) == len(met["write"]) == 2
    assert max(lengths) <= 2 * BLOCK < 900 * 300
    assert len(list(out.glob("model-*.safetensors"))) == 4 and (out / "model.safetensors.index.json").is_file()
    monkeypatch.undo()
    wanted = spolia.merge(states[1:], base=states[0], method="ties", threads=1)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in read_tensors(out).items())


def test_a_recipe_by_layer_filter_and_slices(models: dict[str, Path], tmp_path: Path):
    text = (
        "merge_method: linear\ndtype: float32\nslices:\n"
        "  - sources:\n    - {model: A, layer_range: [0, 3], parameters: {weight: [1, 0]}}\n"
        "    - {model: B, layer_range: [0, 3], parameters: {weight: [{filter: mlp, value: 1}, {value: [0, 1]}]}}\n"
        "  - sources:\n    - {model: B, layer_range: [1, 2], parameters: {weight: 1}}\n"
    )
    merged = read_tensors(by_recipe(text, tmp_path))
    a, b = read_tensors(models["A"]), read_tensors(models["B"])
    for i, share in enumerate((1.0, 0.5, 0.0)):  # the gradient of A over three layers; B's is its complement but in mlp
        name = f"model.layers.{i}.self_attn.q_proj.weight"
        torch.testing.assert_close(merged[name], share * a[name] + (1 - share) * b[name], rtol=1e-6, atol=1e-6)
        name = f"model.layers.{i}.mlp.up_proj.weight"
        torch.testing.assert_close(merged[name], (share * a[name] + b[name]) / (share + 1), rtol=1e-6, atol=1e-6)
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(merged[name.format(3)], b[name.format(1)])  # stacked on top
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 4


def test_tokenizers_are_merged(models: dict[str, Path], tmp_path: Path):
    text = "merge_method: linear\nmodels: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 1}}]\n"
    out = by_recipe(text + "base_model: base\ntokenizer: {source: union}\n", tmp_path)
    table = json.loads((out / "tokenizer.json").read_text())["model"]["vocab"]
    assert list(table) == ["a", "b", "c", "d", "e", "base", "A", "B"]
    embedding, name = read_tensors(out)["model.embed_tokens.weight"], "model.embed_tokens.weight"
    a, b = read_tensors(models["A"])[name], read_tensors(models["B"])[name]
    torch.testing.assert_close(embedding[:5], (a[:5] + b[:5]) / 2, rtol=1e-6, atol=1e-6)  # one fp32 sum
    assert torch.allclose(embedding[6], a[5]) and torch.allclose(
        embedding[7], b[5]
    )  # each lends the token it alone has


@pytest.mark.parametrize("method", ["tsv", "iso_c", "knots"])
def test_svd_methods_hold_one_matrix_at_a_time(method: str, tmp_path: Path, write_model: Write):
    """Six matrices more in each model add to the planned memory less than one of them; streamed is as in memory."""
    peaks = []
    for count in (2, 8):
        states = [{f"layers.{i}.w": rand(300, 200, seed=100 * m + i) for i in range(count)} for m in range(3)]
        folders = [write_model(tmp_path / f"{count}-{m}", tensors) for m, tensors in enumerate(states)]
        pool = {"base": str(folders[0]), "experts": [str(folder) for folder in folders[1:]]}
        file = tmp_path / f"{count}.yaml"
        file.write_text(json.dumps({"spolia": 1, "pool": pool, "method": {"name": method}}))
        peaks.append(spolia.plan(file).peak_memory_bytes)
        merged = read_tensors(merge_recipe(file, tmp_path / f"out-{count}"))  # type: ignore[arg-type]
        wanted = spolia.merge(states[1:], base=states[0], method=method)
        assert all(torch.equal(merged[name], wanted[name]) for name in wanted)
    assert peaks[1] - peaks[0] < 300 * 200 * 4


def test_any_module_and_any_state_dict():
    """A class of one's own, with shared weights and an integer buffer; modules and state dicts give one result."""

    class Own(torch.nn.Module):
        def __init__(self, seed: int):
            super().__init__()
            self.first, self.second = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
            self.second.weight = self.first.weight  # tied
            self.register_buffer("count", torch.tensor(7))
            with torch.no_grad():
                for k, parameter in enumerate(self.parameters()):
                    parameter.copy_(rand(*parameter.shape, seed=10 * seed + k))

    base, one, two = Own(0), Own(1), Own(2)
    before = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    merged = spolia.merge(
        {"one": one, "two": two.state_dict()}, base=base, method="task_arithmetic", settings={"scale": 0.5}
    )
    for name in ("first.weight", "first.bias", "second.bias"):
        wanted = (one.state_dict()[name] + two.state_dict()[name]) / 2
        torch.testing.assert_close(merged[name], wanted, rtol=1e-5, atol=1e-6)  # fp32 sums
    assert merged["first.weight"].data_ptr() == merged["second.weight"].data_ptr() and int(merged["count"]) == 7
    base.load_state_dict(merged)
    assert all(torch.equal(tensor, before[name]) for name, tensor in one.state_dict().items())


@pytest.mark.parametrize("method", ["task_arithmetic", "knots"])
def test_adapters_are_merged_by_their_factors_exactly(method: str, tmp_path: Path, write_adapter: Write):
    folders, dense = [], []
    for k, r in enumerate((2, 3)):
        b, a = rand(9, r, seed=k), rand(r, 7, seed=k + 5)
        folders.append(
            write_adapter(tmp_path / str(k), {"q.lora_A.weight": a, "q.lora_B.weight": b}, r=r, lora_alpha=2 * r)
        )
        dense.append({"q.weight": 2 * b.double() @ a.double()})
    more: dict[str, Any] = {"settings": {"density": 0.5, "scale": 1.0}} if method == "knots" else {}
    out = spolia.merge_adapters(folders, method=method, out=tmp_path / "m", **more)
    factors = load_file(out / "adapter_model.safetensors")
    left, right = (factors[f"base_model.model.q.lora_{part}.weight"].double() for part in "BA")
    assert left.shape == (9, 5) and right.shape == (5, 7)
    base = {"q.weight": torch.zeros(9, 7, dtype=torch.float64)}
    wanted = spolia.merge(dense, base=base, method=method, settings=more.get("settings", {"scale": 1.0}))["q.weight"]
    torch.testing.assert_close(left @ right, wanted, rtol=0, atol=1e-5)  # factors stored in fp32, values of some tens


def test_errors_come_before_any_work_and_a_plan_tells_the_cost(
    models: dict[str, Path], tmp_path: Path, write_model: Write, monkeypatch: pytest.MonkeyPatch
):
    def no_read(*_: Any) -> None:
        raise AssertionError("a tensor was read")

    monkeypatch.setattr(FilePlane, "read", no_read)
    odd = write_model(tmp_path / "odd", state(7, layers=3) | {"lm_head.weight": rand(5, 4)}, {"model_type": "llama"})
    with pytest.raises(SpoliaError) as caught:
        spolia.merge([models["A"], odd], base=models["base"], method="ties", out=tmp_path / "out")
    assert "lm_head.weight" in str(caught.value) and "layers.3" in str(caught.value)  # all of it at once
    with pytest.raises(SpoliaError, match="did you mean `ties`"):
        spolia.merge([models["A"]], base=models["base"], method="tie", out=tmp_path / "out")
    text = "merge_method: ties\nbase_model: base\nmodels: [{model: A, parameters: {weight: 1, density: 0.5}}]\n"
    plan = by_recipe(text, tmp_path, dry_run=True)
    assert (
        plan.bytes_in > 0 and plan.bytes_out > 0 and plan.peak_memory_bytes > 0 and plan.seconds > 0 and plan.time_basis
    )
    with pytest.raises(SpoliaError, match=r"recipe\.yml:3.*densitty(?s:.*)`density`"):
        by_recipe(text.replace("density", "densitty"), tmp_path)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_neither_hash_seed_nor_threads_change_a_byte(models: dict[str, Path], tmp_path: Path):
    """No base, so something must lend config and tokenizer; a random method; equal folders to the byte."""
    code = (
        "import sys, spolia\nout, threads, *models = sys.argv[1:]\n"
        "spolia.merge(models[1:], base=models[0], method='dare', out=out + '/dare', threads=int(threads))\n"
        "spolia.merge(models[1:], out=out + '/average', threads=int(threads), max_shard_size=500)\n"
    )
    found = []
    for hashes, threads in (("0", "1"), ("77", "3")):
        words = [sys.executable, "-c", code, str(tmp_path / hashes), threads, *map(str, models.values())]
        subprocess.run(words, env=os.environ | {"PYTHONHASHSEED": hashes}, check=True, capture_output=True)
        found.append(digest(tmp_path / hashes))
    assert found[0] == found[1] and len(found[0]) > 10


def test_an_evaluation_is_called_and_its_numbers_kept(models: dict[str, Path], tmp_path: Path):
    calls = []

    def judge(folder: Path) -> dict[str, Any]:
        calls.append((folder, sorted(read_tensors(folder))))
        return {"sums": 61.25, "stories": torch.tensor(33.5)}

    experts = [models["A"], models["B"]]
    out = spolia.merge(experts, base=models["base"], method="ties", out=tmp_path / "out", evaluate=judge)
    assert calls == [(out, sorted(state(0)))]
    rows = json.loads((out / "results.json").read_text())["rows"]
    assert [(row["method"], row["task"], row["mean"]) for row in rows] == [
        ("ties", "sums", 61.25),
        ("ties", "stories", 33.5),
    ]
    card = (out / "README.md").read_text()
    assert "61.25" in card and "value: 33.5" in card and "judge" in card and "has not been measured" not in card
    plain = spolia.merge(experts, base=models["base"], method="ties", out=tmp_path / "plain")
    assert digest(plain)["spolia.json"] == digest(out)["spolia.json"]  # how it was made is the same
    assert not (plain / "results.json").exists()


@pytest.mark.parametrize(
    ("returned", "word"),
    [(None, "NoneType"), ({}, "empty"), ({"sums": "good"}, "no finite number"), ({"x": float("nan")}, "x")],
)
def test_an_evaluation_that_returns_no_numbers_is_told(
    returned: Any, word: str, models: dict[str, Path], tmp_path: Path
):
    with pytest.raises(SpoliaError, match=word):
        spolia.merge([models["A"]], out=tmp_path / "out", evaluate=lambda folder: returned)
    assert read_tensors(tmp_path / "out").keys() == state(0).keys()  # the merge stands
    assert not (tmp_path / "out" / "results.json").exists()


@pytest.mark.parametrize(
    "given", [{"evaluate": len}, {"evaluate": 3, "out": "out"}, {"evaluate": len, "out": "o", "share": True}]
)
def test_an_evaluation_that_cannot_be_kept_is_refused_first(
    given: dict[str, Any], models: dict[str, Path], tmp_path: Path
):
    if "out" in given:
        given = {**given, "out": tmp_path / given["out"]}
    with pytest.raises(SpoliaError, match="evaluate"):
        spolia.merge([models["A"]], **given)
    assert not (tmp_path / "out").exists() and not (tmp_path / "o").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_summed_in_fp32_and_rounded_once(dtype: torch.dtype):
    """Thirty-three experts: sums kept in the stored type would lose digits at every one."""
    experts = [rand(64, 64, seed=k).to(dtype) for k in range(33)]
    merged = spolia.merge([{"w": e} for e in experts])["w"]
    exact = torch.stack([e.double() for e in experts]).mean(0)
    step = torch.finfo(dtype).eps * exact.abs() / 2  # half a unit in the last place, at most
    assert merged.dtype == dtype and bool(((merged.double() - exact).abs() <= step + 1e-6).all())
    total = experts[0].clone()
    for e in experts[1:]:
        total += e
    assert float((total / 33 - merged).abs().max()) > 0  # that is what is avoided


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no MPS device here")
def test_models_on_mps_are_merged_as_on_the_cpu():
    states = [{"w": rand(20, 30, seed=k), "count": torch.tensor(k)} for k in range(3)]
    moved = [{name: tensor.to("mps") for name, tensor in one.items()} for one in states]
    for method in ("ties", "knots"):
        wanted = spolia.merge(states[1:], base=states[0], method=method)
        got = spolia.merge(moved[1:], base=moved[0], method=method)
        assert all(torch.equal(got[name].cpu(), wanted[name]) for name in wanted)
