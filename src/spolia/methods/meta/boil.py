"""BOIL: MAML whose inner steps move the body alone; the head stays as it was learned.

For tasks whose features must change, as across domains: the body has to turn the inputs of each class towards a head that
does not move. Oh, Yoo, Kim, Yun, BOIL: Towards Representation Change for Few-shot Learning, ICLR 2021, arXiv 2008.08882.

    theta = (body, head),    body^{k+1} = body^k - alpha grad_body L_S,    both get the gradient of L_Q(body^K, head)

| paper | here |
|---|---|
| alpha_b, alpha_h = 0 | `inner_lr`; the head's is zero |
| head | the last module that holds parameters, or `head` |

Data touched: labelled inputs of the training classes; at test the support of the episode, and under `bn: batch` all its
queries at once. Departures: the published code makes a new optimizer every 100 steps, which forgets Adam's state, and tests
the last model; here one optimizer lives through the training, and last and selected model are kept apart.
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

_OH = "Oh et al. 2021, the authors' code, Conv4"


class Boil(Adapting):
    """Settings of `boil`."""

    method: ClassVar[str] = "boil"
    adapt: ClassVar[Literal["all", "head", "body"]] = "body"

    steps: int = setting(30000, "outer steps", source=_OH, ge=0)
    inner_steps: int = setting(1, "K, inner steps", source=_OH, ge=0)
    inner_lr: float = setting(0.5, "alpha, step size of the inner SGD, or the first of learned ones", source=_OH, ge=0)
    order: Literal[1, 2] = setting(2, "2: the exact meta-gradient; 1: updates count as constants", source=_OH)
    tasks: int = setting(4, "episodes of an outer step", source=_OH, ge=1)
    lr: float = setting(1e-3, "outer step size", source=_OH, gt=0)


def boil(
    network: nn.Module, episodes: Source, settings: Boil, journal: Journal | None = None, *, watch: Watch | None = None
) -> MetaLearner:
    """A start whose body adapts. `network` ends with one output a way, and stays as it is. `watch`: see `maml`."""
    return meta_gradient(network, episodes, settings, journal, watch=watch)
