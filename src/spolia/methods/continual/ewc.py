"""EWC, elastic weight consolidation, online: weights that earlier predictions hang on are held where they were.

For any classifier; no samples are kept. Kirkpatrick et al., Overcoming catastrophic forgetting in neural networks, 2017,
arXiv 1612.00796; one running Fisher as in Schwarz et al., Progress & Compress, 2018, arXiv 1805.06370.

    L = CE(f(x), y) + lambda sum_i F_i (theta_i - theta*_i)^2,    F <- gamma F + F_t,  theta* <- theta  after experience t

| paper | here |
|---|---|
| lambda / 2 | `settings.strength` |
| gamma | `settings.decay` |
| F_t | `settings.fisher`: by default the true diagonal Fisher, for more than 20 classes with sampled labels |

Data touched: each experience once; after it some of its inputs, without labels unless `fisher` says so.

Departures: published programs square gradients of whole batches, or of single augmented images in train mode; the numbers
called Fisher then differ by orders of magnitude, and so does the best strength. Here every example is squared by itself, in
eval mode. The step towards theta* is implicit with plain SGD, so that no strength diverges.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.settings import setting
from spolia.methods.continual.anchored import KINDS, Anchored, Anchoring, information
from spolia.methods.continual.learner import OURS, TABLES

if TYPE_CHECKING:
    from spolia.parts.stream import Experience


class Ewc(Anchoring):
    """Settings of `EwcLearner`."""

    lr: float = setting(0.03, "learning rate of plain SGD", source=TABLES, gt=0)
    strength: float = setting(10.0, "lambda, without a half", source=TABLES, ge=0)
    decay: float = setting(1.0, "gamma, what of the earlier Fisher stays", source=TABLES, ge=0, le=1)
    fisher: KINDS = setting("auto", "which diagonal Fisher: see core.gradients", source=OURS)
    samples: int | None = setting(1024, "inputs of an experience it is estimated on; None: all", source=OURS, ge=1)


class EwcLearner(Anchored):
    settings: Ewc

    def end(self, experience: Experience) -> None:
        found = information(self, experience, self.settings.fisher, self.settings.samples)
        before = self.importance or [f.new_zeros(()) for f in found]
        self.settle([self.settings.decay * old + new for old, new in zip(before, found, strict=True)])
