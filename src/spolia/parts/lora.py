"""A model given as base and LoRA adapter. Its tensors are made while they are read; the dense model never exists.

A block of an adapted tensor is the base's block plus scale * B A for the rows of the block, summed in fp64 and rounded
once, so it equals the dense sum to the last bit of fp32. Nothing is rounded to the base's stored type in between.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

from spolia.core.checkpoint import Checkpoint, Dtype
from spolia.core.lazy import torch
from spolia.core.stream import BLOCK, Plane
from spolia.errors import Problems
from spolia.parts.adapter import CONFIG, UNLOAD, Adapter, Pair
from spolia.parts.align import tied_embedding
from spolia.parts.expert import Entry, Weights

if TYPE_CHECKING:
    from torch import Tensor

_KEPT = 8  # pairs of factors in memory: as many tensors as are worked on at a time
# How transformers calls what a checkpoint stores under another name: models of several towers.
_SPELLINGS = (
    ("model.language_model.", "language_model.model."), ("model.language_model.", "model."), ("model.", ""),
    ("lm_head.", "language_model.lm_head."),
)  # fmt: skip


@dataclass(frozen=True)
class Change:
    """What an adapter does to one tensor: put another in its place, then add left @ right * scale."""

    replaced: str | None = None  # by this tensor of the adapter
    pair: Pair | None = None
    turned: bool = False  # the tensor is the transpose of B A
    bias: str | None = None  # added, times the scale


class LoraWeights(Weights):
    """Weights of `base` with `adapter` on it. SpoliaError when a tensor of the adapter finds no place or does not fit."""

    def __init__(self, base: Weights, adapter: Adapter):
        self.base, self.adapter = base, adapter
        self.changes = _changes(base, adapter)
        entries = dict(base.entries)
        for name in self.changes:
            entries[name] = Entry(entries[name].dtype, entries[name].shape)
        super().__init__(entries, base.config)
        self._factors: dict[str, tuple[Tensor, Tensor]] = {}
        self._lock = threading.Lock()
        own, under = adapter.weights.checkpoint, base.checkpoint
        if own is not None and under is not None:
            stat = (adapter.path / CONFIG).stat()
            prints = [*own.fingerprint, (CONFIG, stat.st_size, stat.st_mtime_ns, adapter.digest), *under.fingerprint]
            notes = [*under.notes, *own.notes, *self._tied_notes()]
            self.checkpoint = Checkpoint(adapter.path, {}, base.config, prints, under.unlisted, notes)

    def _tied_notes(self) -> list[str]:
        embedding = tied_embedding(self.base)
        if embedding in self.changes:
            return [f"adapts `{embedding}`, which is the output head too: both change, as in peft's merge_and_unload"]
        return []

    def plane(self, name: str, model: str) -> Plane:
        change = self.changes.get(name)
        if change is None:
            return self.base.plane(name, model)
        under = self.adapter.weights.plane(change.replaced, model) if change.replaced else self.base.plane(name, model)
        entry = self.entries[name]
        if change.pair is None:
            return _Recast(model, entry.dtype, under)
        left, right = self._get(name, change)
        return LoraPlane(model, entry.dtype, under, left, right, change.pair.scale, change.turned)

    def _get(self, name: str, change: Change) -> tuple[Tensor, Tensor]:
        """The factors of a tensor in fp64: left [rows, r], right [r, columns]."""
        with self._lock:
            if name in self._factors:
                return self._factors[name]
        assert change.pair is not None
        if change.bias is not None:
            left, right = self._whole(change.bias).reshape(-1, 1), torch.ones(1, 1, dtype=torch.float64)
        else:
            left, right = self._whole(change.pair.b).flatten(1), self._whole(change.pair.a).flatten(1)
            if change.turned:
                left, right = right.t().contiguous(), left.t().contiguous()
        with self._lock:
            while len(self._factors) >= _KEPT:
                self._factors.pop(next(iter(self._factors)))
            self._factors[name] = (left, right)
        return left, right

    def _whole(self, name: str) -> Tensor:
        return whole(self.adapter.weights, name)

    @contextmanager
    def opened(self) -> Iterator[None]:
        with ExitStack() as stack:
            stack.enter_context(self.base.opened())
            stack.enter_context(self.adapter.weights.opened())
            try:
                yield
            finally:
                self._factors.clear()


def whole(weights: Weights, name: str) -> Tensor:
    """A tensor of open weights in fp64."""
    entry = weights.entries[name]
    out = torch.empty(entry.numel, dtype=torch.float64)
    weights.plane(name, name).read(0, entry.numel, out)
    return out.reshape(entry.shape)


@dataclass
class _Recast:
    """A tensor that takes another's place, and its type: a module to save is often kept wider than the base."""

    model: str
    dtype: Dtype
    under: Plane

    def read(self, start: int, stop: int, out: Tensor) -> None:
        self.under.read(start, stop, out)

    def expect(self, start: int, stop: int) -> None:
        self.under.expect(start, stop)


