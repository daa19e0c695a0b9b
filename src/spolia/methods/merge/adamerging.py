"""AdaMerging: learns how much of each expert to add, tensor by tensor, from inputs without labels.

For experts of one base, their heads, and some inputs of every task; it takes the place of a search for the scale. Yang et
al., AdaMerging: Adaptive Model Merging for Multi-Task Learning, ICLR 2024, arXiv 2310.02575.

    theta^l = theta_0^l + sum_k lambda_k^l tau_k^l,    lambda = argmin sum_k mean_{x in B_k} H(softmax f_k(x; theta))

| paper | here |
|---|---|
| lambda_k^l, layer-wise or task-wise | `Learned.coefficients`; `granularity: tensor` or `task` |
| tau_k | rows of the stack in `Combination` |
| f_k | `network.logits(task, batch)`: the shared network under the frozen head of the task |
| AdaMerging++ | `preprocess: ties`: each tau_k trimmed and freed of signs that were not elected, but kept apart |

dL/dlambda_k^l = <dL/dtheta^l, tau_k^l> exactly, so nothing is differentiated through the models: one merge, a backward pass
a task, or one for several whose inputs are few, one projection. Data touched: inputs of every task without labels
(`objective: labels` and `guard: accuracy` ask for labels); the paper takes the test inputs, here whoever calls says which.

Departures: one batch a task and step, where the published code sums two (`batches_per_step: 2`); coefficients are clamped
after the step, where the code's clamp in the graph leaves those outside [0, 1] without gradient (`clamp: graph`); a share
of the inputs is kept apart, and of all steps looked at the one that agrees most with the experts there is returned: entropy
can fall while answers get worse. Float buffers are combined like weights, with no gradient of their own; running
statistics are found anew.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from spolia.core.dist import world
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.core.settings import LearnedSettings, PerModel, each, setting
from spolia.errors import SpoliaError
from spolia.methods.merge.awd import Disentangling
from spolia.methods.merge.preprocess import Trimming, step_of
from spolia.parts.adaptation import Batch, Objective, check_inputs, consulted, restated
from spolia.parts.combination import Combination, fitted
from spolia.parts.examples import by_task
from spolia.parts.expert import ExpertPool
from spolia.parts.layers import grouped
from spolia.parts.learned import Learned
from spolia.parts.network import Network
from spolia.parts.pieces import Storage
from spolia.parts.preprocessed import Step
from spolia.parts.watch import Watch, better, told

if TYPE_CHECKING:
    from torch import Tensor

_YANG, _OURS = "Yang et al. 2024", "our choice"
_PRESETS = {"paper": (500, 1e-3), "fast": (150, 1e-2)}  # steps, learning rate


class AdaMerging(LearnedSettings):
    """Settings of `adamerging`."""

    vectors: ClassVar[bool] = True

    granularity: Literal["task", "tensor", "module", "block"] = setting(
        "tensor",
        "what shares one coefficient of an expert: the whole model, or a tensor, module or block",
        source=_YANG,
    )
    groups: dict[str, str] | None = setting(
        None, "names of tensors (regular expressions, whole names) to groups of your own", source=_OURS
    )
    preprocess: Literal["none", "ties", "awd"] = setting(
        "none", "what is done to the task vectors first; ties is AdaMerging++", source=_YANG
    )
    density: float = setting(0.2, "share that ties keeps of a task vector", source=_YANG, gt=0, le=1)
    objective: Literal["entropy", "normalised_entropy", "information", "expert", "labels"] = setting(
        "entropy",
        "what is minimised: entropy, that over log of the classes, entropy less diversity, distance to the task's expert, "
        "or cross-entropy where labels are given",
        source=_YANG,
    )
    diversity: float = setting(1.0, "weight of the mean prediction's entropy in `information`", source=_OURS, ge=0)
    preset: Literal["paper", "fast"] = setting("paper", "500 steps at 1e-3, or 150 at 1e-2", source=_YANG)
    steps: int | None = setting(None, "steps; by default the preset's", source=_YANG, ge=0)
    lr: float | None = setting(None, "learning rate of Adam; by default the preset's", source=_YANG, gt=0)
    batch: int = setting(16, "inputs of a task and batch", source=_YANG, ge=1)
    batches_per_step: int = setting(1, "batches of a task and step, summed", source=f"{_OURS}; published code: 2", ge=1)
    micro_batch: int | None = setting(
        None, "inputs of a forward pass, which tasks share; by default 8, or the batch if larger", source=_OURS, ge=1
    )
    tasks_per_step: int | None = setting(None, "tasks drawn for each step; by default all", source=_YANG, ge=1)
    task_weight: PerModel = setting(1.0, "weight of each task's loss", source=_YANG)
    start: PerModel = setting(0.3, "coefficients at the start", source=_YANG)
    clamp: Literal["project", "graph", "none"] = setting(
        "project", "keep coefficients in [0, 1]: after the step, or as the published code does", source=_OURS
    )
    pull: float = setting(0.0, "weight of the squared distance from the start", source=_YANG, ge=0)
    batchnorm: Literal["reestimate", "average"] = setting(
        "reestimate", "running statistics: found anew on the inputs, or the experts' mean", source=_OURS
    )
    guard: Literal["agreement", "divergence", "accuracy", "none"] = setting(
        "agreement",
        "what decides which step is returned: agreement with the experts' answers, KL from their probabilities (their "
        "logits on the inputs kept apart stay in memory), accuracy where labels are given; none: the last step",
        source=_OURS,
    )
    held_out: float = setting(0.2, "share of the inputs kept apart for the guard", source=_OURS, ge=0, lt=1)
    held_out_most: int = setting(256, "inputs of a task looked at for the guard, at most", source=_OURS, ge=1)
    check_every: int = setting(25, "steps between looks at them", source=_OURS, ge=1)
    stack_dtype: Literal["float32", "bfloat16"] = setting(
        "float32", "type the task vectors are held in; bfloat16 halves the memory", source=_OURS
    )
    stack_place: Literal["device", "cpu", "disk"] = setting(
        "device", "where they are held: beside the network, in main memory, or in a mapped file", source=_OURS
    )

    @field_validator("groups")
    @classmethod
    def _compiles(cls, value: dict[str, str] | None) -> dict[str, str] | None:
        for pattern in value or ():
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"`{pattern}` is no regular expression: {error}") from None
        return value

    @property
    def schedule(self) -> tuple[int, float]:
        """Steps and learning rate."""
        steps, lr = _PRESETS[self.preset]
        return (steps if self.steps is None else self.steps), (lr if self.lr is None else self.lr)


def adamerging(
    pool: ExpertPool,
    network: Network,
    unlabelled: Mapping[str, Any],
    settings: AdaMerging,
    journal: Journal | None = None,
    seed: int = 0,
) -> Learned:
    """Merged weights, their coefficients by tensor, and what was seen. `unlabelled`: inputs by task, one task an expert."""
    tasks = [expert.name for expert in pool.experts]
    given = by_task(unlabelled, tasks)
    fitted(pool, network)
    check_inputs(network, given, labels=settings.objective == "labels")
    journal = journal or Journal()
    parts = {task: given[task].split(settings.held_out, seed) for task in tasks}
    inputs = {task: rest for task, (rest, _) in parts.items()}
    held = {task: apart.first(settings.held_out_most) for task, (_, apart) in parts.items()}
    watch = Watch(held, measures=settings.guard == "divergence")
    if settings.guard == "accuracy" and watch.tasks and not watch.can("accuracy"):
        raise SpoliaError(
            "no labels are given", where="unlabelled", mend="Examples(inputs, labels), or another `guard`"
        )
    steps, lr = settings.schedule
    with pool.opened():
        storage = Storage(settings.stack_dtype, settings.stack_place, journal.folder)
        combination = Combination.of(pool, network, _steps(settings), storage, seed)
        teachers = consulted(combination, watch, inputs, settings, steps, seed)
        search = _Search(combination, Objective(inputs, settings, teachers), watch, settings, lr, seed)
        with journal.phase("adapt"):
            for step in journal.steps(steps, search.keep(), shared=True):
                if step % settings.check_every == 0:
                    search.look(step)
                losses = search.move(step)
                journal.log(loss=sum(losses.values()), **{f"loss {task}": loss for task, loss in losses.items()})
            search.look(steps)
        search.write(search.best["coefficients"])
        return Learned(combination.weights(), search.coefficients(), search.facts())


class _Search:
    """The coefficients on their way: lambda [groups, experts], Adam's state, the best so far, what was seen."""

    def __init__(
        self, combination: Combination, objective: Objective, watch: Watch, settings: AdaMerging, lr: float, seed: int
    ):
        self.combination, self.objective, self.watch = combination, objective, watch
        self.settings, self.seed = settings, seed
        self.guard = settings.guard if watch.can(settings.guard) else "none"
        places, self.groups = grouped(combination.names, settings.granularity, settings.groups or {})
        self.group = torch.tensor(places, dtype=torch.int64)  # [tensors]
        start = each(settings.start, len(objective.inputs))
        self.start = torch.tensor(start, dtype=torch.float64).repeat(len(self.groups), 1)
        self.lam = self.start.clone()
        self.adam = torch.optim.Adam([self.lam], lr=lr, betas=(0.9, 0.999))
        self.best: dict[str, Any] = {}
        self.history: list[dict[str, Any]] = []

    def keep(self) -> dict[str, Any]:
        """All that changes across steps."""
        made = {"reached": self.combination.reached, "statistics": self.combination.statistics}
        return made | {"coefficients": self.lam, "adam": self.adam, "best": self.best, "history": self.history}

    def used(self) -> Tensor:
        """The coefficients that the weights are made with."""
        return self.lam.clamp(0, 1) if self.settings.clamp == "graph" else self.lam.clone()

    def write(self, coefficients: Tensor) -> None:
        """Set the weights, and the running statistics that belong to them."""
        self.combination.write(coefficients[self.group])
        if self.settings.batchnorm == "reestimate":
            restated(self.combination, self.objective.inputs, self.settings.batch)

    def look(self, step: int) -> None:
        """See how the coefficients do on the inputs kept apart, and keep them if none did better."""
        self.write(self.used())
        seen = {"step": step, **self.watch.look(self.combination.network)}
        self.history.append(seen)
        if self.guard == "none" or better(seen, self.best.get("seen"), self.guard):
            self.best.update(seen=seen, coefficients=self.used())

    def move(self, step: int) -> dict[str, float]:
        """One step of Adam; the losses before it."""
        self.combination.write(self.used()[self.group])
        losses, slopes = gradient(self.combination, self.objective, self.settings, step, self.seed)
        slope = torch.zeros_like(self.lam).index_add_(0, self.group, slopes)
        slope += 2 * self.settings.pull * (self.lam - self.start)
        if self.settings.clamp == "graph":
            slope *= (self.lam >= 0) & (self.lam <= 1)
        self.lam.grad = slope
        self.adam.step()
        if self.settings.clamp == "project":
            self.lam.clamp_(0, 1)
        return losses

    def coefficients(self) -> dict[str, tuple[float, ...]]:
        """Of every tensor that is a combination of the experts'."""
        final = self.best["coefficients"][self.group].tolist()
        named = {name: tuple(row) for name, row in zip(self.combination.names, final, strict=True)}
        if self.settings.batchnorm == "average":
            count = len(self.objective.inputs)
            named |= dict.fromkeys(self.combination.statistics, (1 / count,) * count)
        return named

    def facts(self) -> dict[str, Any]:
        """What the report tells."""
        return {
            "method": "adamerging",
            "settings": self.settings.model_dump(mode="json"),
            "preprocess": [step.to_dict() for step in self.combination.pool.steps],
            "groups": len(self.groups),
            "no gradient": self.combination.unreached,
            "inputs": told(self.objective.inputs, self.watch.held),
            "labels used": self.objective.uses_labels or self.guard == "accuracy",
            "processes": world()[1],
            "guard": self.guard,
            "start": self.history[0],
            "kept": self.best["seen"],
            "last": self.history[-1],
            "history": [{k: v for k, v in seen.items() if k != "tasks"} for seen in self.history],
            "warnings": self._warnings(),
        }

    def _warnings(self) -> list[str]:
        first, last, kept = self.history[0], self.history[-1], self.best["seen"]
        found = []
        if self.settings.guard != self.guard:
            found.append("no inputs are kept apart: nothing guards against answers that get worse")
        for task in self.watch.collapsed(kept):
            found.append(f"{task}: predictions have collapsed to few classes, which its expert does not do")
        if self.watch.tasks and last["entropy"] < first["entropy"] and last["agreement"] < first["agreement"]:
            said = f"entropy fell from {first['entropy']:.3f} to {last['entropy']:.3f} while agreement with the experts fell"
            found.append(f"{said} from {first['agreement']:.1%} to {last['agreement']:.1%}: the tasks conflict")
        if "divergence" in last and last["entropy"] < first["entropy"] and last["divergence"] > first["divergence"]:
            said = f"entropy fell from {first['entropy']:.3f} to {last['entropy']:.3f} while KL from the experts grew"
            found.append(f"{said} from {first['divergence']:.3f} to {last['divergence']:.3f}: it is no guide here")
        return found


