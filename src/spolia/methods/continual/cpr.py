"""CPR, classifier-projection regularisation: predictions are kept wide, around any learner, so that its minima are too.

For learners that hold weights (EWC, SI, MAS), and any other. Cha et al., CPR: Classifier-Projection Regularization for
Continual Learning, ICLR 2021, arXiv 2006.07326.

    L = L_host + beta mean KL(softmax(f(x)) || uniform),    which is  log C - entropy

| paper | here |
|---|---|
| beta | `settings.weight` |
| P_U | the uniform distribution over all outputs |

Data touched: as the learner it goes around. Departures: none.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spolia.core.outputs import entropy
from spolia.core.settings import setting
from spolia.methods.continual.around import Around, Hosted, Hosts
from spolia.methods.continual.learner import OURS

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Learner
    from spolia.parts.stream import Batch


class Cpr(Hosted):
    """Settings of `CprLearner`."""

    host: Hosts = setting("ewc", "learner that it goes around, where none is handed in", source="Cha et al. 2021")
    weight: float = setting(0.5, "beta, of the divergence from uniform", source=OURS, ge=0)


class CprLearner(Around):
    """`host` with one more term in its loss."""

    def __init__(self, host: Learner | Around, settings: Cpr):
        super().__init__(host)
        self.settings = settings

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        loss, logits = self.host.loss(batch)
        apart = math.log(logits.shape[-1]) - entropy(logits).mean()
        return loss + self.settings.weight * apart, logits
