"""`spolia compare`: two models tensor by tensor, or runs row by row. Torch is loaded only to read tensors."""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import natural
from spolia.core.lazy import torch
from spolia.core.stream import BLOCK, Plane, Stopped, cores, in_parallel
from spolia.errors import SpoliaError
from spolia.parts.expert import Entry, Expert, ExpertPool
from spolia.runs.compared_runs import RunComparison, compare_runs, is_run
from spolia.runs.describe import columns
from spolia.runs.references import located
from spolia.runs.telling import plain

if TYPE_CHECKING:
    from torch import Tensor

MOST = 20  # tensors that the text form lists


@dataclass
class Difference:
    """One tensor, b against a. `largest` is the largest absolute difference, `relative` |b - a| / |a| in the 2-norm;
    None where a value is not a number."""

    name: str
    elements: int
    largest: float | None
    relative: float | None
    share: float  # of elements that are not equal
    first: int | None = None  # where the first of them is


@dataclass
class ModelComparison:
    """Two models. `tensors` are those of one shape in both that differ, the largest movers first."""

    a: str
    b: str
    equal: int  # tensors equal element by element
    tensors: list[Difference]
    only_a: list[str] = field(default_factory=list)
    only_b: list[str] = field(default_factory=list)
    shapes: list[dict[str, Any]] = field(default_factory=list)  # name, a, b
    dtypes: list[dict[str, Any]] = field(default_factory=list)  # name, a, b

    @property
    def identical(self) -> bool:
        """Same names, shapes and types, and every element equal."""
        return not (self.tensors or self.only_a or self.only_b or self.shapes or self.dtypes)

    @property
    def verdict(self) -> str:
        if self.identical:
            return f"identical: {self.equal} tensors, every element equal"
        parts = [f"{len(self.tensors)} of {self.equal + len(self.tensors)} shared tensors differ"]
        for count, what in (
            (len(self.shapes), "with another shape"),
            (len(self.dtypes), "with another type"),
            (len(self.only_a), "only in the first"),
            (len(self.only_b), "only in the second"),
        ):
            parts += [f"{count} {what}"] if count else []
        return "; ".join(parts)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "models", "identical": self.identical, "verdict": self.verdict, **asdict(self)}

    def to_text(self, width: int | None = None) -> str:
        """For people: the largest movers, then what does not line up."""
        parts = [f"a  {self.a}", f"b  {self.b}", "", self.verdict]
        if self.tensors:
            heads = ("tensor", "relative difference", "largest", "elements that differ")
            rows = [
                (t.name, _number(t.relative, ".3g"), _number(t.largest, ".3g"), f"{t.share:.1%}")
                for t in self.tensors[:MOST]
            ]
            parts += ["", "largest movers", columns(heads, rows, width), *_more(self.tensors)]
        for title, found in (("another shape", self.shapes), ("another type", self.dtypes)):
            if found:
                rows = [(f["name"], str(f["a"]), str(f["b"])) for f in found[:MOST]]
                parts += ["", title, columns(("tensor", "a", "b"), rows, width), *_more(found)]
        for title, names in (("only in a", self.only_a), ("only in b", self.only_b)):
            if names:
                parts += ["", title, *(f"  {name}" for name in names[:MOST]), *_more(names)]
        return plain("\n".join(parts))


def _more(found: list[Any]) -> list[str]:
    return [f"  and {len(found) - MOST} more; --json has all"] if len(found) > MOST else []


def _number(value: float | None, form: str) -> str:
    return "not a number" if value is None else format(value, form)


def compare(*these: Any, threads: int | None = None) -> ModelComparison | RunComparison:
    """Compare two models (paths, hub ids, modules or state dicts), or two run folders or more.

    Models are read in blocks, side by side. Runs must have measured the same metric on the same data. Raises SpoliaError.
    """
    runs = [isinstance(one, str | os.PathLike) and is_run(Path(one)) for one in these]
    if len(these) < 2:
        raise SpoliaError("there is nothing to compare it with", where="compare", mend="spolia compare A B")
    if all(runs):
        return compare_runs([Path(one) for one in these])
    if any(runs):
        run, other = these[runs.index(True)], these[runs.index(False)]
        mend = f"compare two runs, or two models: {Path(run) / 'result'} is the model of the run, if it wrote one"
        raise SpoliaError(f"is a run folder, {_called(other, 'the other')} is not", where=str(run), mend=mend)
    if len(these) > 2:
        raise SpoliaError(f"{len(these)} models", where="compare", mend="name two models, or run folders")
    return compare_models(*these, threads=threads)


