"""Where a distillation's batches come from: examples drawn by place, or a loader that is read epoch after epoch.

Both give the same batches after a kill: places follow from seed and number; a loader is read again up to where it was,
under random numbers that follow from seed, epoch and position. What draws from elsewhere (numpy's or Python's own global
generator, persistent workers) is not covered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.dist import rows_in, rows_of
from spolia.core.lazy import np, torch
from spolia.core.seeds import entropy
from spolia.errors import SpoliaError
from spolia.parts.examples import Examples
from spolia.parts.network import moved

if TYPE_CHECKING:
    from torch import Tensor

_SEEDS = 1 << 63  # manual_seed takes no more


@dataclass(frozen=True)
class Batch:
    """Inputs of a model (a tensor, a mapping or a tuple of tensors) and, where given, their labels [batch, ...]."""

    inputs: Any
    labels: Tensor | None = None

    def __len__(self) -> int:
        return rows_in(self.inputs)

    def rows(self, which: slice) -> Batch:
        """Some of its inputs, with their labels."""
        return Batch(rows_of(self.inputs, which), None if self.labels is None else self.labels[which])

    def pieces(self, most: int | None) -> list[Batch]:
        """Itself in parts of at most `most` inputs."""
        size = most or max(1, len(self))
        return [self.rows(slice(i, i + size)) for i in range(0, len(self), size)]

    def to(self, device: torch.device) -> Batch:
        return Batch(moved(self.inputs, device), None if self.labels is None else self.labels.to(device))


class Places:
    """Examples drawn `count` at a time, each epoch in an order of its own."""

    def __init__(self, examples: Examples, count: int, seed: int):
        self.examples, self.count, self.seed = examples, min(count, len(examples)), seed
        self.state = {"batches": 0}
        self.per_epoch: float | None = len(examples) / self.count
        self.size: int | None = len(examples)
        self.shared = False  # every process could draw all of them

    def next(self, rank: int, ranks: int) -> Batch:
        """This process's share of the next batch, which may be empty."""
        places = self.examples.drawn(self.count, self.seed, self.state["batches"])[rank::ranks]
        self.state["batches"] += 1
        return self._at(places)

    def once(self) -> Iterator[Batch]:
        """All of them in order."""
        for start in range(0, len(self.examples), self.count):
            yield self._at(np.arange(start, min(start + self.count, len(self.examples))))

    def first(self) -> Batch:
        return self._at(np.arange(self.count))

    def _at(self, places: np.ndarray) -> Batch:
        labels = None if self.examples.labels is None else self.examples.labels_at(places)
        return Batch(self.examples.batch(places), labels)


class Loader:
    """An iterable of batches that can be read again and again, as a DataLoader or a list of batches.

    With several processes each takes its share of every batch's rows; with a DistributedSampler batches are shares already.
    """

    def __init__(self, given: Any, seed: int):
        self.given, self.seed = given, seed
        self.state = {"epoch": 0, "position": 0}
        self.per_epoch: float | None = len(given) if hasattr(given, "__len__") else None
        self.size: int | None = len(given.dataset) if hasattr(getattr(given, "dataset", None), "__len__") else None
        self.shared = isinstance(getattr(given, "sampler", None), torch.utils.data.DistributedSampler)
        self._reading: Iterator[Any] | None = None

    def next(self, rank: int, ranks: int) -> Batch:
        """This process's share of the next batch. To be called where the global random state may be set."""
        epoch, at = self.state["epoch"], self.state["position"]
        if self._reading is None:
            self._reading = self._begun(epoch)
            for position in range(at):  # after a kill: what was read before
                self._drawn(self._reading, epoch, position)
        item = self._drawn(self._reading, epoch, at)
        if item is None:
            if not at:
                raise _empty()
            self.state.update(epoch=epoch + 1, position=0)
            self._reading = None
            return self.next(rank, ranks)
        self.state["position"] += 1
        return item if self.shared or ranks == 1 else item.rows(slice(rank, None, ranks))

    def once(self) -> Iterator[Batch]:
        """One pass over all batches, in the same order every time."""
        reading, position = self._begun(0), 0
        while (batch := self._drawn(reading, 0, position)) is not None:
            yield batch
            position += 1

    def first(self) -> Batch:
        for item in self.given:
            return split(item)
        raise _empty()

    def _begun(self, epoch: int) -> Iterator[Any]:
        if hasattr(sampler := getattr(self.given, "sampler", None), "set_epoch"):
            sampler.set_epoch(epoch)
        for owner in (self.given, sampler):
            if isinstance(own := getattr(owner, "generator", None), torch.Generator):
                own.manual_seed(self._seed(epoch))
        torch.default_generator.manual_seed(self._seed(epoch))
        return iter(self.given)

    def _drawn(self, reading: Iterator[Any], epoch: int, position: int) -> Batch | None:
        torch.default_generator.manual_seed(self._seed(epoch, position))
        item = next(reading, None)
        return None if item is None else split(item)

    def _seed(self, *names: int) -> int:
        return entropy(self.seed, "loader", *names) % _SEEDS


def source(given: Any, count: int, seed: int, where: str) -> Places | Loader:
    """What the user gave as one of both: Examples, inputs with labels, a mapping of tensors, or batches to iterate over."""
    if isinstance(given, Mapping):
        rest = {name: part for name, part in given.items() if name != "labels"}
        given = Examples(rest, given.get("labels"))
    elif torch.is_tensor(given):
        given = Examples(given)
    elif isinstance(given, tuple) and len(given) == 2 and (given[1] is None or torch.is_tensor(given[1])):
        given = Examples(*given)
    if isinstance(given, Examples):
        if not len(given):
            raise _empty(where)
        return Places(given, count, seed)
    if isinstance(given, Iterator):
        mend = "give a list of batches, a DataLoader, or tensors (inputs, labels)"
        raise SpoliaError("an iterator can be read only once", where=where, mend=mend)
    if isinstance(given, torch.utils.data.Dataset) or not hasattr(given, "__iter__"):
        mend = "give a DataLoader, tensors (inputs, labels), or Examples"
        raise SpoliaError(f"a {type(given).__name__} gives no batches", where=where, mend=mend)
    if hasattr(given, "__len__") and not len(given):
        raise _empty(where)
    return Loader(given, seed)


def seeded(device: torch.device, seed: int, *names: object) -> None:
    """Set the global random state of processor and `device`, from which dropout draws."""
    number = entropy(seed, *names) % _SEEDS
    torch.default_generator.manual_seed(number)  # torch.manual_seed notes the whole call stack where there is no GPU
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.manual_seed(number)


def split(item: Any) -> Batch:
    """One item of a loader: (inputs, labels), inputs alone, or a mapping in which `labels` are the labels."""
    if isinstance(item, Mapping):
        return Batch({name: part for name, part in item.items() if name != "labels"}, item.get("labels"))
    if isinstance(item, list | tuple):
        if len(item) == 2:
            return Batch(item[0], item[1])
        if len(item) != 1:
            mend = "give (inputs, labels), or a mapping; several inputs as ((first, second), labels)"
            raise SpoliaError(f"an item of {len(item)} parts", where="loader", mend=mend)
        item = item[0]
    return Batch(item)


def _empty(where: str = "loader") -> SpoliaError:
    return SpoliaError("gives no batches", where=where, mend="look at its data set; `drop_last` may leave nothing")
