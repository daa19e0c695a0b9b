"""ANIL: MAML whose inner steps move the head alone; the body is learned in the outer loop.

For adapting fast: features of support and queries are computed once under the start's weights. Raghu, Raghu, Bengio,
Vinyals, Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of MAML, ICLR 2020, arXiv 1909.09157.

    theta = (body, head),    head^{k+1} = head^k - alpha grad_head L_S,    both get the gradient of L_Q(body, head^K)

| paper | here |
|---|---|
| alpha, K | `inner_lr`, `inner_steps` |
| head | the last module that holds parameters, or `head` |

Data touched: labelled inputs of the training classes; at test the support of the episode, and under `bn: batch` all its
queries at once. Departures: none from the rule; in the inner loop the body runs anew at every step.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from spolia.core.journal import Journal
from spolia.core.settings import setting
from spolia.methods.meta.train import OURS, Adapting, Source, meta_gradient

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.meta.learner import MetaLearner
    from spolia.methods.meta.train import Watch

_L2L = "learn2learn's ANIL"


class Anil(Adapting):
    """Settings of `anil`."""

    method: ClassVar[str] = "anil"
    adapt: ClassVar[Literal["all", "head", "body"]] = "head"

    steps: int = setting(30000, "outer steps", source=OURS, ge=0)
    inner_steps: int = setting(5, "K, inner steps", source=_L2L, ge=0)
    inner_lr: float = setting(0.1, "alpha, step size of the inner SGD, or the first of learned ones", source=_L2L, ge=0)
    order: Literal[1, 2] = setting(
        2, "2: the exact meta-gradient; 1: updates count as constants", source="Raghu et al. 2020"
    )
    tasks: int = setting(32, "episodes of an outer step", source=_L2L, ge=1)
    lr: float = setting(1e-3, "outer step size", source=_L2L, gt=0)


def anil(
    network: nn.Module, episodes: Source, settings: Anil, journal: Journal | None = None, *, watch: Watch | None = None
) -> MetaLearner:
    """A start whose head adapts. `network` ends with one output a way, and stays as it is. `watch`: see `maml`."""
    return meta_gradient(network, episodes, settings, journal, watch=watch)
