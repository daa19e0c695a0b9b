"""Meta-learning as a function: a network and episodes go in, a learner that adapts to new tasks comes out."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spolia.catalog import METHODS, find
from spolia.core.dist import joined
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.settings import Settings
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.runs.asked import check_settings

if TYPE_CHECKING:
    from torch import Tensor, nn

    Views = Callable[[Tensor, int, Sequence[np.random.Generator]], Tensor]


def meta(
    network: nn.Module,
    episodes: Any,
    *,
    method: str = "msd",
    settings: Mapping[str, Any] | Settings | None = None,
    views: Views | None = None,
    embed: Callable[[nn.Module, Tensor], Tensor] | None = None,
    journal: Journal | str | os.PathLike[str] | None = None,
    watch: Callable[[int, Any], float] | None = None,
) -> Any:
    """Meta-train a copy of `network` on `episodes`, an EpisodeSampler or anything with `seed` and `draw(count, step)`.

    Returns a learner: `predict(support_x, support_y, query_x)` gives logits [queries, ways]. `network` has one output a
    way, or a target's; for protonet its outputs, or what `embed(network, x)` gives, are features. `views(x, count, draws)`
    makes the versions of a support that msd compares: `Augment(…).views`, or your own. With `journal`, a folder, the same
    call goes on after a kill. `watch(step, learner)` is a validation score; `learner.chosen()` has the best one's weights.
    Under torchrun every process makes the same call and takes a share of the tasks. Nothing given is changed. Raises
    SpoliaError with what does not fit, before any step.
    """
    chosen = find(method, "method")
    if chosen.family != "meta":
        known = [m.name for m in METHODS if m.family == "meta"]
        raise SpoliaError(f"{method} is no meta-learner", where="method", mend=did_you_mean(method, known))
    checked = check_settings(chosen, settings, 1)
    problems = Problems()
    if not isinstance(network, torch.nn.Module):
        problems.add("network", f"a {type(network).__name__} is no nn.Module", "give a module of torch")
    elif not any(True for _ in network.parameters()):
        problems.add("network", "has no parameters", "give a module that can be trained")
    if not callable(getattr(episodes, "draw", None)) or not hasattr(episodes, "seed"):
        mend = "give spolia.EpisodeSampler(ClassSet.of(inputs, labels))"
        problems.add("episodes", f"a {type(episodes).__name__} draws no episodes", mend)
    views_used = method == "msd" and (checked.views > 1 or checked.ensemble > 0)
    if views_used and views is None:
        mend = "give `views`: spolia.data.augment's Augment(…).views, or a function of your own"
        problems.add("views", "msd compares views of a support, and nothing makes them", mend)
    if not views_used and views is not None:
        problems.add("views", f"{method} looks at the support alone", "leave `views` away, or take msd")
    if embed is not None and method != "protonet":
        problems.add("embed", f"{method} takes the network's outputs", "leave `embed` away, or take protonet")
    problems.raise_if_any()
    more = {"views": views} if method == "msd" else {"embed": embed} if method == "protonet" else {}
    with joined() as (rank, _):
        told = journal if isinstance(journal, Journal) else Journal(journal, follow=rank > 0)
        return chosen.function()(network, episodes, checked, told, watch=watch, **more)
