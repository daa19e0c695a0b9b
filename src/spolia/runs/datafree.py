"""Data-free meta-learning as a function: a pool of classifiers goes in, a learner of new classes comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from spolia.catalog import METHODS, find
from spolia.core.dist import joined
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.settings import Settings
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.parts.white import WhitePool
from spolia.runs.asked import check_settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.episode import EpisodeSampler


def datafree(
    pool: WhitePool,
    network: nn.Module,
    *,
    method: str = "free",
    settings: Mapping[str, Any] | Settings | None = None,
    seed: int = 0,
    embed: Callable[[nn.Module, Tensor], Tensor] | None = None,
    probe: nn.Module | None = None,
    validation: EpisodeSampler | None = None,
    journal: Journal | str | os.PathLike[str] | None = None,
    watch: Callable[[int, Any], float] | None = None,
) -> Any:
    """Meta-train a copy of `network` on what the classifiers of `pool` remember. No data are touched.

    Returns a learner: `predict(support_x, support_y, query_x)` gives logits [queries, ways]. `network` takes images of the
    pool's shape in 0 … 1; class means are taken of its outputs, or of what `embed(network, x)` gives. `probe`: a network for
    `embedding: probe`. `validation`: real labelled episodes, used by `reward: real` alone. With `journal`, a folder, the
    same call goes on after a kill. `watch(step, learner)` is a validation score; `learner.chosen()` has the best one's
    weights. Under torchrun every process makes the same call, and they share the models and tasks. Nothing given is
    changed. Raises SpoliaError with what the audit of the pool found, before any step.
    """
    chosen = find(method, "method")
    if chosen.family != "datafree":
        known = [m.name for m in METHODS if m.family == "datafree"]
        raise SpoliaError(f"{method} makes nothing of a pool", where="method", mend=did_you_mean(method, known))
    checked = check_settings(chosen, settings, 1)
    problems = Problems()
    if not isinstance(pool, WhitePool):
        mend = "give spolia.WhitePool([spolia.White(…), …]), or spolia.classifiers(DESCRIPTION)"
        problems.add("pool", f"a {type(pool).__name__} is no pool of classifiers", mend)
    if not isinstance(network, torch.nn.Module):
        problems.add("network", f"a {type(network).__name__} is no nn.Module", "give a module of torch")
    elif not any(True for _ in network.parameters()):
        problems.add("network", "has no parameters", "give a module that can be trained")
    if (checked.embedding == "probe") != (probe is not None):
        mend = "give both or neither; without a probe: embedding student or cka"
        problems.add("probe", f"embedding is {checked.embedding}, a probe is {'not ' * (probe is None)}given", mend)
    if (checked.reward == "real") != (validation is not None):
        mend = "give both or neither: real episodes are used by reward real alone"
        said = f"reward is {checked.reward}, real episodes are {'not ' * (validation is None)}given"
        problems.add("validation", said, mend)
    problems.raise_if_any()
    from spolia.methods.datafree.combination import combined

    with joined() as (rank, _):
        told = journal if isinstance(journal, Journal) else Journal(journal, follow=rank > 0)
        return combined(
            pool, network, checked, told, seed=seed, embed=embed, probe=probe, validation=validation, watch=watch
        )
