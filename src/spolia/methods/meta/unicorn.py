"""Unicorn-MAML: one learned vector is the head of every class, so that the order of the labels does not matter.

For classification by a pretrained network, the strongest plain form of MAML. Ye, Chao, How to Train Your MAML to Excel in
Few-Shot Classification, ICLR 2022, arXiv 2106.16245.

    W = (w, …, w), b = (b, …, b),    MAML's steps from (body, W, b),    dL/dw = sum over classes of dL/dW_c, likewise b

| paper | here |
|---|---|
| w, b | every row of the head's weight and bias, which stay equal |
| phi (body) | pretrained on all training classes (`pretrain` steps), then trained at `lr`, the head at `head_lr` times that |
| alpha, M | `inner_lr`, `inner_steps` |
| logits / 0.5 | `temperature` |

Data touched: labelled inputs of the training classes, in episodes and, in `pretrain`, by class; at test the support of the
episode, and under `bn: batch` all its queries at once. Departures: the published code lets running statistics of batch norm
leak from one test episode into the next; here no episode leaves a trace. How long to pretrain is our choice.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from spolia.core.journal import Journal
from spolia.core.settings import setting
from spolia.methods.meta.train import OURS, SCHEDULES, Adapting, Source, meta_gradient

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.meta.learner import MetaLearner
    from spolia.methods.meta.train import Watch

_YE = "Ye & Chao 2022, the authors' code, 1-shot"


class Unicorn(Adapting):
    """Settings of `unicorn`."""

    method: ClassVar[str] = "unicorn"
    tied: ClassVar[bool] = True

    steps: int = setting(10000, "outer steps", source=_YE, ge=0)
    inner_steps: int = setting(5, "M, inner steps", source=_YE, ge=0)
    inner_lr: float = setting(0.1, "alpha, step size of the inner SGD, or the first of learned ones", source=_YE, ge=0)
    order: Literal[1, 2] = setting(1, "1: updates count as constants; 2: the exact meta-gradient", source=_YE)
    tasks: int = setting(1, "episodes of an outer step", source=_YE, ge=1)
    lr: float = setting(1e-3, "outer step size", source=_YE, gt=0)
    optimizer: Literal["adam", "sgd"] = setting("sgd", "of the outer loop; sgd has Nesterov's momentum", source=_YE)
    weight_decay: float = setting(5e-4, "of the outer optimizer", source=_YE, ge=0)
    head_lr: float = setting(10.0, "factor of the head's outer step size", source=_YE, gt=0)
    schedule: Literal["constant", "drops", "linear"] = setting("drops", SCHEDULES, source=_YE)
    temperature: float = setting(0.5, "outer logits are divided by it; inner ones are not", source=_YE, gt=0)
    pretrain: int = setting(10000, "steps on all training classes at once before; 0: none", source=OURS, ge=0)


def unicorn(
    network: nn.Module,
    episodes: Source,
    settings: Unicorn,
    journal: Journal | None = None,
    *,
    watch: Watch | None = None,
) -> MetaLearner:
    """A start without labels of its own. `network` ends with nn.Linear, and stays as it is. `watch`: see `maml`.

    At test an episode may have other ways than in training: the vector is copied as often as it takes.
    """
    return meta_gradient(network, episodes, settings, journal, watch=watch)
