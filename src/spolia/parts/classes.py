"""Inputs by class, from which episodes are drawn: splits by class or superclass, turns as classes, several sets as one."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import Problems, SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class ClassSet:
    """Inputs [n, ...] and, for every class, where its own stand. Sets made from others share their inputs.

    `support` and `query` [classes, most] hold places in `inputs`, filled up with -1. They are one array unless some
    inputs may only be queries. `origins` tells turns of one class from other classes; `turns` are quarter turns to the
    left, made when inputs are taken.
    """

    inputs: Tensor
    names: tuple[str, ...]
    support: np.ndarray
    query: np.ndarray
    origins: np.ndarray
    turns: np.ndarray
    superclasses: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        inputs: Tensor | np.ndarray,
        labels: Tensor | np.ndarray | Sequence[int],
        names: Sequence[str] | None = None,
        *,
        superclasses: Sequence[str] | None = None,
        queries: Tensor | np.ndarray | None = None,
        where: str = "classes",
    ) -> ClassSet:
        """A set of inputs with labels [n]: places in `names`, or, without names, any whole numbers.

        `superclasses`: one word a class, such as its alphabet. `queries` [n], true or false: the inputs marked so are
        queries only and the others support only, for sets where two inputs may show one thing.
        """
        held = torch.from_numpy(inputs) if isinstance(inputs, np.ndarray) else inputs
        own = np.asarray(labels.cpu() if torch.is_tensor(labels) else labels)
        _check(held, own, names, superclasses, where)
        if names is None:
            found, own = np.unique(own, return_inverse=True)
            names = [str(value) for value in found.tolist()]
        count = len(names)
        if queries is None:
            support = query = _places(own, np.arange(len(own)), count)
        else:
            marked = np.asarray(queries.cpu() if torch.is_tensor(queries) else queries, dtype=bool)
            support, query = (_places(own[part], part, count) for part in map(np.flatnonzero, (~marked, marked)))
        above = None if superclasses is None else tuple(superclasses)
        turns = np.zeros(count, dtype=np.int64)
        return cls(held, tuple(names), support, query, np.arange(count), turns, above)

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.inputs.shape[1:])

    @property
    def apart(self) -> bool:
        """Whether support and queries come from different inputs altogether."""
        return self.query is not self.support

    @property
    def smallest(self) -> int:
        """The fewest inputs that a class has, support and queries together."""
        sizes = _sizes(self.support) + (_sizes(self.query) if self.apart else 0)
        return int(sizes.min(initial=len(self.inputs)))

    @property
    def key(self) -> str:
        """A digest of the classes, their places and the first input of each."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update("\0".join(self.names).encode())
        for part in (self.support, self.query, self.origins, self.turns):
            digest.update(np.ascontiguousarray(part, dtype=np.int64).tobytes())
        first = self.inputs[torch.from_numpy(self.support[:, 0]).to(self.inputs.device)].cpu().contiguous()
        digest.update(
            f"{first.dtype} {tuple(first.shape)}".encode() + first.view(-1).view(torch.uint8).numpy().tobytes()
        )
        return digest.hexdigest()

    def pick(self, classes: Sequence[int] | np.ndarray) -> ClassSet:
        """The classes at these places, in this order."""
        chosen = np.asarray(classes, dtype=np.int64)
        support = self.support[chosen]
        return replace(
            self,
            names=tuple(self.names[i] for i in chosen),
            support=support,
            query=self.query[chosen] if self.apart else support,
            origins=self.origins[chosen],
            turns=self.turns[chosen],
            superclasses=None if self.superclasses is None else tuple(self.superclasses[i] for i in chosen),
        )

    def split(self, shares: Sequence[float], seed: int = 0, by: str = "class") -> tuple[ClassSet, ...]:
        """Sets that share no class, or no superclass; `shares` are of the number of those. Turns stay with their class."""
        if by not in ("class", "superclass") or (by == "superclass" and self.superclasses is None):
            known = "class" if self.superclasses is None else "class or superclass"
            raise SpoliaError(f"cannot split by `{by}`", where="split", mend=f"give by={known}")
        if min(shares) <= 0 or sum(shares) > 1 + 1e-9:
            raise SpoliaError(f"{tuple(shares)}", where="shares", mend="give numbers above 0, in sum at most 1")
        units = self.origins if by == "class" else np.unique(np.array(self.superclasses), return_inverse=True)[1]
        own = np.unique(units)
        order = generator(seed, "classes", "split", by).permutation(own)
        bounds = np.rint(np.cumsum([0.0, *shares]) * len(own)).astype(int)
        if (np.diff(bounds) < 1).any():
            what = f"{len(own)} of them do not go into {tuple(shares)}: a part would be empty"
            raise SpoliaError(what, where=f"split by {by}", mend="give other shares")
        parts = (order[low:high] for low, high in pairwise(bounds))
        return tuple(self.pick(np.flatnonzero(np.isin(units, part))) for part in parts)

    def turned(self, turns: int = 4) -> ClassSet:
        """Each class once for every quarter turn 0 … turns - 1 (Santoro et al. 2016): class c, turn t at c * turns + t."""
        if not 1 <= turns <= 4 or len(self.shape) < 2 or self.shape[-1] != self.shape[-2] or self.turns.any():
            what = f"{turns} quarter turns of inputs of shape {list(self.shape)}"
            what += ", turned already" if self.turns.any() else ""
            raise SpoliaError(what, where="turned", mend="give 1 to 4, once, and square images")
        many = self.pick(np.repeat(np.arange(len(self)), turns))
        turn = np.tile(np.arange(turns), len(self))
        names = tuple(f"{name}, turned {t}" if t else name for name, t in zip(many.names, turn.tolist(), strict=True))
        return replace(many, names=names, turns=turn)

    def to(self, device: Any) -> ClassSet:
        """The same with its inputs on `device`."""
        return replace(self, inputs=self.inputs.to(device))

    def taken(self, classes: np.ndarray, places: np.ndarray) -> Tensor:
        """The inputs at `places` [..., classes, items] of `classes` [..., classes], turned. [..., classes, items, ...]"""
        at = torch.from_numpy(places.reshape(-1)).to(self.inputs.device)
        found = self.inputs.index_select(0, at).view(classes.size, places.shape[-1], *self.shape)
        turns = self.turns[classes].reshape(-1)
        for turn in range(1, 4):
            if (rows := np.flatnonzero(turns == turn)).size:
                which = torch.from_numpy(rows).to(found.device)
                found.index_copy_(0, which, torch.rot90(found.index_select(0, which), turn, (-2, -1)))
        return found.view(*places.shape, *self.shape)


