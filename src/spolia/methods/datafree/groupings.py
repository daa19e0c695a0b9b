"""Task Groupings Regularization: train on groups of unlike models, and penalise what their gradients disagree on.

For a pool whose models come from several domains or architectures and pull the learner apart. Wei, Hu, Shen, Wang, Li, Yuan,
Tao, Task Groupings Regularization: Data-Free Meta-Learning with Heterogeneous Pre-trained Models, ICML 2024, arXiv 2405.16560.

    S_ij = similarity of models i, j by a probe's Fisher on their recovered images;   groups: equal, D = 1 - S large within
    step: models 1 … m of one group, L_i = divergence from model i on its images, g_i = grad L_i, g their mean
    theta <- Adam(theta, mean_i grad L_i(theta - eta (g - g_i)))          = grad [mean L + eta / 2 mean |g_i - g|^2] + O(eta^2)

| paper, code | here |
|---|---|
| eta, `displace_lr` | `align_rate`; the code's 1e-3, differentiated through, is 2e-3 here |
| spectral clustering of D | `grouping: spectral`; `balanced` has equal sizes |
| probe: ResNet-34 of ImageNet | `embedding: probe`, any network; `student` and `cka` need none |
| K groups, m models of a step | `groups`, `experts` |

Data touched: the models, their class lists, noise; at test the support of the episode, and under `bn: batch` its queries.
Departures: the displacement is a constant (first order); the whole pool is grouped, where the released code cuts its 300
models of several kinds to the first 100; a group is drawn by its size and no model twice in a step; images come from FREE's
meta-generator, once, for the embedding and for training; a proper KL; a head of prototypes, so that the order of a model's
outputs is no conflict.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spolia.core.journal import Journal
from spolia.core.settings import setting
from spolia.methods.datafree.combination import Combined, combined

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.datafree.learner import Embed, FewShotLearner
    from spolia.methods.datafree.training import Watch
    from spolia.parts.white import WhitePool

_PAPER, _CODE = "Wei et al. 2024 (TGR)", "Wei et al. 2024 (TGR), the released code"


class Groupings(Combined):
    """Settings of `groupings`."""

    method: ClassVar[str] = "groupings"

    selection: Literal["uniform", "grouped", "policy", "in_turn"] = setting(
        "grouped", "how a step's models are chosen; grouped: from a group of unlike ones", source=_PAPER
    )
    align: Literal["mean", "sequential", "displaced", "released"] = setting(
        "displaced", "how the models' gradients become one direction", source=_PAPER
    )
    align_rate: float = setting(
        2e-3, "eta of displaced; step size of sequential and released", source=f"twice 1e-3: {_CODE}", ge=0
    )
    steps: int = setting(1200, "outer steps", source=_CODE, ge=1)
    recovery_steps: int = setting(5, "steps of Adam for each model", source="FREE's, with its meta-generator", ge=1)
    per_class: int = setting(30, "images of each of a model's classes, each time", source=_CODE, ge=2)


def groupings(
    pool: WhitePool,
    network: nn.Module,
    settings: Groupings,
    journal: Journal | None = None,
    *,
    seed: int = 0,
    embed: Embed | None = None,
    probe: nn.Module | None = None,
    selection: Any = None,
    watch: Watch | None = None,
) -> FewShotLearner:
    """A copy of `network`, meta-trained on what the models of `pool` remember. Neither is changed.

    `probe`: a network for `embedding: probe`. `selection`: a Grouped of yours, whose groups can be looked at afterwards.
    """
    return combined(
        pool, network, settings, journal, seed=seed, embed=embed, probe=probe, selection=selection, watch=watch
    )
