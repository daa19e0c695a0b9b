"""DER++: dark experience replay, and the labels of a second draw beside it.

For any classifier, also without task boundaries; of the simple methods with a memory the strongest. Buzzega et al., Dark
Experience for General Continual Learning: a Strong, Simple Baseline, NeurIPS 2020, arXiv 2004.07211.

    L = CE(f(x), y) + alpha mean (f(x'_1) - z'_1)^2 + beta CE(f(x'_2), y'_2),    two independent draws

| paper | here |
|---|---|
| z | `memory` field `logits`: f of the view trained on, before the step |
| alpha, beta | `settings.alpha`, `settings.beta` |

Data touched: each experience once; remembered inputs, labels and logits.

Departures: as DER: a mean over classes where the paper writes a squared norm. Three lots share one forward pass unless batch
statistics would mix (`joint_forward`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.methods.continual.learner import TABLES
from spolia.methods.continual.replay import Replay, Replaying

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch


class DerPp(Replay):
    """Settings of `DerPpLearner`."""

    lr: float = setting(0.03, "learning rate of plain SGD", source=TABLES, gt=0)
    alpha: float = setting(0.1, "of the distance to the stored logits", source=TABLES, ge=0)
    beta: float = setting(0.5, "of the remembered labels' loss", source=TABLES, ge=0)


class DerPpLearner(Replaying):
    settings: DerPp

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not len(self.memory):
            return super().loss(batch)
        dark, old = self.memory.draw(self.replay), self.memory.draw(self.replay)
        logits, again, labelled = self.together(batch.x, dark["x"], old["x"])
        loss = self.criterion(logits, batch.y)
        loss = loss + self.settings.alpha * torch.nn.functional.mse_loss(again, dark["logits"])
        return loss + self.settings.beta * self.criterion(labelled, old["y"]), logits

    def remember(self, batch: Batch, logits: Tensor) -> None:
        self.memory.add(x=batch.x, y=batch.y, logits=logits)