def joined(sets: Mapping[str, ClassSet]) -> ClassSet:
    """The classes of several sets as one, so that an episode may mix them; the superclass is the set's name."""
    parts = list(sets.values())
    if len({(part.shape, part.inputs.dtype) for part in parts}) != 1:
        said = ", ".join(f"{name} {list(p.shape)} {p.inputs.dtype}" for name, p in sets.items())
        raise SpoliaError(f"inputs differ: {said}", where="joined", mend="read them in one size with equal channels")
    apart = parts[0].apart
    if any(part.apart != apart for part in parts):
        what = f"only {', '.join(name for name, part in sets.items() if part.apart)} keep queries apart"
        raise SpoliaError(what, where="joined", mend="keep them apart in all sets, or in none")
    starts = np.cumsum([0, *(len(part.inputs) for part in parts)])
    support = _stacked([_moved(part.support, start) for part, start in zip(parts, starts, strict=False)])
    query = _stacked([_moved(part.query, start) for part, start in zip(parts, starts, strict=False)])
    firsts = np.cumsum([0, *(int(part.origins.max()) + 1 for part in parts)])
    return ClassSet(
        torch.cat([part.inputs for part in parts]),
        tuple(f"{name}/{own}" for name, part in sets.items() for own in part.names),
        support,
        query if apart else support,
        np.concatenate([part.origins + first for part, first in zip(parts, firsts, strict=False)]),
        np.concatenate([part.turns for part in parts]),
        tuple(name for name, part in sets.items() for _ in part.names),
    )


def _check(inputs: Any, labels: np.ndarray, names: Any, superclasses: Any, where: str) -> None:
    problems = Problems()
    if not torch.is_tensor(inputs):
        problems.add(where, f"inputs are a {type(inputs).__name__}", "give a tensor or an array [n, ...]")
    elif labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer) or len(labels) != len(inputs):
        what = f"labels {list(labels.shape)} of {labels.dtype} for {len(inputs)} inputs"
        problems.add(where, what, "give one whole number an input")
    elif not len(labels):
        problems.add(where, "there are no inputs", "give some")
    elif names is not None and not 0 <= labels.min() <= labels.max() < len(names):
        what = f"labels from {labels.min()} to {labels.max()} for {len(names)} names"
        problems.add(where, what, "labels are places in the names")
    elif names is not None and (empty := np.flatnonzero(np.bincount(labels, minlength=len(names)) == 0)).size:
        what = f"no inputs of {', '.join(str(names[i]) for i in empty[:5])}{' …' if empty.size > 5 else ''}"
        problems.add(where, what, "leave those names out")
    elif superclasses is not None and len(superclasses) != (len(np.unique(labels)) if names is None else len(names)):
        problems.add(where, f"{len(superclasses)} superclasses", "give one a class")
    problems.raise_if_any()


def _places(labels: np.ndarray, places: np.ndarray, classes: int) -> np.ndarray:
    """Places of every class [classes, most], filled up with -1."""
    sizes = np.bincount(labels, minlength=classes)
    table = np.full((classes, int(sizes.max(initial=1))), -1, dtype=np.int64)
    table[np.arange(table.shape[1]) < sizes[:, None]] = places[np.argsort(labels, kind="stable")]
    return table


def _sizes(table: np.ndarray) -> np.ndarray:
    return (table >= 0).sum(1)


def _moved(table: np.ndarray, start: int) -> np.ndarray:
    return np.where(table >= 0, table + start, -1)


def _stacked(tables: list[np.ndarray]) -> np.ndarray:
    most = max(table.shape[1] for table in tables)
    return np.concatenate([np.pad(t, ((0, 0), (0, most - t.shape[1])), constant_values=-1) for t in tables])
