"""Memory: a bounded store of past samples, from which batches are drawn.

    memory = Memory(500, seed=0)
    memory.add(x=x, y=y, logits=logits)          # tensors [n, ...] of one length; the names are the caller's
    old = memory.draw(32)                        # {"x": [32, ...], "y": [32], "logits": [32, C]}

What is given is what is kept, in its own type and on its own device: uint8 images stay uint8 until a learner looks at them.
Three ways to choose what stays:

| policy | law |
|---|---|
| reservoir | all samples of the stream stay with the same probability M / N (Vitter 1985, doi:10.1145/3147.3165) |
| balanced | as many of each class as fit: a new sample replaces one of a largest class, unless its own is one (GDumb) |
| chosen | none by itself: the caller uses `put` and `keep`, as herding does |

The reservoir takes a batch at once: all its slots are drawn together and the last writer of a slot wins, which is in law what
one sample after the other gives. `state_dict` holds samples, counters and random numbers, so a resumed run has the same bits.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

Policy = Literal["reservoir", "balanced", "chosen"]


class Memory:
    """At most `items` samples, and where `bytes` is given, no more than fit into it."""

    def __init__(
        self,
        items: int | None = None,
        *,
        bytes: int | None = None,
        policy: Policy = "reservoir",
        seed: int = 0,
        device: torch.device | str | None = None,
    ):
        if (items is None and bytes is None) or min(n for n in (items, bytes) if n is not None) < 0:
            raise SpoliaError(
                f"items={items}, bytes={bytes}", where="memory", mend="give a number of items, of bytes, or both"
            )
        self.items, self.bytes, self.policy, self.device = items, bytes, policy, device
        self.seen = 0  # samples of the stream so far
        self.fields: dict[str, Tensor] = {}  # [capacity, ...] each; the first len(self) rows count
        self.capacity = 0  # samples that fit; known from the first samples on
        self._count = 0
        self._labels: list[int] = []  # of the samples held, where the policy is balanced
        self.draws = generator(seed, "memory")

    def __len__(self) -> int:
        return self._count

    @property
    def held(self) -> int:
        """Bytes of the samples held."""
        return sum(t[: self._count].numel() * t.element_size() for t in self.fields.values())

    def add(self, **given: Tensor) -> None:
        """Show the samples of a batch, tensors [n, ...] of one length. `balanced` goes by their `y`."""
        if self.policy == "chosen":
            raise SpoliaError("its samples are chosen by the caller", where="memory", mend="use put() and keep()")
        count = self._checked(given)
        if self.policy == "balanced":
            slots, rows = self._greedily(given["y"])
        else:
            slots, rows = self._by_reservoir(count)
        self.seen += count
        self._write(slots, rows, given)

    def put(self, **given: Tensor) -> None:
        """Append samples, in their order. They must fit."""
        count = self._checked(given)
        if self._count + count > self.capacity:
            what = f"{count} samples beside {self._count} in a memory of {self.capacity}"
            raise SpoliaError(what, where="memory", mend="keep() fewer first")
        self._write(range(self._count, self._count + count), range(count), given)

    def keep(self, places: Tensor | list[int]) -> None:
        """Drop all samples but those at `places`, in that order."""
        at = torch.as_tensor(places, dtype=torch.int64)
        for held in self.fields.values():
            held[: len(at)] = held.index_select(0, at.to(held.device))
        self._count = len(at)

    def draw(self, count: int) -> dict[str, Tensor]:
        """`count` different samples at random, all where there are fewer."""
        if count >= self._count:
            return self.all()
        places = self.draws.choice(self._count, count, replace=False, shuffle=False)
        return self.at(torch.from_numpy(places))

    def at(self, places: Tensor) -> dict[str, Tensor]:
        """The samples at `places` [k]."""
        return {name: held.index_select(0, places.to(held.device)) for name, held in self.fields.items()}

    def all(self) -> dict[str, Tensor]:
        """Every sample, a view: not to be changed."""
        return {name: held[: self._count] for name, held in self.fields.items()}

    def state_dict(self) -> dict[str, Any]:
        return {
            "seen": self.seen,
            "fields": {name: held[: self._count] for name, held in self.fields.items()},
            "draws": self.draws.bit_generator.state,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.seen, self.fields, self._count, self._labels = state["seen"], {}, 0, []
        self.draws.bit_generator.state = state["draws"]
        given = state["fields"]
        if not given:
            return
        count = self._checked(given)
        if count > self.capacity:
            raise ValueError(f"{count} samples kept, now room for {self.capacity}")
        self._write(range(count), range(count), given)
        if self.policy == "balanced":
            self._labels = given["y"].tolist()

    # --- which of them stay ------------------------------------------------------------------------------------------

    def _by_reservoir(self, count: int) -> tuple[list[int], list[int]]:
        """Slots to write and the rows of the batch that go there."""
        capacity, start = self.capacity, self.seen
        free = min(max(capacity - start, 0), count)
        slots = list(range(start, start + free))
        rows = list(range(free))
        if free < count and capacity:
            drawn = self.draws.integers(0, np.arange(start + free + 1, start + count + 1))
            there = np.flatnonzero(drawn < capacity)
            slots += drawn[there].tolist()
            rows += (there + free).tolist()
        last = dict(zip(slots, rows, strict=True))  # of several writers of a slot the last stays
        return list(last), list(last.values())

    def _greedily(self, labels: Tensor) -> tuple[list[int], list[int]]:
        """The same for the balanced policy: sample after sample, each looks at what the classes have by then."""
        capacity, last, held = self.capacity, dict[int, int](), self._labels
        for row, label in enumerate(labels.tolist()):
            if len(held) < capacity:
                held.append(label)
                last[len(held) - 1] = row
                continue
            sizes = np.bincount(np.asarray(held, dtype=np.int64), minlength=label + 1)
            if not capacity or sizes[label] >= sizes.max():
                continue  # of a largest class there are enough
            largest = int(self.draws.choice(np.flatnonzero(sizes == sizes.max())))
            slot = int(self.draws.choice(np.flatnonzero(np.asarray(held) == largest)))
            held[slot] = label
            last[slot] = row
        return list(last), list(last.values())

    # --- tensors -----------------------------------------------------------------------------------------------------

    def _checked(self, given: dict[str, Tensor]) -> int:
        """How many samples were given. SpoliaError where they do not go with those held; the first ones make room."""
        count = len(next(iter(given.values()), ()))
        alike = all(len(tensor) == count for tensor in given.values())
        if not (alike and given) or (self.policy == "balanced" and "y" not in given):
            said = ", ".join(f"{name} {len(tensor)}" for name, tensor in given.items()) or "nothing"
            mend = "give tensors of one length" + (", among them y" if self.policy == "balanced" else "")
            raise SpoliaError(f"samples of {said}", where="memory", mend=mend)
        if not self.fields:
            self._make_room(given)
        held = self.fields
        if given.keys() != held.keys() or any(
            t.dtype != held[name].dtype or t.shape[1:] != held[name].shape[1:] for name, t in given.items()
        ):
            now, then = (", ".join(f"{n} {list(t.shape[1:])} {t.dtype}" for n, t in k.items()) for k in (given, held))
            mend = "give every sample the same fields; a head that grows needs all its outputs from the start"
            raise SpoliaError(f"samples of {now} beside {then}".replace("torch.", ""), where="memory", mend=mend)
        return count

    def _make_room(self, given: dict[str, Tensor]) -> None:
        size = sum(math.prod(t.shape[1:]) * t.element_size() for t in given.values())
        bounds = (self.items, None if self.bytes is None else self.bytes // max(1, size))
        self.capacity = min(bound for bound in bounds if bound is not None)
        for name, tensor in given.items():
            place = tensor.device if self.device is None else self.device
            self.fields[name] = torch.empty((self.capacity, *tensor.shape[1:]), dtype=tensor.dtype, device=place)

    def _write(self, slots: Any, rows: Any, given: dict[str, Tensor]) -> None:
        if not len(slots):
            return
        to, source = (torch.from_numpy(np.fromiter(places, np.int64, len(places))) for places in (slots, rows))
        for name, held in self.fields.items():
            tensor = given[name].detach()
            taken = tensor.index_select(0, source.to(tensor.device)).to(held.device)
            held.index_copy_(0, to.to(held.device), taken)
        self._count = max(self._count, max(slots) + 1)


def herded(features: Tensor, count: int) -> Tensor:
    """Places [count] of the samples whose running mean follows the mean of all features [n, d] best, in that order.

    Rebuffi et al. 2017, arXiv 1611.07725: one after the other, the sample that brings the mean of those chosen nearest to
    the mean of all; of equal ones the first. A prefix of the order is the order of a smaller count.
    """
    x = features.double()
    goal, total = x.mean(0), torch.zeros_like(x[0])
    free = torch.ones(len(x), dtype=torch.bool, device=x.device)
    found = []
    for k in range(1, min(count, len(x)) + 1):
        gaps = (goal - (total + x) / k).square().sum(1)
        best = int(gaps.masked_fill(~free, torch.inf).argmin())
        free[best] = False
        total += x[best]
        found.append(best)
    return torch.tensor(found, dtype=torch.int64)