def gradient(
    combination: Combination, objective: Objective, settings: AdaMerging, step: int, seed: int
) -> tuple[dict[str, float], Tensor]:
    """The loss of each task at a step, and the gradient of every tensor's coefficients [tensors, experts], fp64."""
    tasks = list(objective.inputs)
    weights = dict(zip(tasks, each(settings.task_weight, len(tasks)), strict=True))
    if settings.tasks_per_step is not None and settings.tasks_per_step < len(tasks):
        drawn = generator(seed, "tasks", step).permutation(sorted(tasks))[: settings.tasks_per_step]
        weights = {task: w * len(tasks) / len(drawn) for task, w in weights.items() if task in drawn}
    numbers = range(step * settings.batches_per_step, (step + 1) * settings.batches_per_step)
    batches = [
        Batch(task, objective.inputs[task].drawn(settings.batch, seed, number), weight)
        for task, weight in weights.items()
        for number in numbers
    ]
    losses = objective.backward(combination.network, batches)
    return objective.everywhere(losses, combination.projected())


def _steps(settings: AdaMerging) -> tuple[Step, ...]:
    if settings.preprocess == "ties":
        return (step_of("ties", Trimming(density=settings.density)),)
    return (step_of("awd", Disentangling()),) if settings.preprocess == "awd" else ()
