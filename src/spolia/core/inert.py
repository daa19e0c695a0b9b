"""Pickles read as data: whole modules that torch.save or pickle wrote. Nothing in the file is imported, built or called.

core/opcodes.py turns classes into names and tensors into views of storages, whose bytes are read when asked for. Three
forms of file are known: the zip archive of torch 1.6 and later, the stream of torch before it, and a plain pickle.
"""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.files import open_regular, unreadable
from spolia.core.lazy import torch
from spolia.core.opcodes import Machine, Named, Record, Storage, View
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

MAGIC, PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # of the stream of torch before 1.6
MOST_NODES, LONGEST_PATH = 50_000, 2000  # places that are looked at for tensors, and characters of their names
LARGEST_PICKLE = 100_000_000  # bytes of data.pkl in an archive, which holds no numbers
_STORAGES = {
    "DoubleStorage": "float64", "FloatStorage": "float32", "HalfStorage": "float16", "BFloat16Storage": "bfloat16",
    "LongStorage": "int64", "IntStorage": "int32", "ShortStorage": "int16", "CharStorage": "int8",
    "ByteStorage": "uint8", "BoolStorage": "bool",
}  # fmt: skip


@dataclass(frozen=True)
class Inert:
    """What a file holds: tensors by path in the order of the file, and of every module on the way its class and state.

    `kinds` and `states` go by the module's path, empty for the outermost. `tensor` reads the numbers of one.
    """

    path: Path
    views: dict[str, View]
    kinds: dict[str, str]
    states: dict[str, dict[str, Any]]

    def tensor(self, name: str) -> Tensor:
        """Tensor `name` in its storage type, in memory of its own."""
        view = self.views[name]
        storage, dtype = view.storage, getattr(torch, view.storage.dtype)
        if math.prod(view.shape) == 0:
            return torch.empty(view.shape, dtype=dtype)
        raw = storage.data if storage.data is not None else _entry(self.path, storage)
        steps = sum((n - 1) * step for n, step in zip(view.shape, view.strides, strict=True))
        start, stop = (place * dtype.itemsize for place in (view.offset, view.offset + steps + 1))
        flat = torch.frombuffer(
            bytearray(raw[start:stop]), dtype=dtype
        )  # a bytearray: others' memory may not be written
        return flat.as_strided(view.shape, view.strides).contiguous()


def read_inert(path: Path) -> Inert:
    """What the pickle at `path` holds. SpoliaError for what is damaged, of another form, or claims more than it is."""
    try:
        with open(open_regular(path), "rb") as stream:
            head = stream.read(4)
            size = stream.seek(0, io.SEEK_END)
            stream.seek(0)
            root = _archive(stream, path) if head == b"PK\x03\x04" else _stream(stream.read())
        found = _collected(path, root)
    except SpoliaError:
        raise
    except OSError as error:
        raise unreadable(error, path) from None
    except MemoryError:
        raise SpoliaError("does not fit into memory", where=str(path), mend="use a machine with more") from None
    except Exception as error:  # whatever a damaged or hostile file provokes in decoders of containers and numbers
        words = " ".join(str(error).split())[:160] or type(error).__name__
        mend = "download it again; only what torch.save or pickle wrote can be read"
        raise SpoliaError(f"cannot be read as a pickle: {words}", where=str(path), mend=mend) from None
    storages = {id(view.storage): view.storage for view in found.views.values()}
    claimed = sum(storage.nbytes for storage in storages.values())
    if claimed > size:
        what = f"its tensors claim {claimed} bytes in a file of {size}"
        raise SpoliaError(what, where=str(path), mend="download it again")
    return found


# --- the three forms of file -----------------------------------------------------------------------------------------


def _archive(stream: Any, path: Path) -> Any:
    """The object in a zip archive; storages stay in the file."""
    with zipfile.ZipFile(stream) as archive:
        names = archive.namelist()
        if any("/code/" in name for name in names):
            mend = "save its state dict where you trust the file"
            raise SpoliaError("is a TorchScript program, not a pickled module", where=str(path), mend=mend)
        pickles = [name for name in names if name.endswith("data.pkl") and name.count("/") <= 1]
        if len(pickles) != 1:
            raise ValueError("no archive of torch.save")
        root = pickles[0].removesuffix("data.pkl")
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            raise ValueError("its numbers are stored in big-endian order")
        info, known = archive.getinfo(pickles[0]), dict[str, Storage]()
        if info.compress_type != zipfile.ZIP_STORED or info.file_size > LARGEST_PICKLE:
            raise ValueError("its data.pkl is compressed or too large")

        def storage(pid: Any) -> Storage:
            found = _storage(pid)
            if found.key in known:
                return known[found.key]
            entry = archive.getinfo(f"{root}data/{found.key}")
            if entry.compress_type != zipfile.ZIP_STORED or entry.file_size < found.nbytes:
                raise ValueError(f"storage {found.key[:40]} is compressed or cut short")
            return known.setdefault(found.key, Storage(entry.filename, found.dtype, found.numel))

        return Machine(storage).run(io.BytesIO(archive.read(info)))


