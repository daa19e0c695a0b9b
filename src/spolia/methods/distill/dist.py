"""DIST: the student keeps the teacher's correlations, among the classes of a sample and among the samples of a class.

For teachers much stronger than the student, whose exact probabilities it cannot reach. Huang et al., Knowledge Distillation
from A Stronger Teacher, NeurIPS 2022, arXiv 2205.10536.

    L = ce CE(s, y) + beta T^2 (1 - rho(p_b^S, p_b^T)) + gamma T^2 (1 - mean_c rho(p_:c^S, p_:c^T)),    p = softmax(. / T)

| paper | here |
|---|---|
| inter-class relation, rho over the classes of sample b | term `inter` |
| intra-class relation, rho over the samples of class c | term `intra` |
| beta, gamma | `settings.beta`, `gamma` |

Data touched: inputs, and their labels unless `ce` is 0 or none are given. The intra-class relation belongs to the batch: every
sample carries its whole value, so that the mean over samples is the published loss. All leading axes are the batch; samples
without a label that counts take no part. It needs many samples: of one there is none and the term is 0; a class that is
constant in the batch counts as uncorrelated, as in the published code. `temperature` is ours (published: 1).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.relations import pearson
from spolia.core.settings import Settings, setting
from spolia.methods.distill.objective import Objective, Seen

if TYPE_CHECKING:
    from torch import Tensor

_HUANG = "Huang et al. 2022, from memory"


class Dist(Settings):
    """Settings of `dist`."""

    temperature: float = setting(1.0, "T, by which logits are divided", source="Huang et al. 2022", gt=0)
    beta: float = setting(2.0, "weight of the relation among classes; the published class has 1", source=_HUANG, ge=0)
    gamma: float = setting(2.0, "weight of the relation among samples; the published class has 1", source=_HUANG, ge=0)
    ce: float = setting(1.0, "weight of the labels' cross-entropy", source=_HUANG, ge=0)


def dist(settings: Dist | None = None) -> Objective:
    """The objective; its terms are `inter` and `intra`."""
    settings = settings or Dist()
    return Objective(lambda seen: _terms(seen, settings), ce=settings.ce)


def _terms(seen: Seen, settings: Dist) -> dict[str, Tensor]:
    squared = settings.temperature**2
    p, q = ((out.logits / settings.temperature).softmax(-1) for out in (seen.student, seen.teacher))
    return {
        "inter": settings.beta * squared * (1 - pearson(p, q, -1)),
        "intra": settings.gamma * squared * seen.among(intra, p, q),
    }


def intra(p: Tensor, q: Tensor) -> Tensor:
    """1 - the mean over classes of the correlation over the samples: a scalar, from distributions [n, C]."""
    return 1 - pearson(p, q, 0).mean() if len(p) > 1 else (0 * p).sum()
