"""Where every output byte goes, known before any arithmetic: shards with their headers, and each tensor's place in them.

Headers are known first, so workers may write tensors in any order and in parts (core/staging.py).
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from spolia.core.checkpoint import Dtype, natural
from spolia.errors import SpoliaError


@dataclass(frozen=True)
class Slot:
    """One output tensor before it has a place."""

    name: str
    dtype: Dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        count = self.dtype.size
        for extent in self.shape:
            count *= extent
        return count


@dataclass(frozen=True)
class Place:
    """A slot's file and the byte where its data begin."""

    slot: Slot
    file: str
    start: int


@dataclass(frozen=True)
class Layout:
    """Shard files with their headers, and every tensor's place in them."""

    places: dict[str, Place]
    headers: dict[str, bytes]
    sizes: dict[str, int]
    index: str | None  # text of model.safetensors.index.json when there are several shards

    @classmethod
    def of(cls, slots: Iterable[Slot], max_shard_size: int, metadata: dict[str, str] | None = None) -> Layout:
        """Cut the slots, in natural order, into shards of at most `max_shard_size` bytes (one tensor at least)."""
        shards: list[list[Slot]] = [[]]
        filled = 0
        for slot in sorted(slots, key=lambda s: natural(s.name)):
            if shards[-1] and filled + slot.nbytes > max_shard_size:
                shards.append([])
                filled = 0
            shards[-1].append(slot)
            filled += slot.nbytes
        single = len(shards) == 1
        places, headers, sizes = {}, {}, {}
        for number, shard in enumerate(shards, 1):
            file = "model.safetensors" if single else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
            headers[file], offsets = _header(shard, metadata or {"format": "pt"})
            base = len(headers[file])
            for slot in shard:
                places[slot.name] = Place(slot, file, base + offsets[slot.name])
            sizes[file] = base + sum(slot.nbytes for slot in shard)
        total = sum(place.slot.nbytes for place in places.values())
        weight_map = {name: places[name].file for name in places}
        index = (
            None
            if single
            else json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2) + "\n"
        )
        return cls(places, headers, sizes, index)

    @property
    def nbytes(self) -> int:
        return sum(self.sizes.values())


def _header(shard: list[Slot], metadata: dict[str, str]) -> tuple[bytes, dict[str, int]]:
    offsets, at = {}, 0
    if any(slot.name == "__metadata__" for slot in shard):
        raise SpoliaError(
            "is no name for a tensor: safetensors reserves it", where="__metadata__", mend="rename the tensor"
        )
    for slot in sorted(shard, key=lambda s: -s.dtype.size):  # wide types first: every tensor stays aligned
        offsets[slot.name] = at
        at += slot.nbytes
    entries: dict[str, object] = {"__metadata__": metadata}
    for slot in shard:
        start = offsets[slot.name]
        entries[slot.name] = {
            "dtype": slot.dtype.code,
            "shape": list(slot.shape),
            "data_offsets": [start, start + slot.nbytes],
        }
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets
