"""Streams: experiences one after the other, each with the data that a learner gets to see and the test that judges it.

    stream = class_incremental((x, y), (test_x, test_y), tasks=5)
    for experience in stream.experiences:
        batch = experience.batch(places)             # Batch(x, y), y in global label ids

Label ids are global: `order[i]` is the raw label that has id i, and experience t of a class-incremental stream owns a
contiguous range of ids. Everything drawn (class order, permutations, angles, the few shots, the blur) comes from
generators named by the stream's seed, and is stored in it: a stream is the same whatever ran before.

| scenario | inputs | labels | task id in training | judged by |
|---|---|---|---|---|
| class | change | grow | yes, through `begin` and `end` | largest logit of the classes seen |
| task | change | grow | yes, also when judged | largest logit of the task's own classes: the same run as `class` |
| domain | change | stay | yes | largest logit |
| free | change by and by | any | no: one experience, in the stream's order, once | largest logit of the classes seen |
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import Problems, SpoliaError
from spolia.parts.examples import Examples

if TYPE_CHECKING:
    from torch import Tensor

    Change = Callable[[Tensor], Tensor]  # inputs [n, ...] of a domain as it shows them


class Batch(NamedTuple):
    """Inputs as they are stored, and their global label ids [n]."""

    x: Any
    y: Tensor


@dataclass(frozen=True, eq=False)
class Part:
    """Examples with labels: those at `places` of inputs that several parts may share, shown as `change` has it."""

    inputs: Any
    labels: Tensor  # global ids, of all inputs
    places: np.ndarray
    change: Change | None = None

    def __len__(self) -> int:
        return len(self.places)

    def batch(self, which: np.ndarray | slice) -> Batch:
        """The examples at these of its places."""
        at = torch.from_numpy(self.places[which])
        y = self.labels.index_select(0, at.to(self.labels.device))
        if torch.is_tensor(self.inputs):
            x = self.inputs.index_select(0, at.to(self.inputs.device))
        else:
            x = Examples(self.inputs).batch(at.numpy())
        return Batch(x if self.change is None else self.change(x), y)


@dataclass(frozen=True, eq=False)
class Experience:
    """What a learner sees of the stream at a time. `classes`: the ids of its labels."""

    place: int
    name: str
    train: Part
    classes: tuple[int, ...]
    task: int | None  # None where no task is told
    ordered: bool = False  # examples come in this order, once: the stream has no epochs

    def steps(self, batch: int, epochs: float) -> int:
        return max(1, math.ceil((1 if self.ordered else epochs) * len(self.train) / batch))

    def batch(self, which: np.ndarray | slice) -> Batch:
        return self.train.batch(which)

    def draw(self, batch: int, seed: int, step: int) -> Batch:
        """The batch of step `step`: epochs without repetition, each in an order of its own, or the stream's order."""
        if self.ordered:
            return self.train.batch(slice(step * batch, (step + 1) * batch))
        return self.train.batch(_drawn(self, batch, seed, step))


@dataclass(frozen=True, eq=False)
class Test:
    """What judges: examples, and the classes among which a task-incremental learner has to choose."""

    name: str
    examples: Part
    classes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Stream:
    """`classes`: number of label ids in all. `tests[j]` goes with the data of experience j, or with task j of a free stream."""

    scenario: str
    experiences: tuple[Experience, ...]
    tests: tuple[Test, ...]
    classes: int
    order: tuple[int, ...]  # raw label of every id
    seed: int

    def __len__(self) -> int:
        return len(self.experiences)

    def about(self) -> dict[str, Any]:
        """What makes two runs comparable: for ledgers."""
        sizes = [len(e.train) for e in self.experiences]
        about = {"scenario": self.scenario, "experiences": [e.name for e in self.experiences], "sizes": sizes}
        return about | {"classes": self.classes, "order": list(self.order), "seed": self.seed}

    def without_boundaries(self, blur: float = 0.0) -> Stream:
        """One pass over the same examples without tasks or ends: tasks in turn, each shuffled.

        `blur`: deviation, in shares of a task's length, of the noise added to every example's time, so that tasks overlap.
        """
        draws = generator(self.seed, "stream", "free")
        parts = [e.train for e in self.experiences]
        order = [draws.permutation(len(part)) for part in parts]
        times = np.concatenate([t + (np.arange(len(part)) + 0.5) / len(part) for t, part in enumerate(parts)])
        if blur:
            times = times + blur * draws.standard_normal(len(times))
        by_time = np.argsort(times, kind="stable")
        if all(p.inputs is parts[0].inputs and p.change is parts[0].change for p in parts):
            places = np.concatenate([part.places[own] for part, own in zip(parts, order, strict=True)])[by_time]
            train = replace(parts[0], places=places)
        else:
            shown = [part.batch(own) for part, own in zip(parts, order, strict=True)]
            x = torch.cat([batch.x for batch in shown])
            train = Part(x, torch.cat([batch.y for batch in shown]), by_time)
        classes = tuple(sorted({c for e in self.experiences for c in e.classes}))
        return replace(self, scenario="free", experiences=(Experience(0, "free", train, classes, None, True),))


