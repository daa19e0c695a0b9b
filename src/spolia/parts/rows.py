"""Embeddings under another vocabulary: every row of the result names the row it comes from, and rows are gathered while
they stream. No embedding is held in memory.

A row comes from the model itself, from another model that lends it (a token this one lacks), from several at once
(their mean), from nowhere (zero), or it is padding: the mean of all rows that stand for tokens.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import Dtype
from spolia.core.lazy import np, torch
from spolia.core.stream import BLOCK, Plane
from spolia.errors import Problems
from spolia.parts.align import resolve, vocabulary_rows
from spolia.parts.expert import Entry, Expert, Weights

if TYPE_CHECKING:
    from torch import Tensor

ZERO, BLEND, MEAN = -1, -2, -3  # in place of a lender


@dataclass
class RowMap:
    """Where the rows of one model's new embeddings come from.

    `who[j]` is the number of the model that lends row j, and `row[j]` the row it has there; or `who[j]` is ZERO, MEAN
    (padding), or BLEND, and then `blends[row[j]]` lists (model, row) whose mean it is. Rows from `tokens` on are padding.
    """

    who: list[int]
    row: list[int]
    tokens: int
    blends: list[tuple[tuple[int, int], ...]] = field(default_factory=list)

    def digest(self) -> str:
        return hashlib.sha256(repr((self.who, self.row, self.tokens, self.blends)).encode()).hexdigest()

    def used(self, lender: int) -> int:
        """One more than the highest row asked of `lender`."""
        rows = [r for w, r in zip(self.who, self.row, strict=True) if w == lender]
        return max([*rows, *(r for blend in self.blends for w, r in blend if w == lender)], default=-1) + 1

    def runs(self) -> Iterator[tuple[int, int, int, int]]:
        """(first, last + 1, lender, its first row) of stretches that lie one after the other in one place."""
        who, row = np.asarray(self.who), np.asarray(self.row)
        step = (who[1:] != who[:-1]) | (row[1:] != row[:-1] + 1) | (who[1:] < 0)
        starts = [0, *(np.flatnonzero(step) + 1).tolist(), len(who)]
        for first, last in pairwise(starts):
            if last > first:
                yield first, last, self.who[first], self.row[first]


@dataclass(frozen=True)
class Asked:
    """What a recipe says about one token's row: (model, row) that lends it, or zero, or neither (the rule decides).

    With `force` all models get it, else only those that lack the token.
    """

    source: tuple[int, int] | None = None
    zero: bool = False
    force: bool = False


def map_rows(
    tokens: Mapping[str, int],
    rows: int,
    known: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
    base: int | None,
    asked: Mapping[str, Asked],
    keep_padding: bool = False,
) -> tuple[list[RowMap], list[str]]:
    """One map a model, and the tokens that nobody has (their rows are zero).

    `known[m]` gives model m's rows by token, `sizes[m]` how many rows it has. A token that a model lacks gets the row
    of the only one that has it, of the base if it has it, else the mean of all that have it.
    """
    count = max(tokens.values(), default=-1) + 1
    maps = [RowMap([MEAN if j >= count else ZERO for j in range(rows)], [0] * rows, count) for _ in known]
    nobody: list[str] = []
    for token, place in tokens.items():
        owners = [(m, own[token]) for m, own in enumerate(known) if token in own]
        wish = asked.get(token, Asked())
        default = wish.source or next((o for o in owners if o[0] == base), owners[0] if len(owners) == 1 else None)
        if not owners and not wish.source and not wish.zero:
            nobody.append(token)
        for m, target in enumerate(maps):
            if token in known[m] and not wish.force:
                target.who[place], target.row[place] = m, known[m][token]
            elif wish.zero or (default is None and not owners):
                target.who[place] = ZERO
            elif default is not None:
                target.who[place], target.row[place] = default
            else:
                target.who[place], target.row[place] = BLEND, len(target.blends)
                target.blends.append(tuple(owners))
    _fill_rest(maps, tokens, rows, known, sizes, base or 0, keep_padding)
    return maps, nobody


def _fill_rest(
    maps: list[RowMap],
    tokens: Mapping[str, int],
    rows: int,
    known: Sequence[Mapping[str, int]],
    sizes: Sequence[int],
    first: int,
    keep_padding: bool,
) -> None:
    """Ids that no token has keep the first model's row; padding is the mean row or, if kept, the model's own."""
    taken = set(tokens.values())
    for place in range(maps[0].tokens if maps else 0):
        if place not in taken and place < sizes[first]:
            for target in maps:
                target.who[place], target.row[place] = first, place
    if keep_padding:
        for m, target in enumerate(maps):
            own = max(known[m].values(), default=-1) + 1
            for place in range(max(own, target.tokens), min(rows, sizes[m])):
                target.who[place], target.row[place] = m, place


@dataclass
class RowsPlane:
    """An embedding of the new vocabulary. `lenders` are the models' own embeddings of `width` elements a row."""

    model: str
    dtype: Dtype
    width: int
    lenders: Mapping[int, Plane]
    map: RowMap
    runs: Sequence[tuple[int, int, int, int]]
    ends: Any  # [runs] last + 1 of each
    mean: Mean

    def read(self, start: int, stop: int, out: Tensor) -> None:
        width, at = self.width, start
        number = int(np.searchsorted(self.ends, start // width, side="right"))
        while at < stop:
            first, last, who, row = self.runs[number]
            end = min(stop, last * width)
            low = row * width + at - first * width
            self._fill(who, row, low, low + end - at, out[at - start : end - start])
            at, number = end, number + 1

    def _fill(self, who: int, row: int, low: int, high: int, out: Tensor) -> None:
        """Elements low:high of what the lender `who` has; special rows start at `row * width`, as all do."""
        if who >= 0:
            self.lenders[who].read(low, high, out)
        elif who == ZERO:
            out.zero_()
        else:
            low, high = low - row * self.width, high - row * self.width
            values = self.mean.row(self) if who == MEAN else self._blend(row)
            out.copy_(values[low:high])

    def _blend(self, number: int) -> Tensor:
        total = torch.zeros(self.width, dtype=torch.float64)
        one = torch.empty(self.width, dtype=torch.float64)
        for who, row in self.map.blends[number]:
            self.lenders[who].read(row * self.width, (row + 1) * self.width, one)
            total += one
        return total / len(self.map.blends[number])

    def expect(self, start: int, stop: int) -> None:
        number = int(np.searchsorted(self.ends, start // self.width, side="right"))
        if number < len(self.runs):
            first, last, who, row = self.runs[number]
            if who >= 0:
                low = row * self.width + start - first * self.width
                self.lenders[who].expect(low, low + min(stop, last * self.width) - start)


class Mean:
    """The mean row of one tensor, found when the first padding row is read."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._row: Tensor | None = None

    def row(self, plane: RowsPlane) -> Tensor:
        with self._lock:
            row = self._row
            if row is None:
                total = torch.zeros(plane.width, dtype=torch.float64)
                step = max(1, BLOCK // plane.width)
                for first in range(0, plane.map.tokens, step):
                    last = min(first + step, plane.map.tokens)
                    rows = torch.empty((last - first) * plane.width, dtype=torch.float64)
                    plane.read(first * plane.width, last * plane.width, rows)
                    total += rows.view(-1, plane.width).sum(0)
                self._row = row = total / max(plane.map.tokens, 1)
            return row


class TokenWeights(Weights):
    """A model whose embeddings follow `map`; every other tensor is as it was. `lenders` are numbered as in the map."""

    def __init__(self, inner: Weights, lenders: Sequence[Expert], map: RowMap, keep_open: Sequence[Weights] = ()):
        self.inner, self.lenders, self.map, self._keep = inner, lenders, map, keep_open
        self._runs = list(map.runs())
        self._ends = np.asarray([run[1] for run in self._runs])
        self._wanted = {*map.who, *(who for blend in map.blends for who, _ in blend)}
        names = [name for model in (Expert("", inner), *lenders) for name in embeddings_of(model.weights)]
        found = ((name, resolve(Expert("", inner), name)) for name in dict.fromkeys(names))
        self.embeddings = {name: own for name, own in found if own is not None}  # a tied head is a gathered one too
        entries = dict(inner.entries)
        for name, own in self.embeddings.items():
            old = inner.entries[own]
            entries[name] = Entry(old.dtype, (len(map.who), *old.shape[1:]), old.storage if name == own else None)
        self._means = {name: Mean() for name in self.embeddings}
        super().__init__(entries, inner.config)
        self.checkpoint = inner.checkpoint

    def plane(self, name: str, model: str) -> Plane:
        if name not in self.embeddings:
            return self.inner.plane(name, model)
        entry = self.entries[name]
        owners = [owner for owner in self._owners(name) if owner[0] in self._wanted]
        planes = {number: lender.weights.plane(own, lender.name) for number, lender, own in owners}
        width = entry.shape[1] if len(entry.shape) > 1 else 1
        return RowsPlane(model, entry.dtype, width, planes, self.map, self._runs, self._ends, self._means[name])

    def _owners(self, name: str) -> Iterator[tuple[int, Expert, str]]:
        for number, lender in enumerate(self.lenders):
            own = resolve(lender, name)
            if own is not None:
                yield number, lender, own

    def check(self, model: str, problems: Problems) -> None:
        """Whether every row that is wanted is there, as wide as this model's."""
        for name in self.embeddings:
            shape = self.entries[name].shape
            owners = {number: (lender, own) for number, lender, own in self._owners(name)}
            for number, lender in enumerate(self.lenders):
                used = self.map.used(number)
                if not used:
                    continue
                if number not in owners:
                    problems.add(lender.name, f"has no `{name}`, of which {model} needs rows", "leave this model out")
                    continue
                theirs = lender.weights.entries[owners[number][1]].shape
                if theirs[1:] != shape[1:]:
                    what = f"`{name}` is {list(theirs)}, that of {model} {list(shape)}: rows of another width"
                    problems.add(lender.name, what, "only models of one hidden size can share a vocabulary")
                elif used > theirs[0]:
                    what = f"`{name}` has {theirs[0]} rows, its tokenizer uses {used}"
                    problems.add(lender.name, what, "restore the tokenizer that belongs to this model")

    @contextmanager
    def opened(self) -> Iterator[None]:
        with ExitStack() as stack:
            for weights in (self.inner, *self._keep):
                stack.enter_context(weights.opened())
            yield


def embeddings_of(weights: Weights) -> list[str]:
    """Names of the tensors with one row a token."""
    return [name for name, entry in weights.entries.items() if vocabulary_rows(name) and len(entry.shape) in (1, 2)]
