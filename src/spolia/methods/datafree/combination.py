"""What the three data-free learners share and mix: who makes the images, who joins the gradients, who chooses the models.

| part | words | from |
|---|---|---|
| `recovery` | meta, fresh, pixels | FREE; TGR and Robust; DeepInversion |
| `align` | sequential, displaced, mean | FREE; TGR; none |
| `selection` | uniform, grouped, policy, in_turn | FREE; TGR; Robust; the test of what is remembered |
| `interpolate` | share of pseudo-tasks between two others | Robust |

free, groupings and robust are one loop with other defaults, so any of them takes any word of the others.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from spolia.core.journal import Journal
from spolia.core.settings import setting
from spolia.methods.datafree.grouped import Grouped
from spolia.methods.datafree.in_turn import InTurn
from spolia.methods.datafree.interpolation import replayed
from spolia.methods.datafree.training import Training, Uniform, audited, train
from spolia.methods.datafree.trusted import Trusted

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.datafree.learner import Embed, FewShotLearner
    from spolia.methods.datafree.training import Selection, Watch
    from spolia.parts.episode import EpisodeSampler
    from spolia.parts.white import WhitePool

_OURS, _TGR, _ROBUST = "our choice", "Wei et al. 2024 (TGR), the released code", "Hu et al. 2023, the released code"


class Combined(Training):
    """Settings of the loop with every way to choose models and pseudo-tasks."""

    selection: Literal["uniform", "grouped", "policy", "in_turn"] = setting(
        "uniform",
        "how a step's models are chosen: by chance, from a group of unlike ones, by learned trust, or one after the other",
        source=_OURS,
    )
    groups: int = setting(5, "of models, for grouped; at most half as many as there are models", source=_TGR, ge=1)
    grouping: Literal["balanced", "spectral", "random", "homogeneous"] = setting(
        "balanced",
        "equal groups of unlike models; the paper's clustering; to compare: by chance, of like ones",
        source=_OURS,
    )
    embedding: Literal["student", "probe", "cka"] = setting(
        "student",
        "what tells how alike models are: the learner's Fisher, a given network's, their answers",
        source=_OURS,
    )
    regroup: int = setting(0, "outer steps between two groupings; 0: once", source=_TGR, ge=0)
    reward: Literal["held_out", "real"] = setting(
        "held_out",
        "of the policy: pseudo-tasks that other models judge, or given real labelled episodes",
        source=_OURS,
    )
    policy_lr: float = setting(0.1, "step size of the scores, by Adam", source=_ROBUST, gt=0)
    entropy: float = setting(0.01, "weight of the entropy of the trust", source=_OURS, ge=0)
    explore: float = setting(0.1, "share of draws that are by chance", source=_OURS, ge=0, le=1)
    evict: bool = setting(
        True, "images of models trusted less than a quarter of an even share are dropped", source=_OURS
    )
    interpolate: float = setting(
        0.0, "share of pseudo-tasks that lie between two others", source=f"off; 0.5: {_ROBUST}", ge=0, le=1
    )
    beta: float = setting(0.5, "where between: from Beta(beta, beta)", source=_ROBUST, gt=0)
    remember: bool = setting(True, "in_turn keeps the images of models that have gone", source=_OURS)


def combined(
    pool: WhitePool,
    network: nn.Module,
    settings: Any,
    journal: Journal | None = None,
    *,
    seed: int = 0,
    embed: Embed | None = None,
    probe: nn.Module | None = None,
    validation: EpisodeSampler | None = None,
    selection: Selection | None = None,
    watch: Watch | None = None,
) -> FewShotLearner:
    """The loop with the parts that the settings name. `selection`: one made by `selection_of`, to be looked into later."""
    sound = audited(pool, settings)
    chosen = selection or selection_of(sound, settings, seed, embed=embed, probe=probe, validation=validation)
    return train(
        sound, network, settings, journal, seed=seed, embed=embed, selection=chosen, replay=replayed, watch=watch
    )


def selection_of(
    pool: WhitePool,
    settings: Any,
    seed: int,
    *,
    embed: Embed | None = None,
    probe: nn.Module | None = None,
    validation: EpisodeSampler | None = None,
) -> Any:
    """What chooses the models of an audited pool, by `settings.selection`."""
    if settings.selection == "grouped":
        return Grouped(pool, settings, seed, probe=probe, embed=embed)
    if settings.selection == "policy":
        return Trusted(pool, settings, seed, validation=validation)
    if settings.selection == "in_turn":
        return InTurn(pool, settings, seed)
    return Uniform(pool, settings, seed)
