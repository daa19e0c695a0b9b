"""Two models of one training kept apart: the last, and the one that validation chose."""

from __future__ import annotations

import math
from typing import Any

from spolia.core.lazy import torch


class Selection:
    """Watches a module, or anything with state_dict(), being trained; keeps its state when a score is above all before.

    Of equal scores the first stays; NaN never wins. In a run it is kept with the rest: `keep={"selection": selection}`.
    """

    def __init__(self, module: Any):
        self._module = module
        self.scores: list[tuple[int, float]] = []  # step, validation score
        self.best_step: int | None = None
        self._best = _copied(module.state_dict())

    def offer(self, step: int, score: float) -> bool:
        """Tell the score after `step`; True where the module as it is became the chosen one."""
        known = [value for _, value in self.scores if not math.isnan(value)]
        self.scores.append((step, float(score)))
        if math.isnan(score) or (known and score <= max(known)):
            return False
        self.best_step, self._best = step, _copied(self._module.state_dict())
        return True

    def best(self) -> dict[str, Any]:
        """The chosen state; that of the beginning where nothing was chosen."""
        return _copied(self._best)

    def state_dict(self) -> dict[str, Any]:
        return {"scores": self.scores, "best_step": self.best_step, "best": self._best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.scores, self.best_step = list(state["scores"]), state["best_step"]
        self._best = _copied(state["best"])


def _copied(state: dict[str, Any]) -> dict[str, Any]:
    return {name: value.detach().clone() if torch.is_tensor(value) else value for name, value in state.items()}
