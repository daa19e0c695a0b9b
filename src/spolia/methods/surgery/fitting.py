"""What `surgery` and `deep` share: their settings, what they check and load first, and the bias on other inputs.

Yang et al., Representation Surgery for Multi-Task Model Merging, ICML 2024, arXiv 2402.02705; the same, SurgeryV2, 2024,
arXiv 2410.14389.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from pydantic import model_validator

from spolia.core.lazy import torch
from spolia.core.settings import LearnedSettings, setting
from spolia.errors import SpoliaError
from spolia.methods.surgery.states import Match, bias_rows, distances, states
from spolia.methods.surgery.stopping import Stopping
from spolia.parts.examples import Examples, by_task
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network
from spolia.parts.sites import Site, find_sites

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.bottleneck import Adapters
    from spolia.parts.surgered import SurgeredModel

Watch = Callable[[str, float, "SurgeredModel"], Mapping[str, float]]
"""Told along a stream: the task, the share of its inputs seen, the model so far. What it returns stands in the facts."""

_CODE = "the authors' code"


class SurgerySettings(LearnedSettings):
    """What both methods can be told."""

    base: ClassVar[str] = "optional"  # as the merge asks

    merge: str = setting("task_arithmetic", "the merge that comes first, in a recipe", source="Yang et al. 2024")
    merge_settings: dict[str, Any] = setting({}, "its settings; what is left out has its default", source="ours")
    rank: int = setting(
        16, "r, width of a bottleneck; a closed form uses no more than the feature's", source=_CODE, ge=1
    )
    solver: Literal["adam_l1", "adam_l2", "closed_form", "closed_form_then_adam"] = setting(
        "adam_l1",
        "Adam on the mean absolute or squared distance; least squares in one pass; or from there on with Adam on the "
        "absolute one, the bottleneck staying linear",
        source="Yang et al. 2024",
    )
    lr: float = setting(
        3e-3,
        "step size of Adam; the authors' 1e-3 acted as about 2.8e-3, see the page",
        source=_CODE + " at eight tasks",
        gt=0,
    )
    steps: int = setting(1000, "steps of a task: twice 500 iterations", source=_CODE, ge=1)
    batch: int = setting(16, "inputs of a task in a step", source=_CODE, unit="inputs", ge=1)
    patience: int | None = setting(
        None,
        "looks in a row without a smaller distance on inputs kept apart that end a task's steps; the best look is kept; "
        "null: all steps and all inputs",
        source="ours",
        ge=1,
    )
    held_out: float = setting(0.2, "share of the inputs kept apart, with `patience`", source="ours", gt=0, lt=1)
    check_every: int = setting(25, "steps between looks, with `patience`", source="ours", ge=1)
    ridge: float = setting(
        1e-2, "penalty of the closed form, in mean squares of a feature", source="ours, see the page", ge=0
    )
    online: bool = setting(
        False, "one pass over the inputs, in place of `steps` (with batch: 1 as published)", source=_CODE
    )
    share: Literal["task", "one"] = setting(
        "task", "a bottleneck for each task, or one for all, which needs no task told", source="Yang et al. 2024"
    )
    protocol: Literal["held_out", "transductive"] = setting(
        "held_out",
        "whose inputs are given: others than those it is judged on, or the very same, as in the papers",
        source="ours; the papers: transductive",
    )
    last: str | None = setting(
        None, "module that gives the final feature; null: what the network returns", source="ours"
    )
    chunk: int = setting(256, "inputs in a forward pass outside the steps", source="ours", unit="inputs", ge=1)

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if self.online and self.patience is not None:
            raise ValueError("patience: a stream is seen once and has no stopping rule; leave one of the two away")
        return self

    @property
    def linear(self) -> bool:
        """Whether the bottlenecks are those of the closed form."""
        return self.solver in ("closed_form", "closed_form_then_adam")

    @property
    def squared(self) -> bool:
        """Whether Adam minimises squares."""
        return self.solver == "adam_l2"

    def distance(self, gap: Tensor) -> Tensor:
        """What Adam minimises the mean of, entry by entry."""
        return gap.square() if self.squared else gap.abs()

    def stopping(self) -> Stopping:
        return Stopping(self.patience, self.check_every)


@dataclass(frozen=True)
class Work:
    """What a fit stands on. `groups`: the tasks that share a set of bottlenecks. `held`: inputs that stop the steps."""

    body: Network  # the merged weights inside, frozen: merged once
    pool: ExpertPool
    tasks: list[str]
    examples: dict[str, Examples]
    sites: list[Site]
    groups: list[list[str]]
    print: str
    held: Mapping[str, Examples] = field(default_factory=dict)

    def expert(self, task: str) -> Network:
        """The network with the weights of the expert of `task`, frozen. Drop it to free them."""
        from spolia.parts.surgered import merged_network, state_of

        expert = self.pool.experts[self.tasks.index(task)]
        with expert.weights.opened():
            return merged_network(self.body, state_of(expert.weights))

    def targets(self, task: str, match: Match, chunk: int) -> list[Tensor]:
        """What the expert of `task` has at every site, cached once."""
        return states(self.expert(task), self.sites, self.examples[task], match, chunk)

    def apart(self) -> Work:
        """The same with the inputs kept apart in the place of the others."""
        return replace(self, examples=dict(self.held))


def prepare(
    merged: Mapping[str, Tensor],
    pool: ExpertPool,
    network: Network,
    unlabelled: Mapping[str, Any],
    settings: SurgerySettings,
    where: str,
    seed: int = 0,
) -> Work:
    """Checks everything, puts the merged weights into a copy of the network, finds the sites, keeps inputs apart."""
    from spolia.parts.bottleneck import fingerprint
    from spolia.parts.surgered import merged_network

    tasks = [expert.name for expert in pool.experts]
    if len(set(tasks)) < len(tasks):
        raise SpoliaError("two experts have one name", where="experts", mend="give a mapping of names to experts")
    network.check_tasks(tasks)
    examples = by_task(unlabelled, tasks)
    body = merged_network(network, merged)
    first = examples[tasks[0]]
    sites = find_sites(body, first.batch(range(min(3, len(first)))), where, settings.last or "")
    groups = [tasks] if settings.share == "one" else [[task] for task in tasks]
    held: dict[str, Examples] = {}
    if settings.patience is not None and settings.solver != "closed_form":
        _check_enough(examples)
        parts = {task: given.split(settings.held_out, seed) for task, given in examples.items()}
        examples, held = ({task: part[i] for task, part in parts.items()} for i in (0, 1))
    return Work(body, pool, tasks, examples, sites, groups, fingerprint(body.module.state_dict()), held)


def _check_enough(examples: Mapping[str, Examples]) -> None:
    for task, given in examples.items():
        if len(given) < 2:
            mend = "give two or more, or leave `patience` away"
            raise SpoliaError("one input cannot be parted", where=f"unlabelled.{task}", mend=mend)


def identity(work: Work, settings: SurgerySettings, seed: int, method: str) -> Adapters:
    """New bottlenecks, which change nothing yet. Every task's are drawn by name: no task moves another's."""
    from spolia.parts.bottleneck import Adapters, Bottleneck

    sets = [
        [Bottleneck.drawn(site.width, settings.rank, seed, *group, site.label) for site in work.sites]
        for group in work.groups
    ]
    device = next(iter(work.body.module.parameters())).device
    facts = {
        "method": method,
        "settings": settings.model_dump(mode="json"),
        "seed": seed,
        "protocol": settings.protocol,
        "inputs": {task: len(examples) for task, examples in work.examples.items()},
    }
    if work.held:
        facts["kept apart"] = {task: len(examples) for task, examples in work.held.items()}
    return Adapters(work.tasks, work.sites, sets, fingerprint=work.print, facts=facts).to(device)


def finished(work: Work, adapters: Adapters, bias: dict[str, Any], losses: dict[str, Any], stream: Any, centroids: Any):
    """The model, its facts complete."""
    from spolia.parts.surgered import SurgeredModel

    for task, rows in bias.items():
        if not all(math.isfinite(row["before"]) for row in rows):
            mend = "look for NaN in its inputs, in the experts and in the merged weights"
            raise SpoliaError("the models' states are not finite", where=f"unlabelled.{task}", mend=mend)
        if not all(math.isfinite(row["after"]) for row in rows):
            mend = "choose a smaller lr, or solver=closed_form"
            raise SpoliaError(f"the fit of {task} has diverged", where="settings.lr", mend=mend)
    adapters.facts |= {"parameters": adapters.count, "bias": bias, "losses": losses}
    if stream:
        adapters.facts["stream"] = stream
    adapters.register_buffer("centroids", torch.stack(centroids))
    return SurgeredModel(work.body, adapters)


def curve(losses: Tensor) -> list[float]:
    """A history short enough to be kept: means of up to 100 stretches."""
    return [float(part.mean()) for part in losses.tensor_split(min(100, len(losses)))]


def measure_bias(
    model: SurgeredModel, pool: ExpertPool, inputs: Mapping[str, Any], match: Match = "mean", chunk: int = 256
) -> dict[str, list[dict[str, Any]]]:
    """Bias on other inputs than those fitted to, for each task and site, before and after: see `bias_rows`."""
    tasks, sites, body = model.adapters.tasks, model.adapters.sites, model.network
    work = Work(body, pool, tasks, by_task(inputs, tasks, "inputs"), sites, [], "")
    rows = {}
    for task in tasks:
        targets = work.targets(task, match, chunk)
        examples = work.examples[task]
        before = distances(body, sites, examples, targets, match, chunk)
        after = distances(body, sites, examples, targets, match, chunk, model.adapters, task)
        rows[task] = bias_rows(sites, targets, before, after)
    return rows
