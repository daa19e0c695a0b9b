"""Examples of a task: inputs that can be drawn by place, with labels only where a method asks for them.

Drawing is by place and by named randomness, so that a resumed run sees the batches an uninterrupted one would have seen.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


class Examples:
    """Inputs of one task and, where given, their labels [n].

    `inputs` is a tensor [n, ...], a mapping of tensors [n, ...] (passed by keyword), a tuple of them (by position), or
    a sequence of single inputs, as map-style data sets are; items that are pairs count as (input, label) and their label
    is not looked at.
    """

    def __init__(self, inputs: Any, labels: Tensor | None = None, *, places: np.ndarray | None = None, name: str = ""):
        self.inputs, self.labels, self.name = inputs, labels, name
        self._places = np.arange(_count(inputs, name)) if places is None else places
        self._latest: tuple[Any, Any] = (None, None)  # key and order of the latest epoch
        if labels is not None and len(labels) != _count(inputs, name):
            what = f"{len(labels)} labels for {_count(inputs, name)} inputs"
            raise SpoliaError(what, where=name or "examples", mend="give one label an input")

    @classmethod
    def of(cls, given: Any, name: str) -> Examples:
        """`given` as it is if it already is Examples."""
        return given if isinstance(given, cls) else cls(given, name=name)

    def __len__(self) -> int:
        return len(self._places)

    def batch(self, places: Sequence[int] | np.ndarray) -> Any:
        """The inputs at `places` (0 … n-1) as one batch, on the device where the inputs lie."""
        return _taken(self.inputs, self._places[np.asarray(places, dtype=np.int64)])

    def labels_at(self, places: Sequence[int] | np.ndarray) -> Tensor:
        """Their labels [batch]."""
        if self.labels is None:
            raise SpoliaError("no labels are given", where=self.name or "examples", mend="Examples(inputs, labels)")
        return self.labels[torch.from_numpy(self._places[np.asarray(places, dtype=np.int64)])]

    def draw(self, count: int, seed: int, step: int) -> Any:
        """The batch of step `step`: epochs without repetition, each in an order of its own."""
        return self.batch(self.drawn(count, seed, step))

    def drawn(self, count: int, seed: int, step: int) -> np.ndarray:
        """The places of that batch; `count` of them, or all where there are fewer."""
        total = len(self)
        count = min(count, total)
        start = step * count
        epochs = range(start // total, (start + count - 1) // total + 1)
        orders = [self._order(seed, epoch) for epoch in epochs]
        low = start - epochs[0] * total
        return np.concatenate(orders)[low : low + count]

    def _order(self, seed: int, epoch: int) -> np.ndarray:
        """All places in the order of an epoch; the last one is remembered, for its steps ask for it again and again."""
        key = (seed, self.name, epoch)
        if self._latest[0] != key:
            self._latest = key, generator(seed, "examples", self.name, epoch).permutation(len(self))
        return self._latest[1]

    def split(self, share: float, seed: int) -> tuple[Examples, Examples]:
        """The rest, and `share` of the examples (at least one, if share > 0), drawn at random."""
        order = generator(seed, "held out", self.name).permutation(len(self))
        held = min(max(round(share * len(self)), int(share > 0)), len(self) - 1)
        parts = np.sort(order[held:]), np.sort(order[:held])
        rest, kept = (Examples(self.inputs, self.labels, places=self._places[p], name=self.name) for p in parts)
        return rest, kept

    def prints(self) -> list[bytes]:
        """A digest of every input; equal ones are equal bit for bit."""
        return [hashlib.blake2b(_raw(self.batch([i])), digest_size=16).digest() for i in range(len(self))]

    def first(self, count: int | None) -> Examples:
        """The first `count` of them; all where it is None or larger."""
        return Examples(self.inputs, self.labels, places=self._places[:count], name=self.name)


def by_task(given: Mapping[str, Any], tasks: Sequence[str], where: str = "unlabelled") -> dict[str, Examples]:
    """Examples of every task in the order of `tasks`; SpoliaError names what is missing or unknown."""
    missing = [task for task in tasks if task not in given]
    unknown = [task for task in given if task not in tasks]
    if missing or unknown:
        said = [f"nothing for {', '.join(missing)}"] if missing else []
        said += [f"{', '.join(unknown)} is no expert's task"] if unknown else []
        raise SpoliaError("; ".join(said), where=where, mend=f"give inputs for {', '.join(tasks)}")
    found = {task: Examples.of(given[task], task) for task in tasks}
    for task, examples in found.items():
        examples.name = examples.name or task
        if not len(examples):
            raise SpoliaError("is empty", where=f"{where}.{task}", mend="give inputs of that task")
    return found


def _count(inputs: Any, name: str) -> int:
    where = name or "examples"
    if isinstance(inputs, Mapping | tuple):
        counts = {len(part) for part in (inputs.values() if isinstance(inputs, Mapping) else inputs)}
        if len(counts) != 1:
            raise SpoliaError(f"its parts hold {sorted(counts)} inputs", where=where, mend="give tensors of one length")
        return counts.pop()
    if not hasattr(inputs, "__len__") or not hasattr(inputs, "__getitem__"):
        raise SpoliaError(
            f"a {type(inputs).__name__} cannot be drawn from by place",
            where=where,
            mend="give a tensor, a mapping of tensors or a map-style data set: list(loader.dataset) makes one",
        )
    return len(inputs)


def _taken(inputs: Any, places: np.ndarray) -> Any:
    if torch.is_tensor(inputs):
        return inputs[torch.from_numpy(places).to(inputs.device)]
    if isinstance(inputs, np.ndarray):
        return torch.from_numpy(inputs[places])
    if isinstance(inputs, Mapping):
        return {name: _taken(part, places) for name, part in inputs.items()}
    if isinstance(inputs, tuple):
        return tuple(_taken(part, places) for part in inputs)
    items = [inputs[int(place)] for place in places]
    return torch.utils.data.default_collate([item[0] if isinstance(item, tuple) else item for item in items])


def _raw(batch: Any) -> bytes:
    if isinstance(batch, Mapping):
        return b"".join(_raw(batch[name]) for name in sorted(batch))
    if isinstance(batch, tuple):
        return b"".join(map(_raw, batch))
    return batch.cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
