"""Checkpoints on disk: safetensors folders and files, known from their headers alone. No torch until a tensor is read.

A header is checked before it is believed: lengths, offsets, overlaps, shapes and dtypes must agree with the file size.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.files import open_regular, read_json, unreadable
from spolia.core.folders import find_weights
from spolia.core.lazy import torch
from spolia.errors import Problems, SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

MAX_HEADER = 100_000_000  # bytes; the format's own limit


@dataclass(frozen=True)
class Dtype:
    """A storage type: its name in safetensors, in torch, its size in bytes, and whether it takes part in arithmetic."""

    code: str
    torch_name: str
    size: int
    floating: bool


DTYPES = {
    d.code: d
    for d in (
        Dtype("F64", "float64", 8, True), Dtype("F32", "float32", 4, True),
        Dtype("F16", "float16", 2, True), Dtype("BF16", "bfloat16", 2, True),
        Dtype("F8_E4M3", "float8_e4m3fn", 1, True), Dtype("F8_E5M2", "float8_e5m2", 1, True),
        Dtype("I64", "int64", 8, False), Dtype("I32", "int32", 4, False), Dtype("I16", "int16", 2, False),
        Dtype("I8", "int8", 1, False), Dtype("U8", "uint8", 1, False), Dtype("BOOL", "bool", 1, False),
        Dtype("U16", "uint16", 2, False), Dtype("U32", "uint32", 4, False), Dtype("U64", "uint64", 8, False),
    )
}  # fmt: skip
BY_TORCH_NAME = {d.torch_name: d for d in DTYPES.values()}


@dataclass(frozen=True)
class TensorInfo:
    """Where one tensor lies: bytes `start:stop` of `file`."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]
    file: Path
    start: int
    stop: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def natural(name: str) -> tuple[Any, ...]:
    """Sort key that puts layer 2 before layer 10."""
    parts = re.split(r"([0-9]{1,18})", name)
    return tuple((0, int(part), "") if i % 2 else (1, 0, part) for i, part in enumerate(parts) if part)


def read_header(file: Path) -> tuple[dict[str, TensorInfo], str, os.stat_result]:
    """Every tensor of one safetensors file, a digest of its header, and what the file was when that was read.

    Raises SpoliaError naming file and cure.
    """

    def bad(what: str) -> SpoliaError:
        return SpoliaError(
            what, where=str(file), mend="the file is damaged or not safetensors: download or save it again"
        )

    try:
        with open(open_regular(file), "rb") as stream:
            stat = os.fstat(stream.fileno())
            size, first = stat.st_size, stream.read(8)
            if len(first) < 8:
                raise bad(f"only {size} bytes, too short for a safetensors header")
            length = int.from_bytes(first, "little")
            if length > MAX_HEADER or length + 8 > size:
                raise bad(f"header claims {length} bytes in a file of {size}")
            raw = stream.read(length)
    except OSError as error:
        raise unreadable(error, file, "its header") from None
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
        if not isinstance(header, dict):
            raise ValueError("the header is no mapping")
    except (ValueError, RecursionError) as error:
        raise bad(f"header is not valid JSON: {error}") from None
    tensors, body = {}, size - 8 - length
    for name, entry in header.items():
        if name == "__metadata__":
            if not isinstance(entry, dict):
                raise bad("its metadata are no mapping")
            continue
        tensors[name] = _tensor(name, entry, file, length + 8, body, bad)
    end = length + 8
    for info in sorted(tensors.values(), key=lambda t: (t.start, t.stop)):
        if info.start != end:
            raise bad(
                f"tensor `{info.name}` starts at byte {info.start}, expected {end}: ranges overlap or leave a gap"
            )
        end = info.stop
    if end != size:
        raise bad(f"{size} bytes, but the header describes {end}: truncated or padded")
    return tensors, hashlib.sha256(raw).hexdigest(), stat


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a name stands twice")
    return result


def _tensor(name: str, entry: Any, file: Path, offset: int, body: int, bad: Any) -> TensorInfo:
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        raise bad(f"tensor `{name}` lacks dtype, shape or data_offsets")
    dtype = DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise SpoliaError(
            f"tensor `{name}` has storage type {entry['dtype']!r}",
            where=str(file),
            mend="quantised or unknown types cannot be merged: use the bf16, fp16 or fp32 release of the model",
        )
    shape, ends = entry["shape"], entry["data_offsets"]
    if not isinstance(shape, list) or not all(type(s) is int and s >= 0 for s in shape) or len(shape) > 64:
        raise bad(f"tensor `{name}` has no valid shape: {str(shape)[:80]}")
    if math.prod(max(extent, 1) for extent in shape) * dtype.size >= 1 << 63:
        raise bad(f"tensor `{name}` has an impossible shape: {str(shape)[:80]}")
    if not isinstance(ends, list) or len(ends) != 2 or not all(type(e) is int for e in ends):
        raise bad(f"tensor `{name}` has no valid data_offsets: {str(ends)[:80]}")
    if not 0 <= ends[0] <= ends[1] <= body:
        raise bad(f"tensor `{name}` lies at bytes {ends[0]}:{ends[1]} of {body}")
    if ends[1] - ends[0] != math.prod(shape) * dtype.size:
        raise bad(f"tensor `{name}` of shape {shape} and type {dtype.code} does not fit {ends[1] - ends[0]} bytes")
    return TensorInfo(name, dtype, tuple(shape), file, offset + ends[0], offset + ends[1])


