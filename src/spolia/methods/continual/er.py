"""ER, experience replay: every step also descends on a batch of remembered samples. The baseline that is hard to beat.

For any classifier and a few hundred samples of room. Chaudhry et al., On Tiny Episodic Memories in Continual Learning, 2019,
arXiv 1902.10486; the form with two means and a weight is that of Buzzega et al., arXiv 2004.07211.

    L = CE(f(x), y) + beta CE(f(x'), y'),    (x', y') drawn from the memory, then (x, y) shown to it

| paper | here |
|---|---|
| M | `memory`, `settings.items` |
| beta | `settings.weight` |

Data touched: each experience once; the samples in memory as long as they stay there. Replay begins within the first
experience, so that samples of the one at hand are replayed too.

Departures: programs that join new and old samples take one mean of both, which makes beta their share in numbers; here it is
said. One forward pass serves both unless batch statistics would mix (`joint_forward`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.settings import setting
from spolia.methods.continual.learner import TABLES
from spolia.methods.continual.replay import Replay, Replaying

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch


class Er(Replay):
    """Settings of `ErLearner`."""

    weight: float = setting(1.0, "beta, of the replayed samples' loss", source=TABLES, ge=0)


class ErLearner(Replaying):
    settings: Er

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if not len(self.memory):
            return super().loss(batch)
        old = self.memory.draw(self.replay)
        logits, again = self.together(batch.x, old["x"])
        loss = self.criterion(logits, batch.y) + self.settings.weight * self.criterion(again, old["y"])
        return loss, logits
