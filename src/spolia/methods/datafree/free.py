"""FREE: a meta-learner from a pool of classifiers and no data, by one generator that adapts to each of them in five steps.

For whoever holds many trained classifiers, little compute, and none of their data. Wei, Hu, Wang, Shen, Yuan, Tao, FREE: Faster
and Better Data-Free Meta-Learning, CVPR 2024, arXiv 2405.00984.

    recover    phi_i = K steps of Adam on CE + bn (+ adv) from phi, for each of the step's experts;  x_i = G(z_i; phi_i)
               phi <- phi + epsilon (mean_i phi_i - phi)
    align      theta' <- theta' - a grad KL(expert_i || theta') on x_i, one by one;  theta <- theta + e (theta' - theta)
    replay     theta <- Adam(theta, gradient of the queries' loss in pseudo-tasks of all images so far)

| paper, code | here |
|---|---|
| FIVE, K | `recovery: meta`, `recovery_steps` |
| BELL | `align: sequential`; over random orders it raises the inner products of the experts' gradients (core/alignment) |
| f_theta with MAML | `head: linear`, `inner_steps`, `inner_lr`; prototypes are the default |
| B_T, warm-up | `experts`, `warm_up` |

Data touched: the models, their class lists, noise; at test the support of the episode, and under `bn: batch` its queries.
Departures: Reptile interpolation moves the generator, not Adam begun anew at each step; batch norm statistics count, where
the released code sets them to 0; the generator is told the class; images of all experts of a step are stored, not the last
one's; the KL is one; theta is moved by itself, not through the optimizer that replays use; a head of prototypes, for all
experts' outputs are in orders of their own. `preset: paper-code` does what the released code does in each of these.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import model_validator

from spolia.core.journal import Journal
from spolia.core.settings import setting
from spolia.methods.datafree.combination import Combined, combined

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.datafree.learner import Embed, FewShotLearner
    from spolia.methods.datafree.training import Watch
    from spolia.parts.white import WhitePool

_CODE = "Wei et al. 2024, the released code"
PAPER_CODE: dict[str, Any] = {
    "bn_weight": 0.0,
    "adversarial_weight": 1.0,
    "kd": "legacy",
    "augment": "crop",
    "per_sample": False,
    "flip": True,
    "keep": "last",
    "conditional": False,
    "meta": "released",
    "stored": "last",
    "align": "released",
    "align_optimizer": "adam",
    "head": "linear",
    "patience": 10,
    "replay_tasks": 10,
}
"""What `preset: paper-code` sets."""


class Free(Combined):
    """Settings of `free`."""

    method: ClassVar[str] = "free"

    preset: Literal["ours", "paper-code"] = setting(
        "ours",
        "paper-code: what the released code does, whatever is written in " + ", ".join(PAPER_CODE),
        source="our choice",
    )
    recovery_steps: int = setting(5, "K, steps of Adam for each expert", source=_CODE, ge=1)
    per_class: int = setting(20, "images of each of an expert's classes, each time", source=_CODE, ge=2)

    @model_validator(mode="before")
    @classmethod
    def _as_released(cls, given: Any) -> Any:
        if isinstance(given, dict) and given.get("preset") == "paper-code":
            return {**given, **PAPER_CODE}
        return given


def free(
    pool: WhitePool,
    network: nn.Module,
    settings: Free,
    journal: Journal | None = None,
    *,
    seed: int = 0,
    embed: Embed | None = None,
    watch: Watch | None = None,
) -> FewShotLearner:
    """A copy of `network`, meta-trained on what the experts of `pool` remember. Neither is changed.

    `embed(network, x)` gives the features that class means are taken of. `watch(step, learner)` is a validation score; the
    best is kept in `learner.selection`. Raises SpoliaError with what the audit of the pool found, before any step.
    """
    return combined(pool, network, settings, journal, seed=seed, embed=embed, watch=watch)