def _entry(path: Path, storage: Storage) -> memoryview:
    """The bytes of a storage in an archive."""
    try:
        with zipfile.ZipFile(path) as archive:
            return memoryview(archive.read(storage.key))[: storage.nbytes]
    except Exception as error:  # zipfile has no one error for a damaged archive
        words = " ".join(str(error).split())[:160] or type(error).__name__
        raise SpoliaError(f"changed or is damaged: {words}", where=str(path), mend="download it again") from None


def _stream(data: bytes) -> Any:
    """The object in a plain pickle, or in the stream of torch before 1.6."""
    first = Machine(_no_storage, _loaded).run(io.BytesIO(data))
    return _legacy(data) if first == MAGIC and isinstance(first, int) else first


def _loaded(data: bytes) -> Storage:
    """A storage that pickle wrote: its bytes are a small stream of torch.save."""
    found = _legacy(data)
    if not isinstance(found, Storage):
        raise ValueError("a storage holds something else")
    return found


def _legacy(data: bytes) -> Any:
    """Magic, version, machine, object, keys; then of each key its count as 8 bytes, and its numbers."""
    stream, known = io.BytesIO(data), dict[str, Storage]()

    def promised(pid: Any) -> Storage | Named:
        if isinstance(pid, tuple) and len(pid) > 1 and pid[0] == "module" and isinstance(pid[1], Named):
            return pid[1]  # a class, with its source beside it
        found = _storage(pid)
        if len(pid) > 5 and pid[5] is not None:
            raise ValueError("a storage is a part of another one")
        return known.setdefault(found.key, found)

    magic, version, machine = (Machine(_no_storage).run(stream) for _ in range(3))
    if magic != MAGIC or version != PROTOCOL or not isinstance(machine, dict) or machine.get("little_endian") is False:
        raise ValueError("no stream of torch.save, or of another kind of machine")
    root = Machine(promised).run(stream)
    keys, whole = Machine(_no_storage).run(stream), memoryview(data)
    for key in keys if isinstance(keys, list) else []:
        storage = known[key]
        count = int.from_bytes(stream.read(8), "little")
        start = stream.tell()
        if count != storage.numel or start + storage.nbytes > len(data):
            raise ValueError(f"storage {str(key)[:40]} is cut short")
        storage.data = whole[start : start + storage.nbytes]
        stream.seek(start + storage.nbytes)
    if any(storage.data is None for storage in known.values()):
        raise ValueError("a storage is missing")
    return root


def _storage(pid: Any) -> Storage:
    """What a persistent id says: ("storage", its class, key, device, count)."""
    if not isinstance(pid, tuple) or len(pid) < 5 or pid[0] != "storage" or not isinstance(pid[1], Named):
        raise ValueError("a persistent id is no storage")
    kind, key, count = pid[1].name.rpartition(".")[2], pid[2], pid[4]
    if kind not in _STORAGES or not isinstance(key, str) or type(count) is not int or count < 0:
        raise ValueError(f"a storage of kind {kind[:40]} cannot be read")
    return Storage(key, _STORAGES[kind], count)


def _no_storage(pid: Any) -> Storage:
    raise ValueError("a storage stands where none can be")


# --- tensors by path -------------------------------------------------------------------------------------------------


def _collected(path: Path, root: Any) -> Inert:
    """Walks mappings and modules, in the order of the file. A part that stands in two places is met twice."""
    found = Inert(path, {}, {}, {})
    todo: list[tuple[str, Any]] = [("", root)]
    for _ in range(MOST_NODES):
        if not todo:
            return found
        name, value = todo.pop()
        if len(name) > LONGEST_PATH:
            raise ValueError(f"a name of more than {LONGEST_PATH} characters, or a part that holds itself")
        if isinstance(value, View):
            found.views[name] = value
            continue
        state = _state(value)
        if state is not None and isinstance(value, Record):
            found.kinds[name] = value.kind.name if isinstance(value.kind, Named) else ""
            found.states[name] = state
        children = value if isinstance(value, dict) else value.items if isinstance(value, Record) else {}
        parts = [*_parts(state or {}), *children.items()]
        todo += [(f"{name}.{key}" if name else key, part) for key, part in reversed(parts)]
    raise ValueError(f"more than {MOST_NODES} parts")


def _state(value: Any) -> dict[str, Any] | None:
    """The attributes of a record that is a module."""
    state = value.state if isinstance(value, Record) else None
    if isinstance(state, tuple) and state:
        state = state[0]
    return state if isinstance(state, dict) and ("_modules" in state or "_parameters" in state) else None


def _parts(state: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Parameters, kept buffers and modules of a module by name."""
    passing = state.get("_non_persistent_buffers_set")
    for group in ("_parameters", "_buffers", "_modules"):
        held = state.get(group)
        for key, part in held.items() if isinstance(held, dict) else ():
            if group != "_buffers" or not isinstance(passing, list) or key not in passing:
                yield key, part
