"""Surgery as a function: a merged model, its experts and inputs without labels go in, a repaired model comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spolia.catalog import METHODS, find
from spolia.core.dist import joined
from spolia.core.journal import Journal
from spolia.core.settings import Settings
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.parts.examples import by_task
from spolia.parts.expert import ExpertPool
from spolia.parts.learned import Learned
from spolia.parts.network import Network
from spolia.parts.watch import seen_before
from spolia.runs.verbs import check_settings

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.surgered import SurgeredModel


def surgery(
    merged: Any,
    experts: Mapping[str, Any] | Sequence[Any],
    *,
    network: Network,
    unlabelled: Mapping[str, Any],
    base: Any = None,
    method: str = "surgery",
    settings: Mapping[str, Any] | Settings | None = None,
    tested_on: Mapping[str, Any] | None = None,
    journal: Journal | str | os.PathLike[str] | None = None,
    seed: int = 0,
    watch: Callable[[str, float, SurgeredModel], Mapping[str, float]] | None = None,
) -> SurgeredModel:
    """Repair a merged model task by task, by small adapters fitted to what each expert computes.

    `merged` is a state dict, what `spolia.merge` returned, a module or a model folder; `experts` are given as to `merge`
    (adapters of LoRA alone need `base`). `network` runs them all; `unlabelled` maps each expert's name to inputs of its
    task. `method` is surgery, or deep. `tested_on`, inputs by task, are compared with the unlabelled ones. With `journal`,
    a folder, the same call goes on after a kill. `watch(task, share, model)` is called along the stream where the setting
    `online` is on. Under torchrun every process makes the same call, and they share the inputs. Nothing given is changed.
    Raises SpoliaError with what does not fit, before anything is fitted.
    """
    from spolia.runs.references import located

    chosen = find(method, "method")
    if chosen.family != "surgery":
        known = [m.name for m in METHODS if m.family == "surgery"]
        raise SpoliaError(f"{method} is no surgery", where="method", mend=did_you_mean(method, known))
    checked = check_settings(chosen, settings, len(experts))
    problems = Problems()
    if not isinstance(network, Network):
        problems.add("network", f"a {type(network).__name__} is no Network", "wrap it: spolia.Network(module, heads)")
    if not isinstance(unlabelled, Mapping):
        problems.add("unlabelled", f"a {type(unlabelled).__name__} is no mapping", "give {task: inputs}, one an expert")
    problems.raise_if_any()
    pool = ExpertPool.of(experts if isinstance(experts, Mapping) else list(experts), base, located)
    inputs = by_task(unlabelled, [expert.name for expert in pool.experts])
    seen = _seen(inputs, tested_on)
    with joined() as (rank, _):
        if not isinstance(journal, Journal):
            journal = Journal(journal, follow=rank > 0)
        model = chosen.function()(
            weights_of(merged), pool, network, inputs, checked, journal=journal, seed=seed, watch=watch
        )
    if seen:
        model.adapters.facts["tested on"] = seen
    return model


def weights_of(merged: Any) -> Mapping[str, Tensor]:
    """The tensors of a merged model, however it is given."""
    from spolia.parts.surgered import state_of

    if isinstance(merged, Learned):
        return merged.weights
    if isinstance(merged, Mapping):
        return merged
    (expert,) = ExpertPool.of({"merged": merged}).experts
    with expert.weights.opened():
        return state_of(expert.weights)


def _seen(inputs: Mapping[str, Any], tested_on: Mapping[str, Any] | None) -> dict[str, Any]:
    """How many inputs of each test are among those fitted to."""
    if tested_on is None:
        return {}
    tests = by_task(tested_on, list(inputs), "tested_on")
    return {t: {"inputs": len(e), "fitted to too": seen_before(e, [inputs[t]])} for t, e in tests.items()}
