"""A stopping rule: the distance to the expert on inputs kept apart, looked at along the steps; the best look is kept.

The distance is what the fit minimises, on inputs that it does not see. No labels. The papers take all their steps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Stopping:
    """The best look at every set of bottlenecks, by the task whose it is (the first, where tasks share one).

    A set is done after `patience` looks in a row without a smaller distance; None: it is never looked at. What others
    do does not matter to it. `best` is all that changes across steps.
    """

    patience: int | None
    every: int
    best: dict[str, Any] = field(default_factory=dict)

    def keep(self) -> dict[str, Any]:
        """For a journal to keep."""
        return {} if self.patience is None else {"best": self.best}

    def due(self, step: int) -> bool:
        """Whether to look before step `step`."""
        return self.patience is not None and step % self.every == 0

    def look(self, task: str, step: int, distance: float, weights: Mapping[str, Tensor]) -> None:
        """Note how far the set is from the expert after `step` steps; a set that is done stays as it was at its best."""
        if self.done(task):
            return
        held = self.best.get(task)
        if held is not None and not distance < held["distance"]:
            held["missed"] += 1
            return
        copies = {name: tensor.detach().clone() for name, tensor in weights.items()}
        self.best[task] = {"step": step, "distance": distance, "missed": 0, "weights": copies}

    def done(self, task: str) -> bool:
        return self.patience is not None and task in self.best and self.best[task]["missed"] >= self.patience

    def over(self, tasks: Sequence[str]) -> bool:
        """Whether all sets are done."""
        return all(map(self.done, tasks))

    def told(self, task: str) -> dict[str, Any]:
        """For the facts: after which step the kept weights were reached, and their distance."""
        return {name: self.best[task][name] for name in ("step", "distance")}
