"""DER, dark experience replay: remembered samples have to give the logits they gave when they were stored.

For any classifier, also without task boundaries. Buzzega et al., Dark Experience for General Continual Learning: a Strong,
Simple Baseline, NeurIPS 2020, arXiv 2004.07211.

    L = CE(f(x), y) + alpha mean (f(x') - z')^2,    (x', z') from the memory, then (x, f(x)) shown to it

| paper | here |
|---|---|
| z | `memory` field `logits`: f of the view trained on, before the step |
| alpha | `settings.alpha` |

Data touched: each experience once; remembered inputs and logits, and no remembered label.

Departures: the paper writes a squared norm; tables and programs take the mean over classes, so does this: alpha scales with
their number. The view is drawn anew at replay, the logits are those of the first one: as in the authors' code.
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


class Der(Replay):
    """Settings of `DerLearner`."""

    lr: float = setting(0.03, "learning rate of plain SGD", source=TABLES, gt=0)
    alpha: float = setting(0.3, "of the distance to the stored logits", source=TABLES, ge=0)


class DerLearner(Replaying):
    settings: Der

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not len(self.memory):
            return super().loss(batch)
        old = self.memory.draw(self.replay)
        logits, again = self.together(batch.x, old["x"])
        gap = torch.nn.functional.mse_loss(again, old["logits"])
        return self.criterion(logits, batch.y) + self.settings.alpha * gap, logits

    def remember(self, batch: Batch, logits: Tensor) -> None:
        self.memory.add(x=batch.x, y=batch.y, logits=logits)
