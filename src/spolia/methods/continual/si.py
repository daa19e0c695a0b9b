"""SI, synaptic intelligence: a weight is held by how much of the fall of the loss it brought about on its way.

For any classifier; no samples are kept and nothing is estimated afterwards. Zenke, Poole, Ganguli, Continual Learning Through
Synaptic Intelligence, ICML 2017, arXiv 1703.04200.

    omega_i <- omega_i - g_i dtheta_i  at every step,    Omega_i += max(omega_i, 0) / (Delta_i^2 + xi)  after an experience
    L = CE(f(x), y) + c sum_i Omega_i (theta_i - theta*_i)^2

| paper | here |
|---|---|
| g | gradient of the batch's loss, without the penalty's |
| dtheta, Delta | change of the weights in a step, in the experience |
| c, xi | `settings.strength`, `settings.damping` |

Data touched: each experience once. Departures: negative omega counts as 0. Some programs accumulate lr g^2 of the whole loss,
which is something else: with a penalty or momentum the step is not -lr g.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spolia.core.gradients import share
from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.methods.continual.anchored import Anchored, Anchoring
from spolia.methods.continual.learner import TABLES

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Experience


class Si(Anchoring):
    """Settings of `SiLearner`."""

    lr: float = setting(0.03, "learning rate of plain SGD", source=TABLES, gt=0)
    strength: float = setting(0.5, "c", source=TABLES, ge=0)
    damping: float = setting(1.0, "xi", source=TABLES, gt=0)


class SiLearner(Anchored):
    settings: Si

    def __init__(self, model: Any, settings: Si, *, seed: int = 0):
        super().__init__(model, settings, seed=seed)
        self.anchors[:] = self.copies()
        self.path = [torch.zeros_like(p) for p in self.parameters]  # omega

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        share(self.parameters, 1 / self.ranks)
        slopes = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in self.parameters]
        before = self.copies()
        self.penalised_step()
        walk(self.path, slopes, before, self.parameters)

    def end(self, experience: Experience) -> None:
        found = travelled(self.path, self.anchors, self.parameters, self.settings.damping)
        self.settle([old + new for old, new in zip(self.importance, found, strict=True)] if self.importance else found)
        torch._foreach_zero_(self.path)

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"path": self.path}


def walk(path: list[Tensor], slopes: list[Tensor], before: list[Tensor], after: list[Tensor]) -> None:
    """omega <- omega - g (theta_after - theta_before), in place."""
    with torch.no_grad():
        torch._foreach_addcmul_(path, slopes, torch._foreach_sub(after, before), value=-1.0)


def travelled(path: list[Tensor], anchors: list[Tensor], weights: list[Tensor], damping: float) -> list[Tensor]:
    """max(omega, 0) / (Delta^2 + xi)."""
    with torch.no_grad():
        ways = zip(path, anchors, weights, strict=True)
        return [omega.clamp(min=0) / ((weight - anchor).square() + damping) for omega, anchor, weight in ways]
