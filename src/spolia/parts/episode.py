"""Episodes: small tasks of n classes, k labelled inputs of each to learn from, and queries to be judged by.

Episode i of a sampler is a function of its seed and i. So a resumed run asks for the same numbers again, and the ranks of
a run draw from one list without talking to each other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import Problems, SpoliaError
from spolia.parts.classes import ClassSet

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Episode:
    """One task. Inputs stand class by class: first those of label 0, then of label 1, …

    support_x [ways * shots, ...], support_y [ways * shots], query_x [ways * queries, ...], query_y [ways * queries];
    `classes` [ways] are the places in the set of the labels 0, 1, …
    """

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor
    number: int

    @property
    def ways(self) -> int:
        return len(self.classes)

    def floats(self) -> Episode:
        """With uint8 pixels 0 … 255 as fp32 0 … 1."""
        return replace(self, support_x=floats(self.support_x), query_x=floats(self.query_x))

    def to(self, device: Any) -> Episode:
        return _to(self, device)


@dataclass(frozen=True)
class Episodes:
    """Several of one size, stacked: as Episode, with [tasks, ...] before each shape. `sets` [tasks]: drawn from which."""

    support_x: Tensor
    support_y: Tensor
    query_x: Tensor
    query_y: Tensor
    classes: Tensor
    sets: Tensor
    numbers: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, task: int) -> Episode:
        parts = (self.support_x, self.support_y, self.query_x, self.query_y, self.classes)
        return Episode(*(part[task] for part in parts), number=self.numbers[task])

    def __iter__(self) -> Iterator[Episode]:
        return (self[task] for task in range(len(self)))

    @property
    def ways(self) -> int:
        return self.classes.shape[1]

    def floats(self) -> Episodes:
        """With uint8 pixels 0 … 255 as fp32 0 … 1."""
        return replace(self, support_x=floats(self.support_x), query_x=floats(self.query_x))

    def to(self, device: Any) -> Episodes:
        return _to(self, device)


@dataclass(frozen=True)
class Drawn:
    """What stands where: `sets` [tasks], `classes` [tasks, ways], `support` and `query` [tasks, ways, items] places."""

    sets: np.ndarray
    classes: np.ndarray
    support: np.ndarray
    query: np.ndarray


class EpisodeSampler:
    """An endless list of episodes, numbered 0, 1, …

    Classes are drawn without repetition, each as likely as any other, in random order: so labels are permuted at random.
    Turns of one class never meet. Of a class, `shots + queries` different inputs are drawn. With several sets each
    episode is of one of them, all equally likely or by `weights`.
    """

    def __init__(
        self,
        sets: ClassSet | Sequence[ClassSet],
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        weights: Sequence[float] | None = None,
    ):
        self.sets = (sets,) if isinstance(sets, ClassSet) else tuple(sets)
        self.ways, self.shots, self.queries, self.seed = ways, shots, queries, seed
        self.rank, self.of = 0, 1
        self._check(weights)
        shares = np.ones(len(self.sets)) if weights is None else np.asarray(weights, dtype=float)
        self._bounds = np.cumsum(shares / shares.sum())[:-1]
        self._key = ""

    def shard(self, rank: int, of: int) -> EpisodeSampler:
        """The same list, of which `draw` and `numbers` give only the part of `rank`: every of-th episode."""
        if not 0 <= rank < of:
            raise SpoliaError(f"rank {rank} of {of}", where="shard", mend="ranks run from 0 to of - 1")
        other = EpisodeSampler.__new__(EpisodeSampler)
        other.__dict__ |= self.__dict__ | {"rank": rank, "of": of}
        return other

    @property
    def key(self) -> str:
        """Samplers of equal keys have equal episodes. Of the inputs only the first of each class is looked at."""
        if not self._key:
            parts = (self.seed, self.ways, self.shots, self.queries, self._bounds.tolist(), [s.key for s in self.sets])
            self._key = hashlib.blake2b(repr(parts).encode(), digest_size=8).hexdigest()
        return self._key

    def numbers(self, count: int, start: int = 0) -> list[int]:
        """Of the episodes start … start + count - 1 those of this shard."""
        return [number for number in range(start, start + count) if number % self.of == self.rank]

    def draw(self, count: int, step: int) -> Episodes:
        """The `count` episodes of an outer step; a shard gets its part of them, which may be none."""
        return self.batch(self.numbers(count, step * count))

    def episode(self, number: int) -> Episode:
        """Episode `number`, whatever the shard."""
        return self.batch([number])[0]

    def batch(self, numbers: Sequence[int]) -> Episodes:
        """The episodes of these numbers, as stored: uint8 stays uint8."""
        drawn = self.drawn(numbers)
        support, query = self._inputs(drawn, drawn.support), self._inputs(drawn, drawn.query)
        labels = torch.arange(self.ways, device=support.device)
        support_y, query_y = (labels.repeat_interleave(k).expand(len(numbers), -1) for k in (self.shots, self.queries))
        classes, sets = torch.from_numpy(drawn.classes), torch.from_numpy(drawn.sets)
        return Episodes(support, support_y, query, query_y, classes, sets, tuple(map(int, numbers)))

    def drawn(self, numbers: Sequence[int]) -> Drawn:
        """Which classes and inputs are in the episodes of these numbers; no input is read."""
        tasks = len(numbers)
        sets = np.zeros(tasks, dtype=np.int64)
        classes = np.empty((tasks, self.ways), dtype=np.int64)
        places = [np.empty((tasks, self.ways, items), dtype=np.int64) for items in (self.shots, self.queries)]
        sources = [generator(self.seed, "episode", int(number)) for number in numbers]
        if len(self.sets) > 1:
            sets[:] = [np.searchsorted(self._bounds, source.random(), side="right") for source in sources]
        for which, held in enumerate(self.sets):
            tasks_here = np.flatnonzero(sets == which)
            if tasks_here.size:
                own = [sources[task] for task in tasks_here]
                chosen = np.stack([_classes(held, self.ways, source) for source in own])
                classes[tasks_here] = chosen
                for part, found in zip(places, self._places(held, chosen, own), strict=True):
                    part[tasks_here] = found
        return Drawn(sets, classes, *places)

    def _places(self, held: ClassSet, classes: np.ndarray, sources: list[Any]) -> tuple[np.ndarray, np.ndarray]:
        if held.apart:
            return _some(held.support[classes], self.shots, sources), _some(held.query[classes], self.queries, sources)
        both = _some(held.support[classes], self.shots + self.queries, sources)
        return both[..., : self.shots], both[..., self.shots :]

    def _inputs(self, drawn: Drawn, places: np.ndarray) -> Tensor:
        """[tasks, ways * items, ...]"""
        if len(self.sets) == 1:
            return self.sets[0].taken(drawn.classes, places).flatten(1, 2)
        first = self.sets[0].inputs
        found = first.new_empty((len(places), places.shape[1] * places.shape[2], *first.shape[1:]))
        for which, held in enumerate(self.sets):
            tasks = np.flatnonzero(drawn.sets == which)
            if tasks.size:
                own = held.taken(drawn.classes[tasks], places[tasks]).flatten(1, 2)
                found[torch.from_numpy(tasks).to(found.device)] = own
        return found

    def _check(self, weights: Sequence[float] | None) -> None:
        problems = Problems()
        for name, least in (("ways", 2), ("shots", 1), ("queries", 1)):
            if getattr(self, name) < least:
                problems.add(name, f"{getattr(self, name)}", f"give at least {least}")
        if not self.sets:
            problems.add("sets", "there are none", "give a ClassSet")
        for number, held in enumerate(self.sets):
            where = f"sets[{number}]" if len(self.sets) > 1 else "episodes"
            if (most := len(np.unique(held.origins))) < self.ways:
                problems.add(
                    where, f"{self.ways} ways of {most} classes", f"ask for at most {most}, or give more classes"
                )
            parts = {"shots": (held.support, self.shots), "queries": (held.query, self.queries)}
            if not held.apart:
                parts = {"shots and queries": (held.support, self.shots + self.queries)}
            for what, (table, asked) in parts.items():
                sizes = (table >= 0).sum(1)
                if len(sizes) and sizes.min() < asked:
                    said = f"{asked} {what} of `{held.names[sizes.argmin()]}`, which has {sizes.min()}"
                    problems.add(where, said, "ask for fewer, or leave out the classes that have too few")
        if len({(held.shape, held.inputs.dtype, held.inputs.device) for held in self.sets}) > 1:
            said = ", ".join(f"{list(held.shape)} {held.inputs.dtype}" for held in self.sets)
            problems.add("sets", f"inputs differ: {said}", "read all in one size, channels and type, on one device")
        bad = weights is not None and (len(weights) != len(self.sets) or min(weights) < 0 or sum(weights) <= 0)
        if bad:
            problems.add("weights", f"{weights} for {len(self.sets)} sets", "give one number, not below 0, a set")
        problems.raise_if_any()


def floats(pixels: Tensor) -> Tensor:
    """uint8 0 … 255 as fp32 0 … 1; what is not uint8 stays as it is."""
    return pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels


def _to(episodes: Any, device: Any) -> Any:
    moved = {n: v.to(device, non_blocking=True) for n, v in vars(episodes).items() if torch.is_tensor(v)}
    return replace(episodes, **moved)


def _classes(held: ClassSet, ways: int, source: np.random.Generator) -> np.ndarray:
    """`ways` classes of different origins in random order; where two met, the first of each origin in a random order."""
    first = source.choice(len(held), ways, replace=False)
    if len(set(held.origins[first].tolist())) == ways:
        return first
    order = source.permutation(len(held))
    places = np.unique(held.origins[order], return_index=True)[1]
    return order[np.sort(places)[:ways]]


def _some(table: np.ndarray, count: int, sources: list[Any]) -> np.ndarray:
    """`count` different places of every row, in random order. table [tasks, ways, most] -> [tasks, ways, count]

    Every place gets a random key; the smallest keys win.
    """
    keys = np.stack([source.random(table.shape[1:]) for source in sources])
    keys[table < 0] = 2.0  # above all that are drawn
    if count < table.shape[-1]:
        winners = np.argpartition(keys, count - 1, axis=-1)[..., :count]
    else:
        winners = np.broadcast_to(np.arange(count), (*table.shape[:-1], count))
    order = np.argsort(np.take_along_axis(keys, winners, -1), axis=-1)
    return np.take_along_axis(table, np.take_along_axis(winners, order, -1), -1)
