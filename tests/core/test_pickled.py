"""Pickled state dicts: taken as they are, unwrapped, mapped; never run, and refused by name when torn or odd."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import spolia
from spolia.core import pickled
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.parts.expert import FileWeights, PickledWeights
from spolia.parts.inputs import Inputs

STATE = {"w": torch.arange(12.0).reshape(3, 4), "b": torch.ones(4, dtype=torch.bfloat16), "n": torch.tensor(3)}


def save(path: Path, value: object = STATE, old: bool = False) -> Path:
    torch.save(value, path, _use_new_zipfile_serialization=not old)
    return path


def refused(path: Path, *words: str) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(SpoliaError) as caught:
            pickled.read_state_dict(path)
    text = str(caught.value)
    assert all(word in text for word in words), text
    assert all(problem.mend for problem in caught.value.problems)
    return text


def same(found: dict, wanted: dict = STATE) -> bool:
    return list(found) == list(wanted) and all(torch.equal(found[n], wanted[n]) for n in wanted)


class Evil:
    """What a hostile pickle does when it is loaded without care."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("suffix", pickled.SUFFIXES)
@pytest.mark.parametrize(
    "wrap",
    [
        lambda s: s,
        lambda s: OrderedDict(s),
        lambda s: {"state_dict": s, "epoch": 3, "args": {"lr": 0.1}},
        lambda s: {"model": s, "step": 1},
        lambda s: {name: torch.nn.Parameter(t) if t.is_floating_point() else t for name, t in s.items()},
    ],
)
def test_state_dicts_are_read(suffix: str, wrap, tmp_path: Path) -> None:
    found, files = pickled.read_state_dict(save(tmp_path / f"x{suffix}", wrap(STATE)))
    assert same(found) and list(files) == [tmp_path / f"x{suffix}"]


def test_modules_buffers_and_ties_survive(tmp_path: Path) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 3))
    net[2].weight = net[0].weight
    weights = PickledWeights(save(tmp_path / "net.pt", net.state_dict()))
    assert set(weights.entries) == set(net.state_dict())
    assert weights.entries["0.weight"].storage == weights.entries["2.weight"].storage
    assert not weights.entries["1.num_batches_tracked"].dtype.floating


def test_folders_and_their_order(tmp_path: Path) -> None:
    """safetensors first, then pytorch_model.bin, then its shards, then the only other file."""
    for leftover in ("training_args.bin", "optimizer.pt", "rng_state_0.pth", "scheduler.pt"):
        (tmp_path / leftover).write_bytes(b"never opened")
    save(tmp_path / "last.ckpt")
    assert same(pickled.read_state_dict(tmp_path)[0])
    save(tmp_path / "other.pt", {"x": torch.ones(1)})
    refused(tmp_path, "last.ckpt", "other.pt", "several")
    save(tmp_path / "pytorch_model.bin", {"y": torch.ones(1)})
    assert list(pickled.read_state_dict(tmp_path)[0]) == ["y"]
    assert list(Inputs().open(tmp_path).entries) == ["y"]
    from safetensors.torch import save_file

    save_file({"other": torch.ones(1)}, tmp_path / "consolidated.safetensors")
    assert list(Inputs().open(tmp_path).entries) == ["y"]
    save_file({"z": torch.ones(1)}, tmp_path / "model.safetensors")
    assert isinstance(opened := Inputs().open(tmp_path), FileWeights) and list(opened.entries) == ["z"]


def shards(folder: Path, weight_map: dict[str, str] | None = None) -> None:
    save(folder / "pytorch_model-00001-of-00002.bin", {"w": STATE["w"]})
    save(folder / "pytorch_model-00002-of-00002.bin", {"b": STATE["b"], "n": STATE["n"]})
    places = weight_map or {
        "w": "pytorch_model-00001-of-00002.bin",
        **dict.fromkeys("bn", "pytorch_model-00002-of-00002.bin"),
    }
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": places}))


def test_shards(tmp_path: Path) -> None:
    shards(tmp_path)
    found, files = pickled.read_state_dict(tmp_path)
    assert same(found) and len(files) == 2
    (tmp_path / "pytorch_model.bin.index.json").unlink()  # then all shards belong together
    assert same(pickled.read_state_dict(tmp_path)[0])
    save(tmp_path / "pytorch_model-extra.bin", {"w": STATE["w"]})
    refused(tmp_path, "`w`", "pytorch_model-00001-of-00002.bin")


@pytest.mark.parametrize(
    ("places", "word"),
    [
        ({"w": "gone.bin"}, "gone.bin is missing"),
        ({"w": "../x.bin"}, "outside"),
        ({"q": "pytorch_model-00001-of-00002.bin"}, "`q`"),
    ],
)
def test_bad_indexes_are_refused(places: dict, word: str, tmp_path: Path) -> None:
    shards(tmp_path, places)
    assert word in refused(tmp_path).replace("'", "")


