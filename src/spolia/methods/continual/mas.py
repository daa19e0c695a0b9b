"""MAS, memory aware synapses: a weight is held by how much the outputs' length hangs on it, whatever the labels.

For any network with outputs; no samples and no labels are needed for what is kept. Aljundi et al., Memory Aware Synapses:
Learning what (not) to forget, ECCV 2018, arXiv 1711.09601.

    Omega = E_x |d ||f(x)||^2 / d theta|
    L = CE(f(x), y) + lambda sum_i Omega_i (theta_i - theta*_i)^2

| paper | here |
|---|---|
| F | logits |
| lambda | `settings.strength` |
| Omega over tasks | `settings.blend`: Omega <- blend Omega + (1 - blend) Omega_t; the first is taken whole |

Data touched: each experience once; after it some of its inputs, without labels. Departures: absolute values are taken example
by example; of a batch's gradient signs have cancelled. The paper sums Omega over tasks; a running mean is what programs do,
which keeps one strength fit for many tasks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.settings import setting
from spolia.methods.continual.anchored import Anchored, Anchoring, sensitivity
from spolia.methods.continual.learner import OURS, TABLES

if TYPE_CHECKING:
    from spolia.parts.stream import Experience

_PEER = "Avalanche"


class Mas(Anchoring):
    """Settings of `MasLearner`."""

    lr: float = setting(0.03, "learning rate of plain SGD", source=TABLES, gt=0)
    strength: float = setting(1.0, "lambda, without a half", source=_PEER, ge=0)
    blend: float = setting(0.5, "what of the earlier Omega stays", source=_PEER, ge=0, le=1)
    samples: int | None = setting(1024, "inputs of an experience it is estimated on; None: all", source=OURS, ge=1)


class MasLearner(Anchored):
    settings: Mas

    def end(self, experience: Experience) -> None:
        found = sensitivity(self, experience, self.settings.samples)
        keep = self.settings.blend
        self.settle(
            [keep * old + (1 - keep) * new for old, new in zip(self.importance, found, strict=True)]
            if self.importance
            else found
        )
