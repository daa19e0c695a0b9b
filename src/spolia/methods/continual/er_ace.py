"""ER-ACE: replay with an asymmetric cross-entropy, so that new classes do not push old ones away before they are learned.

For class-incremental and task-free streams. Caccia et al., New Insights on Reducing Abrupt Representation Change in Online
Continual Learning, ICLR 2022, arXiv 2104.05025.

    L = CE(f(x) restricted to the classes of the batch and those never seen, y) + beta CE(f(x'), y')

| paper | here |
|---|---|
| C_curr | classes in the batch; those not seen before it stay in too |
| C_old | `seen`: classes met so far, whose logits the first term leaves out |

Data touched: as ER. Departures: in the first experience of a stream with boundaries it is finetune, as in the authors' tables;
without boundaries it restricts and replays from the first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.methods.continual.learner import OURS
from spolia.methods.continual.replay import Replay, Replaying

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch, Experience


class ErAce(Replay):
    """Settings of `ErAceLearner`."""

    weight: float = setting(1.0, "of the replayed samples' loss", source=OURS, ge=0)


class ErAceLearner(Replaying):
    settings: ErAce

    def __init__(self, model: Any, settings: ErAce, *, memory: Any = None, seed: int = 0):
        super().__init__(model, settings, memory=memory, seed=seed)
        self.seen: list[int] = []
        self.active = {"now": False}

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.active["now"] = experience.task is None or experience.place > 0

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not self.active["now"]:
            return super().loss(batch)
        if not len(self.memory):
            logits = self.logits(self.viewed(batch.x))
            return self.criterion(self._restricted(logits, batch.y), batch.y), logits
        old = self.memory.draw(self.replay)
        logits, again = self.together(batch.x, old["x"])
        new = self.criterion(self._restricted(logits, batch.y), batch.y)
        return new + self.settings.weight * self.criterion(again, old["y"]), logits

    def remember(self, batch: Batch, logits: Tensor) -> None:
        super().remember(batch, logits)
        self.seen[:] = sorted({*self.seen, *batch.y.unique().tolist()})

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"seen": self.seen, "active": self.active}

    def _restricted(self, logits: Tensor, labels: Tensor) -> Tensor:
        """Logits without those of classes seen before that the batch does not hold."""
        out = torch.zeros(logits.shape[1], dtype=torch.bool, device=logits.device)
        out[self.seen] = True
        out[labels.to(logits.device)] = False
        return logits.masked_fill(out, torch.finfo(logits.dtype).min)