# --- making them -----------------------------------------------------------------------------------------------------


def class_incremental(
    train: Any,
    test: Any,
    tasks: int | Sequence[int],
    *,
    order: Sequence[int] | None = None,
    shuffle: bool = False,
    shots: int | None = None,
    seed: int = 0,
) -> Stream:
    """New classes by and by. `train`, `test`: (inputs, labels) or Examples with labels.

    `tasks`: how many, of equally many classes, or the number of classes of each. `order`: raw labels in the order of their
    ids; by default that of the labels themselves, or a random one (`shuffle`). `shots`: examples of a class from the second
    experience on (few-shot class-incremental), drawn at random.
    """
    train, test = _labelled(train, "train"), _labelled(test, "test")
    raw = np.unique(train.labels.numpy())
    if order is None:
        order = [int(label) for label in (generator(seed, "stream", "classes").permutation(raw) if shuffle else raw)]
    sizes = _sizes(tasks, len(raw))
    _check_order(order, raw, np.unique(test.labels.numpy()), sizes)
    train, test = _renamed(train, order), _renamed(test, order)
    bounds = [0, *np.cumsum(sizes).tolist()]
    experiences, tests = [], []
    for t, (low, high) in enumerate(pairwise(bounds)):
        classes, name = tuple(range(low, high)), f"task {t + 1}"
        own = [_of_classes(part, classes) for part in (train, test)]
        if shots is not None and t:
            own[0] = _few(own[0], shots, generator(seed, "stream", "shots", t))
        experiences.append(Experience(t, name, own[0], classes, t))
        tests.append(Test(name, own[1], classes))
    return Stream("class", tuple(experiences), tuple(tests), bounds[-1], tuple(order), seed)


def domain_incremental(
    train: Any, test: Any, changes: Mapping[str, Change | None] | Sequence[Change | None], *, seed: int = 0
) -> Stream:
    """The same classes in one domain after the other: all examples, shown as each of `changes` has it; None: as they are."""
    train, test = _labelled(train, "train"), _labelled(test, "test")
    raw = np.unique(train.labels.numpy()).tolist()
    train, test = _renamed(train, raw), _renamed(test, raw)
    named = changes.items() if isinstance(changes, Mapping) else ((f"domain {t + 1}", c) for t, c in enumerate(changes))
    classes, experiences, tests = tuple(range(len(raw))), [], []
    for t, (name, change) in enumerate(named):
        experiences.append(Experience(t, name, replace(train, change=change), classes, t))
        tests.append(Test(name, replace(test, change=change), classes))
    if not experiences:
        raise SpoliaError(
            "there is no domain", where="changes", mend="give permutations(...), rotations(...) or your own"
        )
    return Stream("domain", tuple(experiences), tuple(tests), len(raw), tuple(raw), seed)


def domains(parts: Mapping[str, tuple[Any, Any]], *, seed: int = 0) -> Stream:
    """The same classes from one data set after the other: (train, test) by name, labels 0 … C - 1 in each."""
    experiences, tests, count = [], [], 0
    for t, (name, (train, test)) in enumerate(parts.items()):
        own = [_labelled(part, f"{name}.{what}") for part, what in ((train, "train"), (test, "test"))]
        count = max(count, *(int(part.labels.max()) + 1 for part in own))
        experiences.append(Experience(t, name, own[0], (), t))
        tests.append(Test(name, own[1], ()))
    classes = tuple(range(count))
    experiences = [replace(e, classes=classes) for e in experiences]
    return Stream("domain", tuple(experiences), tuple(replace(t, classes=classes) for t in tests), count, classes, seed)


