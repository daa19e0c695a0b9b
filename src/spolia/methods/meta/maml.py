"""MAML: learn a start from which a few gradient steps on a task's support suffice for its queries.

For any network trained by gradients: classification, regression, or another loss. Finn, Abbeel, Levine, Model-Agnostic
Meta-Learning for Fast Adaptation of Deep Networks, ICML 2017, arXiv 1703.03400.

    theta^0 = theta,    theta^{k+1} = theta^k - alpha grad L_S(theta^k),    min_theta mean over tasks of L_Q(theta^K)

| paper | here |
|---|---|
| alpha, K | `inner_lr` (learned where `rates` says so: Meta-SGD), `inner_steps` |
| beta | `lr`, of `optimizer` |
| L_S, L_Q | `loss` of support and query |
| first-order approximation | `order: 1` |

Data touched: labelled inputs of the training classes; at test the support of the episode, and under `bn: batch` all its
queries at once. Departures: parameters that get no gradient are not excluded; statistics of batch norm are never carried
from one episode to the next; first and second order are never switched between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from spolia.core.journal import Journal
from spolia.core.settings import setting
from spolia.methods.meta.train import Adapting, Source, meta_gradient

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.meta.learner import MetaLearner
    from spolia.methods.meta.train import Watch

_FINN = "Finn et al. 2017"


class Maml(Adapting):
    """Settings of `maml`."""

    method: ClassVar[str] = "maml"

    inner_steps: int = setting(5, "K, inner steps", source=f"{_FINN}, mini-ImageNet; Omniglot: 1", ge=0)
    inner_lr: float = setting(
        0.4, "alpha, step size of the inner SGD, or the first of learned ones", source=f"{_FINN}, Omniglot", ge=0
    )
    order: Literal[1, 2] = setting(2, "2: the exact meta-gradient; 1: updates count as constants", source=_FINN)
    tasks: int = setting(4, "episodes of an outer step", source=f"{_FINN}, mini-ImageNet", ge=1)
    lr: float = setting(3e-3, "outer step size", source="learn2learn, Conv4", gt=0)


def maml(
    network: nn.Module, episodes: Source, settings: Maml, journal: Journal | None = None, *, watch: Watch | None = None
) -> MetaLearner:
    """A start that adapts. `network` ends with one output a way (or a target's), and stays as it is.

    `watch(step, learner)` gives a validation score every `check_every` steps and at the end.
    """
    return meta_gradient(network, episodes, settings, journal, watch=watch)
