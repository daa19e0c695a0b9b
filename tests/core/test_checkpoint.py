"""Checkpoints: a damaged or lying file is a SpoliaError with its name and a cure; a sound one is what safetensors says."""

from __future__ import annotations

import json
import struct
import tempfile
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save, save_file

from spolia.core import checkpoint as ckpt
from spolia.core.checkpoint import BY_TORCH_NAME, Checkpoint, natural, read_tensors, write_checkpoint
from spolia.errors import SpoliaError

pytestmark = pytest.mark.sampled(3)  # of many cases alike

DTYPES = [getattr(torch, name) for name in BY_TORCH_NAME]
F4 = b"\0" * 4


def entry(shape: Any, start: Any, stop: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


def packed(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    flat = [t.contiguous().reshape(-1).view(torch.uint8) if t.numel() else torch.empty(0) for t in (a, b)]
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(*flat)


def random_tensor(dtype: torch.dtype, shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Any bits at all, NaN payloads and odd zeros among them."""
    count = torch.Size(shape).numel() * dtype.itemsize
    top = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, top, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return (raw.view(dtype) if count else torch.empty(0, dtype=dtype)).reshape(shape)


GOOD = packed({"a": entry([2], 0, 8), "b": entry([1], 8, 12)}, b"12345678abcd")
BAD = {
    "empty file": b"",
    "seven bytes": b"1234567",
    "header longer than the file": packed({}, length=3),
    "header of 2^63 bytes": packed({"a": entry([1], 0, 4)}, F4, length=2**63),
    "header of 2^64 - 1 bytes": packed({"a": entry([1], 0, 4)}, F4, length=2**64 - 1),
    "header longer than the format allows": packed({"a": entry([1], 0, 4)}, F4, length=ckpt.MAX_HEADER + 1),
    "length one too small": packed({"a": entry([1], 0, 4)}, F4, length=len(json.dumps({"a": entry([1], 0, 4)})) - 1),
    "length zero": packed({"a": entry([1], 0, 4)}, F4, length=0),
    "no JSON": packed(b"{'a'}"),
    "not UTF-8": packed(b'{"\xff": 1}'),
    "a list": packed([1, 2]),
    "a number": packed(b"7"),
    "null": packed(b"null"),
    "deep lists": packed(b"[" * 100_000),
    "deep mappings": packed(b'{"a":' * 100_000),
    "number of 5000 digits": packed(b'{"a":' + b"9" * 5000 + b"}"),
    "name twice": packed(
        b'{"a":' + json.dumps(entry([1], 0, 4)).encode() + b',"a":' + json.dumps(entry([1], 0, 4)).encode() + b"}", F4
    ),
    "entry no mapping": packed({"a": 5}),
    "entry null": packed({"a": None}),
    "entry without shape": packed({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, F4),
    "entry without dtype": packed({"a": {"shape": [1], "data_offsets": [0, 4]}}, F4),
    "entry without offsets": packed({"a": {"shape": [1], "dtype": "F32"}}, F4),
    "unknown dtype": packed({"a": entry([1], 0, 4, "Q4_K")}, F4),
    "dtype a number": packed({"a": entry([1], 0, 4, 4)}, F4),
    "dtype a list": packed({"a": entry([1], 0, 4, ["F32"])}, F4),
    "wrong dtype size": packed({"a": entry([1], 0, 4, "F64")}, F4),
    "shape a number": packed({"a": entry(1, 0, 4)}, F4),
    "shape a text": packed({"a": entry("1", 0, 4)}, F4),
    "shape with true": packed({"a": entry([True], 0, 4)}, F4),
    "shape with float": packed({"a": entry([1.0], 0, 4)}, F4),
    "shape with minus": packed({"a": entry([-1, -1], 0, 4)}, F4),
    "shape of 2^63": packed({"a": entry([2**63], 0, 4)}, F4),
    "shape that overflows 64 bits": packed({"a": entry([2**62, 2**2 + 1], 0, 4)}, F4),
    "shape that wraps to its size": packed({"a": entry([2**62, 4], 0, 0)}),
    "empty shape beyond torch": packed({"a": entry([2**63, 0], 0, 0)}),
    "empty shape that overflows": packed({"a": entry([2**62, 2**62, 0], 0, 0)}),
    "a thousand dimensions": packed({"a": entry([1] * 1000, 0, 4)}, F4),
    "offsets three": packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4, 8]}}, F4),
    "offsets a mapping": packed({"a": {"dtype": "F32", "shape": [1], "data_offsets": {}}}, F4),
    "offsets floats": packed({"a": entry([1], 0.0, 4.0)}, F4),
    "offsets booleans": packed({"a": entry([0], False, False)}),
    "offsets backwards": packed({"a": entry([1], 4, 0)}, F4),
    "offsets negative": packed({"a": entry([1], -4, 0)}, F4),
    "offsets beyond the file": packed({"a": entry([2], 0, 8)}, F4),
    "offsets of 2^63": packed({"a": entry([1], 2**63, 2**63 + 4)}, F4),
    "overlap": packed({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, b"\0" * 12),
    "the same range twice": packed({"a": entry([1], 0, 4), "b": entry([1], 0, 4)}, F4),
    "gap": packed({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, b"\0" * 12),
    "gap at the start": packed({"a": entry([1], 4, 8)}, b"\0" * 8),
    "trailing byte": GOOD + b"\0",
    "one byte short": GOOD[:-1],
    "only metadata": packed({"__metadata__": {"format": "pt"}}),
    "no tensors": packed({}),
    "metadata no mapping": packed({"__metadata__": 5, "a": entry([1], 0, 4)}, F4),
}


def refused(path: Path, *words: str) -> str:
    with pytest.raises(SpoliaError) as caught:
        read_tensors(path)
    for problem in caught.value.problems:
        assert problem.where and problem.what and problem.mend, problem
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", BAD)
def test_damaged_files_are_refused_with_their_name(case: str, tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    file.write_bytes(BAD[case])
    refused(file, "model.safetensors")
    refused(tmp_path, str(tmp_path) if "tensors" in case or "metadata" in case else "model.safetensors")


def test_truncation_at_every_byte_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    for size in range(len(GOOD)):
        file.write_bytes(GOOD[:size])
        refused(file, "model.safetensors")
    file.write_bytes(GOOD)
    assert read_tensors(file).keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["1²", "²", "x.١.y", "9" * 5000, "", "a b\nc", "💠.0", "a\0b", "__metadata__2"])
def test_any_name_is_read_and_written(name: str, tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(packed({name: entry([1], 0, 4)}, b"abcd"))
    tensors = read_tensors(tmp_path / "m.safetensors")
    assert list(tensors) == [name]
    write_checkpoint(tmp_path / "out", tensors)
    assert list(load_file(tmp_path / "out" / "model.safetensors")) == [name]


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_flipped_and_cut_files_open_soundly_or_are_refused(data: st.DataObject) -> None:
    tensors = {"layer.0.w": torch.arange(6.0).reshape(2, 3), "layer.1.w": torch.ones(3, dtype=torch.bfloat16)}
    raw = bytearray(save(tensors | {"ids": torch.arange(2), "s": torch.tensor(1.5)}, {"format": "pt"}))
    header = 8 + int.from_bytes(raw[:8], "little")
    # Most of what can go wrong stands in the header, so most flips go there.
    places = st.one_of(st.integers(0, 7), st.integers(0, header - 1), st.integers(0, len(raw) - 1))
    for at, value in data.draw(st.lists(st.tuples(places, st.integers(0, 255)), max_size=3)):
        raw[at] = value
    if data.draw(st.booleans()):
        del raw[data.draw(st.integers(0, len(raw))) :]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.safetensors"
        file.write_bytes(raw)
        try:
            found = read_tensors(file)
        except SpoliaError as error:
            assert "model.safetensors" in str(error) and all(p.mend for p in error.problems)
            return
    assert all(isinstance(t, torch.Tensor) for t in found.values())
    try:
        known = load(bytes(raw))
    except safetensors.SafetensorError:
        return  # laxer than safetensors in the metadata's values only: nothing of a tensor can be wrong
    assert found.keys() == known.keys() and all(same_bits(found[n], known[n]) for n in known)


SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
DICTS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(lambda n: n != "__metadata__"),
    st.tuples(st.sampled_from(DTYPES), SHAPES, st.integers(0, 99)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=50, deadline=None)
@given(DICTS)
def test_reads_what_safetensors_writes(drawn: dict[str, Any]) -> None:
    tensors = {name: random_tensor(*made) for name, made in drawn.items()}
    with tempfile.TemporaryDirectory() as folder:
        save_file(tensors, Path(folder) / "model.safetensors")
        opened, found = Checkpoint.open(folder), read_tensors(folder)
        assert list(found) == sorted(tensors, key=natural)
        with safetensors.safe_open(Path(folder) / "model.safetensors", "pt") as known:
            for name, info in opened.tensors.items():
                assert info.dtype.code == known.get_slice(name).get_dtype()
                assert list(info.shape) == known.get_slice(name).get_shape()
                assert info.nbytes == info.numel * info.dtype.size == tensors[name].nbytes
        assert opened.nbytes == sum(t.nbytes for t in tensors.values())
    assert all(same_bits(found[name], tensors[name]) for name in tensors)


@settings(max_examples=50, deadline=None)
@given(DICTS, st.integers(1, 300))
def test_safetensors_reads_what_is_written(drawn: dict[str, Any], shard: int) -> None:
    tensors = {name: random_tensor(*made) for name, made in drawn.items()}
    with tempfile.TemporaryDirectory() as parent:
        folder = write_checkpoint(Path(parent) / "m", tensors, {"model_type": "x"}, shard)
        files = sorted(folder.glob("*.safetensors"))
        places = {name: file.name for file in files for name in load_file(file)}
        found = {name: tensor for file in files for name, tensor in load_file(file).items()}
        names = {f.name for f in folder.iterdir()}
        if len(files) == 1:
            assert names == {"model.safetensors", "config.json"}
        else:
            index = json.loads((folder / "model.safetensors.index.json").read_text())
            total = sum(t.nbytes for t in tensors.values())
            assert index == {"metadata": {"total_size": total}, "weight_map": places}
            assert names == {*places.values(), "config.json", "model.safetensors.index.json"}
            assert [f.name for f in files] == [
                f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
            ]
        for file in files:  # a shard is over the limit only when one tensor is
            inside = load_file(file).values()
            assert sum(t.nbytes for t in inside) <= shard or sum(t.nbytes > 0 for t in inside) == 1
        for info in Checkpoint.open(folder).tensors.values():
            assert info.start % info.dtype.size == 0
        assert all(same_bits(t, tensors[name]) for name, t in read_tensors(folder).items())
    assert found.keys() == tensors.keys() and all(same_bits(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    ("tensors", "word"),
    [({"x": torch.ones(2) * 1j}, "complex64"), ({"__metadata__": torch.ones(2)}, "__metadata__")],
)
def test_what_the_format_cannot_hold_is_refused(tensors: dict[str, Any], word: str, tmp_path: Path) -> None:
    with pytest.raises(SpoliaError, match=word):
        write_checkpoint(tmp_path / "m", tensors)
    assert not (tmp_path / "m").exists()


@pytest.mark.slow
def test_a_tensor_over_two_gigabytes_is_read_whole(tmp_path: Path) -> None:
    """One read call gives at most 2^31 - 4096 bytes on Linux; the file is sparse, the page cache barely touched."""
    size, header = 2**31 + 8, packed({"a": entry([2**31 + 8], 0, 2**31 + 8, "U8")})
    with (tmp_path / "m.safetensors").open("wb") as stream:
        stream.write(header)
        stream.truncate(len(header) + size)
        stream.seek(-1, 2)
        stream.write(b"\x07")
    tensor = read_tensors(tmp_path / "m.safetensors")["a"]
    assert tensor.numel() == size and int(tensor[-1]) == 7
