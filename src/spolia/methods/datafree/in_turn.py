"""Models that arrive one after the other, as a stream of tasks whose distribution shifts: the test of what is remembered."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from spolia.core.seeds import generator


class InTurn:
    """Selection by time: each model, in a random order, has an equal stretch of the steps, and does not come back.

    Without `remember` the images of the models before it are dropped when one arrives.
    """

    def __init__(self, pool: Any, settings: Any, seed: int):
        self.settings = settings
        self.order = generator(seed, "in turn").permutation(len(pool)).tolist()

    def phase(self, step: int) -> int:
        """Which stretch a step is in."""
        return min(len(self.order) - 1, step * len(self.order) // max(1, self.settings.steps))

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0

    def choose(self, step: int, count: int) -> list[int]:
        return [self.order[self.phase(step)]]

    def feedback(self, step: int, found: Any, learner: Any, store: Any, episodes: Any) -> None:
        if not self.settings.remember:
            for place in self.order[: self.phase(step)]:
                store.evict(place)

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None
