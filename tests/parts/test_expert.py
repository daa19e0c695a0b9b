"""Weights and pools: known without reading, read exactly, and refused when they change under the reader."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from spolia.core import stream as streams
from spolia.core.checkpoint import BY_TORCH_NAME
from spolia.errors import SpoliaError
from spolia.parts.expert import ExpertPool, FileWeights, MemoryWeights

Write = Callable[..., Path]
NUMBERS = {
    "w": torch.arange(12.0).reshape(3, 4),
    "b": torch.tensor(2.5),
    "ids": torch.arange(3),
    "none": torch.ones(0, 4),
}


def read(weights: FileWeights | MemoryWeights, name: str, start: int, stop: int) -> torch.Tensor:
    out = torch.empty(stop - start)
    weights.plane(name, "m").read(start, stop, out)
    return out


@pytest.mark.parametrize("shards", [1, 3])
def test_files_and_memory_describe_and_give_the_same(shards: int, tmp_path: Path, write_model: Write) -> None:
    memory = MemoryWeights(NUMBERS)
    files = FileWeights.open(write_model(tmp_path / "m", NUMBERS, {"model_type": "x"}, shards=shards))
    told = {n: (e.dtype, e.shape, e.numel, e.nbytes) for n, e in memory.entries.items()}
    assert told == {n: (e.dtype, e.shape, e.numel, e.nbytes) for n, e in files.entries.items()}
    assert files.nbytes == memory.nbytes == sum(t.nbytes for t in NUMBERS.values())
    assert files.config == {"model_type": "x"} and memory.config is None
    with files.opened(), memory.opened():
        for name in ("w", "b", "ids"):
            n = NUMBERS[name].numel()
            for start, stop in ((0, n), (0, 1), (n - 1, n)):
                expected = NUMBERS[name].reshape(-1)[start:stop].float()
                assert torch.equal(read(files, name, start, stop), expected)
                assert torch.equal(read(memory, name, start, stop), expected)


@pytest.mark.parametrize("name", sorted(BY_TORCH_NAME))
def test_every_type_is_widened_exactly(name: str, tmp_path: Path, write_model: Write) -> None:
    tensor = torch.tensor([0.0, 1.0, 2.0, 3.0]).to(getattr(torch, name))
    with (files := FileWeights.open(write_model(tmp_path / "m", {"w": tensor}))).opened():
        assert torch.equal(read(files, "w", 1, 4), tensor.float()[1:])
    assert torch.equal(read(MemoryWeights({"w": tensor}), "w", 1, 4), tensor.float()[1:])


def test_memory_takes_any_layout_and_changes_nothing() -> None:
    grown = torch.nn.Parameter(torch.arange(12.0).reshape(3, 4).t())
    strided = torch.arange(20.0)[::2]
    weights = MemoryWeights({"t": grown, "s": strided, "e": torch.ones(1).expand(5)})
    assert torch.equal(read(weights, "t", 0, 12), grown.detach().reshape(-1))
    assert torch.equal(read(weights, "s", 3, 9), strided[3:9])
    assert torch.equal(read(weights, "e", 0, 5), torch.ones(5))
    assert grown.requires_grad and grown.shape == (4, 3)


def test_tied_tensors_share_a_storage_and_nothing_else_does() -> None:
    shared = torch.ones(4, 4)
    weights = MemoryWeights(
        {
            "a": shared,
            "b": shared,
            "half": shared[:2],
            "t": shared.t(),
            "z": torch.ones(0),
            "zz": torch.ones(0),
            "c": shared + 0,
        }
    )
    places = {n: e.storage for n, e in weights.entries.items()}
    assert places["a"] == places["b"]
    others = [places[n] for n in ("half", "t", "c")]
    assert places["a"] not in others and None not in others and len(set(others)) == 3
    assert places["z"] is None  # empty tensors share an address by chance


@pytest.mark.parametrize(
    ("given", "word"),
    [
        ({"w": 3}, "int"), ({"w": np.ones(3)}, "ndarray"), ({"w": None}, "NoneType"), ({"w": {"v": 1}}, "dict"),
        ({"w": torch.ones(2) * 1j}, "complex64"), ({"w": torch.ones(3, 3).to_sparse()}, "w"),
        ({"w": torch.ones(3, device="meta")}, "w"), (7, "int"), (None, "NoneType"), ("/nowhere", "/nowhere"),
    ],
)  # fmt: skip
def test_what_is_no_model_is_refused_by_name(given: object, word: str) -> None:
    with pytest.raises(SpoliaError, match=word) as caught:
        ExpertPool.of({"math": given, "code": {"w": torch.ones(1)}})
    assert all(problem.mend for problem in caught.value.problems)


def test_every_bad_member_is_told_at_once(tmp_path: Path) -> None:
    with pytest.raises(SpoliaError) as caught:
        ExpertPool.of([tmp_path / "one", 7, {"w": 1}], base=tmp_path / "none")
    assert len(caught.value.problems) == 4


def test_pools_name_and_order_their_models(tmp_path: Path, write_model: Write) -> None:
    folder = write_model(tmp_path / "math", NUMBERS)
    pool = ExpertPool.of([folder, torch.nn.Linear(2, 2), {"w": torch.ones(1)}], base=folder)
    assert [m.name for m in pool.models] == ["math", "math", "expert 1", "expert 2"]
    assert pool.base is pool.models[0] and set(pool.experts[1].weights.entries) == {"weight", "bias"}
    named = ExpertPool.of({"x": {"w": torch.ones(1)}, "y": folder})
    assert [m.name for m in named.models] == ["x", "y"] and named.base is None


def change(file: Path, how: str) -> None:
    if how == "appended":
        with file.open("ab") as stream:
            stream.write(b"\0")
    elif how == "cut":
        os.truncate(file, file.stat().st_size - 4)
    elif how == "rewritten":
        file.write_bytes(file.read_bytes())
        os.utime(file, ns=(0, 0))
    elif how == "replaced":
        shutil.copy(file, file.with_name("new"))
        os.utime(file.with_name("new"), ns=(0, 0))
        file.with_name("new").replace(file)
    else:
        file.unlink()


@pytest.mark.parametrize("how", ["appended", "cut", "rewritten", "replaced", "deleted"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_file_that_changes_is_refused(how: str, when: str, tmp_path: Path, write_model: Write) -> None:
    folder = write_model(tmp_path / "m", NUMBERS)
    weights = FileWeights.open(folder)
    if when == "before":
        change(folder / "model.safetensors", how)
    with pytest.raises(SpoliaError, match=r"model\.safetensors") as caught, weights.opened():
        assert when == "during", "opening must notice"
        change(folder / "model.safetensors", how)
    assert all(problem.mend for problem in caught.value.problems)
    assert not weights._fds


def test_reading_past_a_cut_is_refused(tmp_path: Path, write_model: Write) -> None:
    folder = write_model(tmp_path / "m", {"w": torch.ones(1000)})
    weights = FileWeights.open(folder)
    with pytest.raises(SpoliaError, match=r"model\.safetensors.*`w`|`w`"), weights.opened():
        os.truncate(folder / "model.safetensors", 2000)
        read(weights, "w", 0, 1000)


def test_files_are_closed_afterwards(tmp_path: Path, write_model: Write) -> None:
    weights = FileWeights.open(write_model(tmp_path / "m", NUMBERS, shards=2))
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(3):
        with weights.opened():
            read(weights, "w", 0, 12)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_blocks_cover_the_span_once_whatever_the_rows() -> None:
    for shape, rows in (
        ((5, 70_001), True),
        ((5, 70_001), False),
        ((3, 200_000), True),
        ((), False),
        ((300_000,), True),
    ):
        tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        plane = streams.TensorPlane("m", BY_TORCH_NAME["float32"], tensor.reshape(-1))
        stack = streams.Stack("w", shape, plane, [plane, plane], span=(0, tensor.numel()))
        at = 0
        for block in stack.blocks(whole_rows=rows):
            assert block.start == at and block.base is not None and block.experts.shape == (2, block.stop - at)
            assert torch.equal(block.base, tensor.reshape(-1)[at : block.stop])
            assert torch.equal(block.experts[1], block.base) and not block.deltas().any()
            assert not rows or (block.stop - at) % stack.row == 0
            at = block.stop
        assert at == tensor.numel()