@dataclass
class LoraPlane:
    """under + scale * left @ right, tile by tile. Tiles lie fast, so the bits do not depend on who reads which block."""

    model: str
    dtype: Dtype
    under: Plane
    left: Tensor  # [rows, r]
    right: Tensor  # [r, columns]
    scale: float
    turned: bool = False  # left @ right is the transpose of B A
    _start: int = 0  # the tile at hand
    _tile: Tensor | None = None

    def read(self, start: int, stop: int, out: Tensor) -> None:
        at = start
        while at < stop:
            tile = self._tile
            if tile is None or not self._start <= at < self._start + len(tile):
                self._start, tile = self._compute(at)
                self._tile = tile
            end = min(stop, self._start + len(tile))
            wide = torch.empty(end - at, dtype=torch.float64)
            self.under.read(at, end, wide)
            wide.add_(tile[at - self._start : end - self._start])
            out[at - start : end - start].copy_(wide)
            at = end

    def _compute(self, at: int) -> tuple[int, Tensor]:
        """The tile with element `at`: a BLOCK's worth of whole rows, or of one row where that is longer."""
        columns = self.right.shape[1]
        row, column = divmod(at, columns)
        if columns >= BLOCK:
            first = column - column % BLOCK
            part = self.left[row : row + 1] @ self.right[:, first : first + BLOCK]
            return row * columns + first, part.mul_(self.scale).reshape(-1)
        rows = BLOCK // columns
        first = row - row % rows
        return first * columns, (self.left[first : first + rows] @ self.right).mul_(self.scale).reshape(-1)

    def expect(self, start: int, stop: int) -> None:
        self.under.expect(start, stop)


def _changes(base: Weights, adapter: Adapter) -> dict[str, Change]:
    """What happens to which tensor of the base. Every tensor of the adapter must find its place and fit."""
    problems, changes, taken = Problems(), dict[str, Change](), dict[str, str]()
    modules = {f"{module}.weight": pair for module, pair in adapter.pairs.items()}
    places = _places([*modules, *adapter.replaced, *adapter.biases], base.entries)

    def place(asked: str, source: str) -> str | None:
        found = places.get(asked)
        if found is None:
            problems.add(f"{adapter.path} {source}", f"the base has no tensor `{asked}`", _no_place(base, asked))
        elif not (base.entries[found].dtype.floating and adapter.weights.entries[source].dtype.floating):
            problems.add(
                f"{adapter.path} {source}", f"it or `{found}` of the base holds whole numbers", "use bf16 releases"
            )
        elif taken.setdefault(found, asked) != asked:
            problems.add(f"{adapter.path} {source}", f"`{asked}` and `{taken[found]}` both fall on `{found}`", UNLOAD)
        else:
            return found
        return None

    for asked, source in adapter.replaced.items():
        if (name := place(asked, source)) is not None:
            ours, theirs = adapter.weights.entries[source].shape, base.entries[name].shape
            if ours != theirs:
                what = f"is {list(ours)}, but `{name}` of the base is {list(theirs)}"
                mend = "use the base it was trained on; a vocabulary that grew: resize the base's embeddings first"
                problems.add(f"{adapter.path} {source}", what, mend)
            changes[name] = Change(source)
    against, either = list[str](), list[str]()
    for asked, pair in modules.items():
        if (name := place(asked, pair.a)) is not None:
            fits = _fit(pair, adapter.weights.entries, base.entries[name].shape)
            if not fits:
                shapes = " and ".join(f"`{n}` {list(adapter.weights.entries[n].shape)}" for n in (pair.b, pair.a))
                what = f"{shapes} do not make `{name}` {list(base.entries[name].shape)} of the base"
                problems.add(str(adapter.path), what, "use the base that the adapter was trained on")
                continue
            if not pair.embedding:
                (either if len(fits) == 2 else against if adapter.transposed not in fits else []).append(pair.module)
            turned = adapter.transposed if len(fits) == 2 else fits[0]
            kept = changes[name].replaced if name in changes else None
            changes[name] = Change(kept, pair, turned)
    if against and either:
        what = f"`fan_in_fan_out: {adapter.transposed}` cannot hold for `{against[0]}`, so `{either[0]}` may lie either way"
        problems.add(str(adapter.path / CONFIG), what, UNLOAD)
    for asked, source in adapter.biases.items():
        if (name := place(asked, source)) is not None:
            kept, pair = changes.get(name, Change()).replaced, adapter.pairs[asked.removesuffix(".bias")]
            changes[name] = Change(kept, pair, False, source)
            if adapter.weights.entries[source].shape != base.entries[name].shape:
                problems.add(f"{adapter.path} {source}", f"does not fit `{name}` of the base", "use its own base")
    problems.raise_if_any()
    return changes


def _fit(pair: Pair, entries: Mapping[str, Entry], shape: tuple[int, ...]) -> list[bool]:
    """The ways B A makes a tensor of `shape`: as it is (False), turned (True), both, or none."""
    a, b = entries[pair.a].shape, entries[pair.b].shape
    if prod(b[2:]) != 1 or len(a) < 2 or not shape:
        return []
    out, inner = b[0], prod(a[1:])
    straight = shape[0] == out and prod(shape[1:]) == inner and (len(a) == 2 or a[2:] == shape[2:])
    turned = len(a) == 2 and shape == (inner, out)
    if pair.embedding:
        return [True] if turned else []
    return [False] * straight + [True] * turned


def _places(names: Iterable[str], entries: Mapping[str, Entry]) -> dict[str, str]:
    """The base's name of each tensor: the same, or with its model's prefix put before it or taken off."""
    found = {}
    for name in names:
        tries = [name, *(there + name[len(here) :] for here, there in _SPELLINGS if name.startswith(here))]
        tries.append(name.partition(".")[2])
        hit = next((t for t in tries if t in entries), None)
        if hit is None:
            ends = [entry for entry in entries if entry.endswith(f".{name}")]
            hit = ends[0] if len(ends) == 1 else None
        if hit is not None:
            found[name] = hit
    return found


def _no_place(base: Weights, asked: str) -> str:
    if asked.rpartition(".")[0].endswith("lm_head") and tied_embedding(base):
        return "the base ties its head to the input embedding: untie it before training, or " + UNLOAD
    return "use the base that the adapter was trained on, with its heads"
