"""Masks: one bit a weight that says what an expert keeps of a merged change, and one factor to go with it.

    expert's model = base + rescaler * mask * (merged - base)

In a merged folder they stand as masks/EXPERT.safetensors: for each tensor a uint8 row of ceil(n / 8) bytes, the first
element in the highest bit, as numpy packs them; the factor as an fp64 tensor; shapes, method and expert in the metadata.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar
from urllib.parse import quote

from spolia.catalog import Method
from spolia.core.checkpoint import Checkpoint
from spolia.core.lazy import np
from spolia.core.settings import MergeSettings, setting
from spolia.core.staging import allocate
from spolia.core.stream import Block, Stack, in_parallel
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.merging import Merge, Part

if TYPE_CHECKING:
    from torch import Tensor

FOLDER = "masks"
FORMAT = "spolia mask 1"
RESCALER = "spolia.rescaler"  # its name among the packed tensors
_MOST_DIMENSIONS = 64  # of a tensor in torch
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, repr=False)
class Mask:
    """What one expert keeps. `packed` lies in memory, or in the file it was opened from."""

    expert: str
    method: str
    shapes: Shapes
    packed: dict[str, np.ndarray]  # uint8 [ceil(n / 8)]
    rescaler: float = 1.0
    stamp: str = ""  # size and time of the file

    def __repr__(self) -> str:
        return f"Mask({self.method}, {self.expert}, {len(self.shapes)} tensors, {self.rescaler!r}, {self.stamp!r})"

    @property
    def nbytes(self) -> int:
        return sum(row.size for row in self.packed.values())

    def bits(self, name: str, start: int, stop: int) -> np.ndarray:
        """Elements start:stop of tensor `name`, 1 where it is kept: uint8 [stop - start]."""
        low = start // 8
        return np.unpackbits(self.packed[name][low : -(-stop // 8)])[start - 8 * low : stop - 8 * low]

    @classmethod
    def blank(cls, expert: str, method: str, shapes: Shapes, rescaler: float, file: Path | None = None) -> Mask:
        """All zeros, to be written to; in `file` if there is one."""
        if file is None:
            rows = {name: np.zeros(_bytes(shape), np.uint8) for name, shape in shapes.items()}
            return cls(expert, method, shapes, rows, rescaler)
        header, offsets = _header(expert, method, shapes)
        with file.open("wb") as stream:
            allocate(stream.fileno(), len(header) + 8 + sum(_bytes(shape) for shape in shapes.values()))
            stream.write(header)
            stream.write(np.array([rescaler], "<f8").tobytes())
        whole = np.memmap(file, np.uint8, mode="r+")
        rows = {name: whole[at : at + _bytes(shapes[name])] for name, at in offsets.items()}
        return cls(expert, method, shapes, rows, rescaler)

    @classmethod
    def of(cls, folder: Path, expert: str) -> Mask:
        """The mask of `expert` in a merged folder."""
        file = file_of(folder, expert) if fits(expert) else folder
        if not os.path.isfile(file):
            known = sorted(Mask.open(f).expert for f in (folder / FOLDER).glob("*.safetensors"))
            if not known:
                cure = "merge with a method that makes them: emr, tall_masks"
                raise SpoliaError("holds no masks", where=str(folder), mend=cure)
            raise SpoliaError(f"holds no mask of `{expert}`", where=str(folder), mend=did_you_mean(expert, known))
        mask = cls.open(file)
        if mask.expert != expert:
            cure = "give the file the name that it had, or merge again"
            raise SpoliaError(f"is the mask of `{mask.expert}`, not of `{expert}`", where=str(file), mend=cure)
        return mask

    @classmethod
    def open(cls, file: Path) -> Mask:
        """Reads the header; the bits stay on disk until they are asked for."""
        tensors = dict(Checkpoint.open(file).tensors)  # a header that lies is refused here
        stat = file.stat()
        whole = np.memmap(file, np.uint8, mode="r")
        about = json.loads(bytes(whole[8 : 8 + int.from_bytes(bytes(whole[:8]), "little")])).get("__metadata__") or {}
        try:
            if about["format"] != FORMAT:
                raise ValueError
            expert, method = about["expert"], about["method"]
            shapes = {name: tuple(shape) for name, shape in json.loads(about["shapes"]).items()}
            place = tensors.pop(RESCALER)
            rescaler = float(np.frombuffer(bytes(whole[place.start : place.stop]), "<f8")[0])
            sound = isinstance(expert, str) and fits(expert) and isinstance(method, str)
            sound = sound and (place.dtype.code, place.nbytes) == ("F64", 8) and math.isfinite(rescaler)
            sound = sound and all(type(n) is int and n >= 0 for shape in shapes.values() for n in shape)
            sound = sound and all(len(shape) <= _MOST_DIMENSIONS for shape in shapes.values())
            sound = sound and all(info.dtype.code == "U8" for info in tensors.values())
            if not sound or {n: i.nbytes for n, i in tensors.items()} != {n: _bytes(s) for n, s in shapes.items()}:
                raise ValueError
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, RecursionError):
            raise SpoliaError("is no mask of ours", where=str(file), mend="merge again, or restore the file") from None
        rows = {name: whole[info.start : info.stop] for name, info in tensors.items()}
        return cls(expert, method, shapes, rows, rescaler, f"{stat.st_size} {stat.st_mtime_ns}")


def file_of(folder: Path, expert: str) -> Path:
    """Where the mask of `expert` lies in a merged folder."""
    return folder / FOLDER / f"{quote(expert, safe=' ')}.safetensors"


def fits(expert: str) -> bool:
    """Whether the expert's name can be that of a file."""
    try:
        return len(file_of(Path(), expert).name) <= 255
    except UnicodeEncodeError:  # half of a pair of code units
        return False


def mask_bytes(shapes: Shapes, expert: str = "", method: str = "") -> int:
    """Size of one mask's file."""
    return len(_header(expert, method, shapes)[0]) + 8 + sum(_bytes(shape) for shape in shapes.values())


def _bytes(shape: tuple[int, ...]) -> int:
    count = 1
    for extent in shape:
        count *= extent
    return -(-count // 8)


def _header(expert: str, method: str, shapes: Shapes) -> tuple[bytes, dict[str, int]]:
    """The file's first bytes, and where each tensor's bits begin in it."""
    about = {"format": FORMAT, "expert": expert, "method": method, "shapes": json.dumps(shapes, separators=(",", ":"))}
    entries: dict[str, Any] = {
        "__metadata__": about,
        RESCALER: {"dtype": "F64", "shape": [1], "data_offsets": [0, 8]},
    }
    at = 8
    for name, shape in shapes.items():
        size = _bytes(shape)
        entries[name] = {"dtype": "U8", "shape": [size], "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {name: start + entry["data_offsets"][0] for name, entry in entries.items() if name in shapes}
    return len(text).to_bytes(8, "little") + text, places


def make_masks(merge: Merge, method: Method, folder: Path | None = None, progress: Any = None) -> list[Mask]:
    """The masks of all experts of a merge by `method`, in memory or as files of the merged `folder`.

    Use inside `pool.opened()`. An expert that lacks a tensor keeps nothing of it: it is the base there.
    """
    rule, factors = method.masks(), method.rescalers()
    workers, settings = merge.workers(), merge.settings_for(merge.tensors[0].name)
    names = [expert.name for expert in merge.pool.experts]
    shapes = {tensor.name: tensor.shape for tensor in merge.tensors if tensor.arithmetic}
    rescalers = factors(merge.model(workers), settings) if factors is not None else [1.0] * len(names)
    if folder is not None:
        (folder / FOLDER).mkdir(exist_ok=True)
    made = [
        Mask.blank(name, method.name, shapes, rescaler, file_of(folder, name) if folder is not None else None)
        for name, rescaler in zip(names, rescalers, strict=True)
    ]
    counted = threading.Lock()

    def work(part: Part, stop: threading.Event) -> None:
        tensor = merge.tensors[part.index]
        stack = merge.stack(tensor, (part.start, part.stop), stop, workers)
        for block, kept in rule(stack, merge.settings(tensor)):
            for place, row in zip(stack.places, np.packbits(kept.numpy(), axis=1), strict=True):
                at = block.start // 8  # blocks begin at multiples of 8
                made[place].packed[tensor.name][at : at + len(row)] = row
        if progress is not None:
            with counted:
                progress.advance((part.stop - part.start) // 8 * len(made))

    parts = [part for part in merge.parts() if merge.tensors[part.index].arithmetic]
    if progress is not None:
        progress.start("masks", sum((p.stop - p.start) // 8 for p in parts) * len(made), "B")
    in_parallel(parts, work, workers)
    if progress is not None:
        progress.finish()
    return made


class Attached(MergeSettings):
    """Settings of the merge that puts a mask on: the base, and the merged model as its one expert."""

    experts: ClassVar[tuple[int, int | None]] = (1, 1)

    mask: Any = setting(None, "the expert's mask", source="the merged folder", exclude=True)
    expert: str = setting("", "whose mask it is", source="the merged folder")

    @property
    def elementwise(self) -> bool:
        return True


def attached(stack: Stack, settings: Attached) -> Iterator[tuple[Block, Tensor]]:
    """base + rescaler * mask * (merged - base), in blocks; tensors the mask does not know stay as merged."""
    mask: Mask = settings.mask
    for block in stack.blocks():
        if stack.name not in mask.shapes:
            yield block, block.experts[0]
            continue
        assert block.base is not None
        change = block.deltas()[0]
        np.multiply(change.numpy(), mask.bits(stack.name, block.start, block.stop), out=change.numpy())
        yield block, block.base.add_(change, alpha=mask.rescaler)


ATTACH = Method(
    "attach", "merge", "a merged model with the mask of one expert: that expert's task, nearly as it was",
    "Wang et al. 2024, arXiv 2405.07813; Huang et al. 2024, arXiv 2405.17461", "merged folder + base", "1 read",
    "spolia.parts.masks:attached", "Attached",
)  # fmt: skip