# --- parts of it -----------------------------------------------------------------------------------------------------


def _drawn(experience: Experience, batch: int, seed: int, step: int) -> np.ndarray:
    """Places of that batch, as Examples.drawn has it: an epoch's rest and the next one's beginning may share a batch."""
    total = len(experience.train)
    batch = min(batch, total)
    start = step * batch
    epochs = range(start // total, (start + batch - 1) // total + 1)
    orders = [_order(experience.place, seed, epoch, total) for epoch in epochs]
    low = start - epochs[0] * total
    return orders[0][low : low + batch] if len(orders) == 1 else np.concatenate(orders)[low : low + batch]


@lru_cache(maxsize=4)  # the steps of an epoch ask for it again and again
def _order(place: int, seed: int, epoch: int, total: int) -> np.ndarray:
    return generator(seed, "stream", "epoch", place, epoch).permutation(total)


def _labelled(given: Any, name: str) -> Part:
    """`given` with every input's label. SpoliaError where there are none."""
    if isinstance(given, Examples):
        examples = given
    elif isinstance(given, tuple) and len(given) == 2:
        labels = torch.as_tensor(given[1])
        inputs = torch.from_numpy(given[0]) if isinstance(given[0], np.ndarray) else given[0]
        examples = Examples(inputs, labels, name=name)
    else:
        raise SpoliaError(f"a {type(given).__name__} is no data with labels", where=name, mend="give (inputs, labels)")
    if examples.labels is None or examples.labels.is_floating_point() or examples.labels.dim() != 1:
        raise SpoliaError("has no labels, one class number an input", where=name, mend="give (inputs, labels [n])")
    if not len(examples):
        raise SpoliaError("is empty", where=name, mend="give inputs")
    kept = examples.batch(np.arange(len(examples))) if len(examples) != len(examples.labels) else examples.inputs
    labels = examples.labels_at(np.arange(len(examples)))
    return Part(kept, labels.long(), np.arange(len(examples)))


def _renamed(part: Part, order: Sequence[int]) -> Part:
    """With ids in the place of raw labels."""
    ids = {label: i for i, label in enumerate(order)}
    return replace(part, labels=torch.tensor([ids[label] for label in part.labels.tolist()]))


def _sizes(tasks: int | Sequence[int], classes: int) -> list[int]:
    if not isinstance(tasks, int):
        return [int(size) for size in tasks]
    if tasks < 1 or classes % tasks:
        raise SpoliaError(
            f"{classes} classes into {tasks} tasks", where="tasks", mend="give the classes of each: [4, 3, 3]"
        )
    return [classes // tasks] * tasks


def _check_order(order: Sequence[int], raw: np.ndarray, tested: np.ndarray, sizes: Sequence[int]) -> None:
    problems = Problems()
    if sorted(order) != raw.tolist():
        problems.add("order", f"{list(order)[:12]}", f"give each label of the training data once: {raw.tolist()[:12]}")
    if min(sizes, default=0) < 1 or sum(sizes) != len(raw):
        problems.add(
            "tasks", f"{list(sizes)} for {len(raw)} classes", "give numbers above 0 that add up to the classes"
        )
    if unknown := sorted(set(tested.tolist()) - set(raw.tolist())):
        problems.add("test", f"labels {unknown[:5]} are in no training data", "leave them out")
    if missing := sorted(set(raw.tolist()) - set(tested.tolist())):
        problems.add("test", f"nothing of labels {missing[:5]}", "give a test of every class")
    problems.raise_if_any()


def _of_classes(part: Part, classes: Sequence[int]) -> Part:
    own = np.flatnonzero(np.isin(part.labels.numpy()[part.places], np.asarray(classes)))
    return replace(part, places=part.places[own])


def _few(part: Part, shots: int, draws: np.random.Generator) -> Part:
    """`shots` examples of every class."""
    labels = part.labels.numpy()[part.places]
    chosen = []
    for label in np.unique(labels):
        own = np.flatnonzero(labels == label)
        if len(own) < shots:
            what = f"{len(own)} examples of class {label} for {shots} shots"
            raise SpoliaError(what, where="shots", mend="give fewer")
        chosen.append(draws.choice(own, shots, replace=False))
    return replace(part, places=part.places[np.sort(np.concatenate(chosen))])