@dataclass
class Checkpoint:
    """A model folder or file: its tensors by name, its config, and a fingerprint of what was seen."""

    path: Path
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] | None
    fingerprint: list[tuple[str, int, int, str]] = field(default_factory=list)  # file, bytes, mtime, header digest
    unlisted: list[str] = field(default_factory=list)  # tensors that lie in a shard but not in the index
    notes: list[str] = field(default_factory=list)  # choices made while opening that the user should know
    inodes: dict[str, int] = field(default_factory=dict)  # of the files, by name; a copy has others

    @property
    def files(self) -> list[Path]:
        return sorted({info.file for info in self.tensors.values()})

    @property
    def nbytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def folder(self) -> Path:
        return self.path if self.path.is_dir() else self.path.parent

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> Checkpoint:
        """Read the headers below `path` (a folder or one .safetensors file).

        Raises SpoliaError for what is missing, damaged, listed twice or of another kind (LoRA adapters, pickles).
        """
        path = Path(path)
        weights = find_weights(path)
        files, weight_map = weights.files, weights.weight_map
        problems, found, prints = Problems(), {}, []
        unlisted, inodes = list[str](), dict[str, int]()
        for file in files:
            try:
                tensors, digest, stat = read_header(file)
            except SpoliaError as error:
                problems.errors.extend(error.problems)
                continue
            prints.append((file.name, stat.st_size, stat.st_mtime_ns, digest))
            inodes[file.name] = stat.st_ino
            for name, info in tensors.items():
                if weight_map is not None and weight_map.get(name) != file.name:
                    unlisted.append(name)
                elif name in found:
                    problems.add(
                        str(file), f"tensor `{name}` stands in {found[name].file.name} too", "delete stray shards"
                    )
                else:
                    found[name] = info
        if weight_map is not None and not problems.errors:
            absent = sorted(weight_map.keys() - found.keys(), key=natural)
            if absent:
                more = f" (and {len(absent) - 1} more)" if len(absent) > 1 else ""
                what = f"the index puts `{absent[0]}`{more} in {weight_map[absent[0]]}, where it is not"
                problems.add(str(path), what, "save or download the model again")
        problems.raise_if_any()
        if not found:
            raise SpoliaError("holds no tensors", where=str(path), mend="point to a folder with *.safetensors")
        config = read_config(path)
        ordered = dict(sorted(found.items(), key=lambda item: natural(item[0])))
        return cls(path, ordered, config, prints, unlisted, weights.notes, inodes)


def read_config(path: Path) -> dict[str, Any] | None:
    """The config.json in the folder `path`, or beside the file `path`; None when there is none."""
    file = (path if path.is_dir() else path.parent) / "config.json"
    if not os.path.lexists(file):
        return None
    config = read_json(file, "restore the model's config.json")
    if not isinstance(config, dict):
        raise SpoliaError("is no mapping", where=str(file), mend="restore the model's config.json")
    return config


def read_tensors(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """All tensors of a checkpoint in memory, in their storage types."""
    return dict(iterate_tensors(Checkpoint.open(path)))


def iterate_tensors(checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Tensors one at a time, each in its own memory."""
    for info in checkpoint.tensors.values():
        fd, raw = open_regular(info.file), bytearray(info.nbytes)
        try:
            read_into(fd, info, 0, memoryview(raw))
        finally:
            os.close(fd)
        dtype = getattr(torch, info.dtype.torch_name)
        tensor = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
        yield info.name, tensor.reshape(info.shape)


def read_into(fd: int, info: TensorInfo, start: int, view: memoryview) -> None:
    """Fill `view` with the bytes of a tensor from byte `start` of it on. SpoliaError names file and tensor."""
    at = info.start + start
    while view:  # one read gives 2 GB at most
        try:
            got = os.preadv(fd, [view], at)
        except OSError as error:
            raise unreadable(error, info.file, f"tensor `{info.name}`") from None
        if got <= 0:
            what = f"ends inside tensor `{info.name}`"
            raise SpoliaError(what, where=str(info.file), mend="the file shrank: restore it")
        view, at = view[got:], at + got


def storage(tensor: Tensor) -> Dtype:
    """The storage type of a tensor; SpoliaError for what safetensors cannot hold."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name not in BY_TORCH_NAME:
        raise SpoliaError(f"tensors of type {name} cannot be merged", mend="convert them to float32 first")
    return BY_TORCH_NAME[name]


def write_checkpoint(
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
    max_shard_size: int = 5_000_000_000,
) -> Path:
    """Save tensors as a model folder, whole or not at all. `max_shard_size` in bytes."""
    from spolia.core.layout import Layout, Slot
    from spolia.core.staging import Staging

    layout = Layout.of([Slot(name, storage(t), tuple(t.shape)) for name, t in tensors.items()], max_shard_size)
    with Staging(Path(folder), layout, key="") as staging:
        for name, tensor in tensors.items():
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            staging.write(name, 0, memoryview(flat.view(torch.uint8).numpy()) if flat.numel() else memoryview(b""))
        if config is not None:
            staging.write_text("config.json", json.dumps(dict(config), indent=2) + "\n")
        staging.finish()
    return Path(folder)
