"""GDumb: collect a balanced memory, learn nothing from the stream, and fit a new network on the memory alone when asked.

The baseline that asks what a method adds to its memory. Prabhu, Torr, Dokania, GDumb: A Simple Approach that Questions Our
Progress in Continual Learning, ECCV 2020, doi:10.1007/978-3-030-58536-5_31.

    on the stream: add to a memory that holds as many of each class as fit;  at an end: theta <- theta_0, fit on the memory

| paper | here |
|---|---|
| greedy sampler | `Memory(policy="balanced")` |
| dumb learner | SGD from the first weights, `epochs` over the memory, learning rate cosine from lr to `floor` |

Data touched: each experience once, to look at what to keep; then the memory. It has no penalty, so it is no instance of the
unified objective.

Departures: CutMix is left out, the cosine is not restarted. It fits at every end, so that every row of the accuracy matrix
has its answer; tables that fit once, after the last task, pay less.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.methods.continual.learner import OURS, TABLES
from spolia.methods.continual.replay import Replay, Replaying

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch, Experience


class GDumb(Replay):
    """Settings of `GDumbLearner`."""

    policy: Literal["reservoir", "balanced"] = setting("balanced", "who stays", source="Prabhu et al. 2020")
    lr: float = setting(0.05, "learning rate of the fit at its beginning", source=TABLES, gt=0)
    floor: float = setting(5e-4, "and at its end", source=TABLES, ge=0)
    epochs: int = setting(256, "passes over the memory", source=TABLES, ge=1)
    batch: int = setting(32, "samples of a step of the fit", source=OURS, ge=1)


class GDumbLearner(Replaying):
    settings: GDumb

    def __init__(self, model: Any, settings: GDumb, *, memory: Any = None, seed: int = 0):
        super().__init__(model, settings, memory=memory, seed=seed)
        self.first = {name: tensor.detach().clone() for name, tensor in self.network.state_dict().items()}

    def observe(self, batch: Batch) -> Tensor:
        self.remember(batch, batch.y)
        return torch.zeros((), device=self.device)

    def end(self, experience: Experience) -> None:
        self.network.load_state_dict(self.first)
        self.optimizer = self._optimizer()
        self.network.train()
        held, lr = self.memory.all(), self.lr
        for epoch in range(self.settings.epochs):
            way = (1 + math.cos(math.pi * epoch / self.settings.epochs)) / 2
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.floor + (lr - self.settings.floor) * way
            order = torch.from_numpy(self.draws.permutation(len(self.memory))).to(held["y"].device)
            for own in order.split(self.settings.batch):
                logits = self.logits(self.viewed(held["x"].index_select(0, own)))
                self.descend(self.criterion(logits, held["y"].index_select(0, own)))

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"first": self.first}
