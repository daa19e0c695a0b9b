"""A-GEM: the step may not go against the gradient of the remembered samples' loss.

For any classifier. Chaudhry et al., Efficient Lifelong Learning with A-GEM, ICLR 2019, arXiv 1812.00420.

    g <- g - (g.r / r.r) r  where g.r < 0,    g of the batch, r of a batch from the memory

| paper | here |
|---|---|
| g, g_ref | gradients of all parameters as one vector each |
| M | `memory`; the reference batch has `settings.replay` samples |

Data touched: each experience once; remembered inputs and labels, whose loss is never descended on. It is a constraint and no
penalty, so it is no instance of the unified objective.

Departures: the paper fills its memory task by task, here every sample has the same chance. Constraints hold from the second
experience on, as there; without boundaries from the first step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spolia.core.gradients import gradients, project, share
from spolia.core.settings import setting
from spolia.methods.continual.learner import OURS
from spolia.methods.continual.replay import Replay, Replaying

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Experience


class AGem(Replay):
    """Settings of `AGemLearner`."""

    replay: int = setting(64, "samples of the reference", unit="samples", source=OURS, ge=1)


class AGemLearner(Replaying):
    settings: AGem

    def __init__(self, model: Any, settings: AGem, *, memory: Any = None, seed: int = 0):
        super().__init__(model, settings, memory=memory, seed=seed)
        self.active = {"now": False}

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.active["now"] = experience.task is None or experience.place > 0

    def descend(self, loss: Tensor) -> None:
        if not (self.active["now"] and len(self.memory)):
            super().descend(loss)
            return
        own = self._gradient(loss)
        old = self.memory.draw(self.replay)
        reference = self._gradient(self.criterion(self.logits(self.viewed(old["x"])), old["y"]))
        for parameter, slope in zip(self.parameters, project(own, reference), strict=True):
            parameter.grad = slope
        self.step(shared=True)

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"active": self.active}

    def _gradient(self, loss: Tensor) -> list[Tensor]:
        """Of the mean loss over all processes."""
        for parameter, slope in zip(self.parameters, gradients(loss, self.parameters), strict=True):
            parameter.grad = slope
        share(self.parameters, 1 / self.ranks)
        found = [p.grad for p in self.parameters if p.grad is not None]
        self.optimizer.zero_grad()
        return found
