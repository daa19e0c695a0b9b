"""LwF, learning without forgetting: on new inputs the old classes' outputs have to stay what the old network says.

For any classifier whose heads share a body; no samples are kept, one old network is. Li & Hoiem, Learning without Forgetting,
ECCV 2016, arXiv 1606.09282.

    L = CE(f(x) of the classes seen, y) + alpha T^2 KL(softmax(f_old(x) / T) || softmax(f(x) / T)),   KL over the old classes

| paper | here |
|---|---|
| lambda_o | `settings.alpha` |
| T | `settings.temperature` |
| old network | `old`, a copy made when an experience ends |

Data touched: each experience once. Departures: the KL with its factor T^2 in the place of the paper's cross-entropy, which has
the gradient of the paper's times T^2; from log-softmax, as powers of probabilities underflow. No warm-up of a new head.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from spolia.core import divergence
from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.methods.continual.learner import TABLES, Learner, Training

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Batch, Experience


class Lwf(Training):
    """Settings of `LwfLearner`."""

    lr: float = setting(0.01, "learning rate of plain SGD", source=TABLES, gt=0)
    weight_decay: float = setting(5e-4, "of SGD", source=TABLES, ge=0)
    alpha: float = setting(3.0, "of the old classes' divergence", source=TABLES, ge=0)
    temperature: float = setting(2.0, "T", source="Li & Hoiem 2016", gt=0)


class LwfLearner(Learner):
    settings: Lwf

    def __init__(self, model: Any, settings: Lwf, *, seed: int = 0):
        super().__init__(model, settings, seed=seed)
        self.old = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.known: list[int] = []  # classes before this experience
        self.seen: list[int] = []  # with its own

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.seen[:] = sorted({*self.known, *experience.classes})

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        x = self.viewed(batch.x)
        logits = self.logits(x)
        loss = self.criterion(among(logits, self.seen), batch.y)
        if not self.known:
            return loss, logits
        with torch.no_grad():
            before = self.model.outputs(self.old, x)[:, self.known]
        apart = divergence.kl(logits[:, self.known], before, self.settings.temperature)
        return loss + self.settings.alpha * apart.mean(), logits

    def end(self, experience: Experience) -> None:
        self.known[:] = self.seen
        self.old.load_state_dict(self.network.state_dict())

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"old": self.old, "known": self.known, "seen": self.seen}


def among(logits: Tensor, classes: list[int]) -> Tensor:
    """Logits of `classes`, those of all others as small as can be: [n, C]."""
    out = torch.ones(logits.shape[1], dtype=torch.bool, device=logits.device)
    out[classes] = False
    return logits.masked_fill(out, torch.finfo(logits.dtype).min)
