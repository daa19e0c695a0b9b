"""The router: no model at all, every input to every API met so far, and the most confident one's word. A bound beside `apis`.

Data touched: none in training; at test every input is asked of every API, and paid for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch, Experience, Stream


class Router:
    """`predict` gives log-probabilities [n, classes]: each API's own of its classes, nothing for those of none."""

    def __init__(self, stream: Stream):
        self.stream = stream
        self.met: list[int] = []
        self.asked: dict[str, int] = {}

    def begin(self, experience: Experience) -> None:
        self.met.append(experience.place)

    def observe(self, batch: Batch) -> Any:
        return None

    def end(self, experience: Experience) -> None:
        pass

    def predict(self, x: Tensor) -> Tensor:
        found = torch.full((len(x), self.stream.classes), -torch.inf, dtype=torch.float64)
        shown = x.float() / 255 if x.dtype == torch.uint8 else x
        for place in self.met:
            experience: Any = self.stream.experiences[place]
            own = torch.tensor(experience.classes)
            log_p = experience.api(shown).log_p
            self.asked[experience.api.name] = self.asked.get(experience.api.name, 0) + len(x)
            found[:, own] = torch.maximum(found[:, own], log_p)
        return found

    def state_dict(self) -> dict[str, Any]:
        return {"met": self.met, "asked": self.asked}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.met[:] = state["met"]
        self.asked.update(state["asked"])