@pytest.mark.parametrize("old", [False, True])
@pytest.mark.parametrize("place", ["value", "top", "nested"])
def test_code_is_never_run(old: bool, place: str, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    evil = Evil(marker)
    value = {"value": {"w": torch.ones(2), "e": evil}, "top": evil, "nested": {"state_dict": {"w": evil}}}[place]
    assert "system" in refused(save(tmp_path / "model.bin", value, old), "any code")
    assert not marker.exists()
    torch.load(tmp_path / "model.bin", weights_only=False)
    assert marker.exists(), "the file would have run it"


def test_a_bare_pickle_is_not_run_either(tmp_path: Path) -> None:
    (tmp_path / "m.pt").write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    refused(tmp_path / "m.pt", "m.pt")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.nn.Linear(2, 2), ["Linear"]),
        ({"w": torch.ones(2), "x": 3}, ["`x`", "int"]),
        ({"w": torch.ones(2), "_extra_state": None}, ["_extra_state", "NoneType"]),
        ({3: torch.ones(2)}, ["`3`"]),
        ([torch.ones(2)], ["list"]),
        (torch.ones(2), ["Tensor"]),
        ({}, ["no tensors"]),
        ({"state_dict": {}}, ["no tensors"]),
        ({"w": torch.ones(3, 3).to_sparse()}, ["`w`", "sparse"]),
        ({"w": torch.ones(1).expand(10**9)}, ["`w`", "1000000000 numbers"]),
    ],
)
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_state_dict_is_refused(value: object, words: list[str], tmp_path: Path) -> None:
    refused(save(tmp_path / "m.bin", value), "m.bin", *words)


@pytest.mark.filterwarnings("ignore")
def test_programs_and_other_archives_are_refused(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / "j.pt")
    refused(tmp_path / "j.pt", "TorchScript")
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\0" * 10**6)
    refused(tmp_path / "z.pt", "compressed", "data.pkl")
    with zipfile.ZipFile(tmp_path / "e.pt", "w") as archive:
        archive.writestr("x", b"")
    refused(tmp_path / "e.pt", "e.pt")


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_torn_files_are_refused_or_whole(data: st.DataObject, tmp_path: Path) -> None:
    """A cut anywhere is refused by name; a flipped byte is refused, or changes values and nothing else."""
    old = data.draw(st.booleans())
    raw = bytearray(save(tmp_path / "whole.bin", STATE, old).read_bytes())
    file = tmp_path / "torn.bin"
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        file.write_bytes(raw[:at])
        refused(file, "torn.bin")
        return
    raw[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(raw)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            found, _ = pickled.read_state_dict(file)
        except SpoliaError as error:
            assert "torn.bin" in str(error) and all(problem.mend for problem in error.problems)
        else:
            assert all(isinstance(tensor, torch.Tensor) for tensor in found.values())


def test_the_old_form_is_read_and_told(tmp_path: Path) -> None:
    with pytest.warns(SpoliaWarning, match=r"old\.bin.*read into memory"):
        assert same(pickled.read_state_dict(save(tmp_path / "old.bin", STATE, old=True))[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pickled.read_state_dict(save(tmp_path / "new.bin"))


def test_a_file_that_changes_is_refused(tmp_path: Path) -> None:
    weights = PickledWeights(save(tmp_path / "m.bin"))
    with weights.opened():
        out = torch.empty(12)
        weights.plane("w", "m").read(0, 12, out)
        assert torch.equal(out, STATE["w"].reshape(-1))
    with pytest.raises(SpoliaError, match="changed"), weights.opened():
        save(tmp_path / "m.bin", {"w": torch.ones(1)})
        weights.plane("w", "m")


def test_merged_like_safetensors(tmp_path: Path, write_model) -> None:
    """The same bits from either form, in memory and into a folder."""
    experts = [{"w": STATE["w"] + k, "b": STATE["b"] * k, "n": STATE["n"]} for k in (1, 2)]
    bins = [tmp_path / f"{k}.bin" for k in (1, 2)]
    for path, tensors in zip(bins, experts, strict=True):
        save(path, tensors)
    folders = [write_model(tmp_path / str(k), tensors) for k, tensors in enumerate(experts)]
    one, two = spolia.merge(bins), spolia.merge(folders)
    assert same(one, {name: two[name] for name in one})
    for sources, out in ((bins, "a"), (folders, "b")):
        spolia.merge(sources, out=tmp_path / out)
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    fingerprints = json.loads((tmp_path / "a/spolia.json").read_text())["models"]
    assert [m["files"][0]["file"] for m in fingerprints] == ["1.bin", "2.bin"]


def test_planning_safetensors_imports_no_torch(tmp_path: Path, write_model) -> None:
    folder = write_model(tmp_path / "m", {"w": torch.ones(2)})
    code = (
        "import sys; from spolia.parts.inputs import Inputs; "
        f"Inputs().open({str(folder)!r}); sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.slow
def test_mapped_files_are_not_read(tmp_path: Path, fork: Callable[..., Any]) -> None:
    """Opening 400 MB costs a fraction of it: the tensors are mapped."""
    save(tmp_path / "big.bin", {f"w{i}": torch.zeros(25_000_000) for i in range(4)})
    code = (
        "import resource, torch; torch.ones(1); before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "from pathlib import Path; from spolia.parts.expert import PickledWeights\n"
        f"w = PickledWeights(Path({str(tmp_path / 'big.bin')!r}))\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    grown = int(fork(code).communicate()[0])
    assert grown < 100_000  # KiB; of 400 000
