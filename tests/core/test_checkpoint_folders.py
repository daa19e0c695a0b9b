"""Model folders: an index that lies, shards that lack or clash, and what is no model, are refused with a cure."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from spolia.core.checkpoint import Checkpoint, read_tensors
from spolia.errors import SpoliaError

F4 = b"\0" * 4


def entry(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


def packed(header: dict[str, Any], body: bytes) -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


GOOD = packed({"a": entry([1], 0, 4)}, F4)


def refused(path: Path, *words: str) -> str:
    with pytest.raises(SpoliaError) as caught:
        read_tensors(path)
    for problem in caught.value.problems:
        assert problem.where and problem.what and problem.mend, problem
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def two_shards(folder: Path) -> dict[str, str]:
    """A sharded model of tensors a and b; its index map."""
    folder.mkdir(exist_ok=True)
    for shard, name in (("one", "a"), ("two", "b")):
        (folder / f"{shard}.safetensors").write_bytes(packed({name: entry([1], 0, 4)}, F4))
    return {"a": "one.safetensors", "b": "two.safetensors"}


LONG = "x" * 300 + ".safetensors"
INDEX = "model.safetensors.index.json"
INDEXES = {
    "points above": ({"a": "../one.safetensors"}, "outside"),
    "points to the root": ({"a": "/etc/passwd"}, "outside"),
    "points to the folder": ({"a": ".."}, "outside"),
    "points nowhere": ({"a": ""}, "outside"),
    "points into a folder": ({"a": "sub/one.safetensors"}, "outside"),
    "name too long": ({"a": LONG}, INDEX),
    "name with a null": ({"a": "one\0.safetensors"}, INDEX),
    "name beyond Unicode": ({"a": "\ud800.safetensors"}, INDEX),
    "missing shard": ({"a": "one.safetensors", "b": "three.safetensors"}, "three.safetensors"),
    "tensor in the wrong shard": ({"a": "two.safetensors", "b": "one.safetensors"}, "`a`"),
    "absent tensor": ({"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}, "`c`"),
    "empty": ({}, "no tensors"),
    "a list": (["one.safetensors"], INDEX),
    "numbers": ({"a": 5}, INDEX),
    "null": (None, INDEX),
}


@pytest.mark.parametrize("case", INDEXES)
def test_a_bad_index_is_refused(case: str, tmp_path: Path) -> None:
    two_shards(tmp_path)
    weight_map, word = INDEXES[case]
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    refused(tmp_path, word).encode()  # the message can be printed


@pytest.mark.parametrize("text", ["", "[]", "7", "{}", '{"weight_map"', "[" * 100_000, "\udcff"])
def test_an_index_that_is_no_index_is_refused(text: str, tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / INDEX).write_bytes(text.encode(errors="surrogateescape"))
    refused(tmp_path, INDEX)


def test_many_absent_tensors_are_few_lines(tmp_path: Path) -> None:
    places = two_shards(tmp_path) | {f"layer.{i}": "one.safetensors" for i in range(500)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": places}))
    assert len(refused(tmp_path, "layer.0").splitlines()) < 20


def test_what_the_index_says_is_what_is_read(tmp_path: Path) -> None:
    places = two_shards(tmp_path)
    (tmp_path / "stray.safetensors").write_bytes(packed({"a": entry([2], 0, 8)}, F4 * 2))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": places["a"]} | {"b": "two.safetensors"}}))
    opened = Checkpoint.open(tmp_path)
    assert {n: i.file.name for n, i in opened.tensors.items()} == places
    (tmp_path / INDEX).unlink()
    refused(tmp_path, "`a`", "one.safetensors", "stray.safetensors")  # no index: two files claim a


def test_unlisted_tensors_are_left_out_and_told(tmp_path: Path) -> None:
    two_shards(tmp_path)
    (tmp_path / "one.safetensors").write_bytes(packed({"a": entry([1], 0, 4), "z": entry([1], 4, 8)}, F4 * 2))
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    opened = Checkpoint.open(tmp_path)
    assert list(opened.tensors) == ["a", "b"] and opened.unlisted == ["z"]


def test_all_damaged_shards_are_told_at_once(tmp_path: Path) -> None:
    two_shards(tmp_path)
    for shard in ("one", "two"):
        (tmp_path / f"{shard}.safetensors").write_bytes(b"short")
    refused(tmp_path, "one.safetensors", "two.safetensors")


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({}, "no *.safetensors"),
        ({"pytorch_model.bin": b"x"}, "pickle"),
        ({"adapter_config.json": b"{}", "adapter_model.safetensors": GOOD}, "LoRA"),
        ({"model.safetensors": GOOD, "config.json": b"{"}, "config.json"),
        ({"model.safetensors": GOOD, "config.json": b"[1]"}, "config.json"),
        ({"model.safetensors": GOOD, "config.json": b"[" * 100_000}, "config.json"),
        ({"model.safetensors": GOOD, "config.json": b"\xff\xfe\xff"}, "config.json"),
    ],
)
def test_folders_that_are_no_models_are_refused(files: dict[str, bytes], word: str, tmp_path: Path) -> None:
    for name, raw in files.items():
        (tmp_path / name).write_bytes(raw)
    refused(tmp_path, word)


def test_paths_that_are_no_models_are_refused(tmp_path: Path) -> None:
    (tmp_path / "model.bin").write_bytes(b"x")
    (tmp_path / "dir.safetensors").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "model.bin", tmp_path, tmp_path / ("n" * 300)):
        refused(path, str(path)[:40])