def _called(given: Any, otherwise: str) -> str:
    return str(given) if isinstance(given, str | os.PathLike) else otherwise


def compare_models(a: Any, b: Any, *, threads: int | None = None) -> ModelComparison:
    """b against a, tensor by tensor."""
    first, second = _called(a, "a"), _called(b, "b")
    pool = ExpertPool.of({first: a, (second if second != first else f"{second} (again)"): b}, None, located)
    one, other = pool.experts
    mine, theirs = one.weights.entries, other.weights.entries
    shared = [name for name in mine if name in theirs]
    found = ModelComparison(first, second, 0, [])
    found.only_a = sorted((name for name in mine if name not in theirs), key=natural)
    found.only_b = sorted((name for name in theirs if name not in mine), key=natural)
    same: list[str] = []
    for name in sorted(shared, key=natural):
        x, y = mine[name], theirs[name]
        if x.dtype != y.dtype:
            found.dtypes.append({"name": name, "a": x.dtype.torch_name, "b": y.dtype.torch_name})
        if x.shape != y.shape:
            found.shapes.append({"name": name, "a": list(x.shape), "b": list(y.shape)})
        else:
            same.append(name)
    differences = _read(pool, same, threads or cores())
    found.equal = sum(d.share == 0 for d in differences)
    moved = [d for d in differences if d.share > 0]
    found.tensors = sorted(moved, key=lambda d: -math.inf if d.relative is None else -d.relative)
    return found


def _read(pool: ExpertPool, names: list[str], threads: int) -> list[Difference]:
    """Every tensor of both models, in blocks on worker threads; results in the order of `names`."""
    one, other = pool.experts
    found, lock = dict[str, Difference](), threading.Lock()
    entries = one.weights.entries
    if names:
        torch.get_num_threads()  # load torch before the threads start

    def work(name: str, stop: threading.Event) -> None:
        difference = _difference(name, entries[name], _planes(name, (one, other)), stop)
        with lock:
            found[name] = difference

    if names:
        with pool.opened():
            in_parallel(sorted(names, key=lambda n: -entries[n].numel), work, threads)
    return [found[name] for name in names]


def _planes(name: str, models: tuple[Expert, Expert]) -> list[Plane]:
    return [model.weights.plane(name, model.name) for model in models]


def _difference(name: str, entry: Entry, planes: list[Plane], stop: threading.Event) -> Difference:
    """Block by block, in fp64. NaN equals NaN."""
    differ, first, largest, apart, length = 0, None, 0.0, 0.0, 0.0
    for start, x, y in _blocks(entry.numel, planes, stop):
        length += float(x @ x)
        unequal = (x != y) & ~(x.isnan() & y.isnan())
        if bool(unequal.any()):
            first = start + int(unequal.nonzero()[0]) if first is None else first
            differ += int(unequal.sum())
            gap = (y - x)[unequal]
            largest = max(largest, float(gap.abs().nan_to_num(math.inf).max()))
            apart += float(gap @ gap)
    relative = 0.0 if differ == 0 else math.sqrt(apart / length) if length > 0 else math.inf
    numbers = [value if math.isfinite(value) else None for value in (largest, relative)]
    return Difference(name, entry.numel, *numbers, share=differ / max(entry.numel, 1), first=first)


def _blocks(numel: int, planes: list[Plane], stop: threading.Event) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(start, a, b). Integers become fp64 too: exact below 2^53."""
    for start in range(0, numel, BLOCK):
        if stop.is_set():
            raise Stopped
        end = min(start + BLOCK, numel)
        pair = torch.empty(2, end - start, dtype=torch.float64)
        for row, plane in enumerate(planes):
            plane.read(start, end, pair[row])
        yield start, pair[0], pair[1]
