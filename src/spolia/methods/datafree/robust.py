"""Robust data-free meta-learning: a memory of pseudo-tasks, tasks between tasks, and models that must earn their trust.

For a pool collected from anywhere, in which some models were never trained, or say of their classes what is not so. Hu, Wei,
Shen, Wang, Wu, Yuan, Tao, Task-Distributionally Robust Data-Free Meta-Learning, 2023, arXiv 2311.14756.

    step: models i_1 … i_m by Plackett-Luce draws of p;   images x_i recovered and stored under the classes that i claims
    replay: tasks of the store, some mixed:   v = (1 - lambda) f(x1) + lambda f(x2),   lambda ~ Beta(beta, beta)
    R_i = how well x_i, as support, tell apart what other models made of the same classes
    w <- Adam ascent on sum_j A_j log P(i_j | before) + entropy;    p = (1 - explore) softmax(w) + explore / N

| paper, code | here |
|---|---|
| memory of tasks | the store, `per_class_kept` images a class |
| task interpolation | `interpolate`, `beta` |
| reliability weights w, reward R | `selection: policy`; `reward`: `held_out`, or the code's `real`, with real episodes |
| baseline b = 40 | running mean and deviation of R |

Data touched: the models, their class lists, noise; `reward: real` the labelled episodes that are given for it; at test the
support of the episode, and under `bn: batch` its queries. Departures: exact log-probabilities of draws without replacement,
where the released code sums those of single draws; each model of a step has its own reward; an entropy term and some chance
draws; images of models that lost their trust leave the store; each model is met with its own answers (the code distils all
four tasks from the last model); images from FREE's meta-generator.
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
    from spolia.parts.episode import EpisodeSampler
    from spolia.parts.white import WhitePool

_PAPER, _CODE = "Hu et al. 2023", "Hu et al. 2023, the released code"


class Robust(Combined):
    """Settings of `robust`."""

    method: ClassVar[str] = "robust"

    selection: Literal["uniform", "grouped", "policy", "in_turn"] = setting(
        "policy", "how a step's models are chosen; policy: by learned trust", source=_PAPER
    )
    align: Literal["mean", "sequential", "displaced", "released"] = setting(
        "mean", "how the models' gradients become one direction", source=_CODE
    )
    suspects: Literal["stop", "drop", "keep"] = setting(
        "drop", "what becomes of models that nothing was learned by", source="our choice"
    )
    interpolate: float = setting(0.5, "share of pseudo-tasks that lie between two others", source=_CODE, ge=0, le=1)
    steps: int = setting(1000, "outer steps", source="our choice", ge=1)
    recovery_steps: int = setting(5, "steps of Adam for each model", source="FREE's, with its meta-generator", ge=1)
    per_class: int = setting(20, "images of each of a model's classes, each time", source="FREE's", ge=2)


def robust(
    pool: WhitePool,
    network: nn.Module,
    settings: Robust,
    journal: Journal | None = None,
    *,
    seed: int = 0,
    embed: Embed | None = None,
    validation: EpisodeSampler | None = None,
    selection: Any = None,
    watch: Watch | None = None,
) -> FewShotLearner:
    """A copy of `network`, meta-trained on what the models of `pool` remember. Neither is changed.

    `validation`: real labelled episodes, for `reward: real`. `selection`: a Trusted of yours, whose policy can be looked
    at afterwards.
    """
    return combined(
        pool,
        network,
        settings,
        journal,
        seed=seed,
        embed=embed,
        validation=validation,
        selection=selection,
        watch=watch,
    )
