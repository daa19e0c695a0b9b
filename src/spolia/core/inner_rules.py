"""What is asked of an inner loop: its rule, how it is run, and the tasks."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

from spolia.core.inner_problems import flat, mapped
from spolia.core.lazy import torch
from spolia.errors import Problems, SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

Optimizer = Literal["sgd", "momentum", "adam"]
Mode = Literal["auto", "loop", "workers", "vmap"]
_WORDS = {
    "optimizer": get_args(Optimizer),
    "order": (1, 2),
    "gradient": ("unroll", "reverse"),
    "bn": ("batch", "support", "frozen"),
}


@dataclass(frozen=True)
class Inner:
    """What an inner loop does.

    `adapt`: all parameters, the head's, the body's, or those named; the rest is shared by all tasks and gets its gradient
    too. `head`: path of the head; by default the last module that holds parameters. `order`: 2 is exact. `gradient`: keep
    the graph of all steps, or go back a step at a time in far less memory. `bn`: see core/norms.
    """

    steps: int = 5
    lr: float = 0.1
    optimizer: Optimizer = "sgd"
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    order: Literal[1, 2] = 2
    gradient: Literal["unroll", "reverse"] = "unroll"
    adapt: Literal["all", "head", "body"] | Collection[str] = "all"
    head: str = ""
    bn: Literal["batch", "support", "frozen"] = "batch"
    rates_per_step: bool = False

    def __post_init__(self) -> None:
        problems = Problems()
        for name, words in _WORDS.items():
            if getattr(self, name) not in words:
                problems.add(name, f"`{getattr(self, name)}` is unknown", f"known: {', '.join(map(str, words))}")
        if isinstance(self.adapt, str) and self.adapt not in ("all", "head", "body"):
            problems.add("adapt", f"`{self.adapt}` is unknown", "all, head, body, or a list of parameters' names")
        if self.steps < 0:
            problems.add("steps", f"{self.steps} steps cannot be taken", "give 0 or more")
        if not (math.isfinite(self.lr) and self.eps > 0):
            problems.add("lr, eps", f"{self.lr} and {self.eps} give no step", "a finite rate, eps above 0")
        if not all(0 <= decay < 1 for decay in (self.momentum, *self.betas)):
            problems.add("momentum, betas", "a decay lies in [0, 1)", "0.9 is usual")
        problems.raise_if_any()


@dataclass(frozen=True)
class Execution:
    """How tasks are run. Which mode is quickest depends on device and module: `auto` measures once and remembers.

    `chunk`: tasks in one vmap; by default as many as keep within `memory` (bytes of graphs), which bounds workers too.
    `channels_last`: by default for convolutions on a processor, outside vmap.
    """

    mode: Mode = "auto"
    chunk: int | None = None
    memory: int = 2 << 30
    workers: int | None = None
    channels_last: bool | None = None

    def __post_init__(self) -> None:
        if self.mode not in get_args(Mode):
            raise SpoliaError(f"`{self.mode}` is unknown", where="mode", mend=did_you_mean(self.mode, get_args(Mode)))
        for name in ("chunk", "memory", "workers"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise SpoliaError(f"{value} is too few", where=name, mend="give 1 or more")


@dataclass(frozen=True)
class Task:
    """What one task gives: trees (tensors in tuples, lists, dicts).

    support: every leaf [views, ...], or [views, steps, ...] with `per_step`, another support for every step.
    query: handed to `predict` under the weights of each view. start: {name: [views, *shape]}, where adapted parameters
    begin for this task alone; no gradient reaches these.
    """

    support: Any
    query: Any
    start: Mapping[str, Tensor] = field(default_factory=dict)
    per_step: bool = False

    @classmethod
    def of(cls, support_x: Tensor, support_y: Tensor, query_x: Tensor, query_y: Tensor) -> Task:
        """One view of inputs [shots, ...] and labels [shots]."""
        return cls((support_x[None], support_y[None]), (query_x, query_y))


def tasks_of(support: Any, query: Any) -> list[Task]:
    """Tasks from trees whose leaves are [tasks, views, ...] and [tasks, ...]; nothing is copied."""
    counts = {len(leaf) for leaf in (*flat(support), *flat(query))}
    if len(counts) != 1:
        raise SpoliaError(f"leaves of {sorted(counts)} tasks", where="tasks", mend="give as many tasks in every leaf")
    return [Task(mapped(lambda t, i=i: t[i], support), mapped(lambda t, i=i: t[i], query)) for i in range(counts.pop())]


def adapted_names(module: nn.Module, rule: Inner) -> list[str]:
    """Names of the parameters that the rule adapts, in the module's order. SpoliaError where it names none of them."""
    names = [name for name, _ in module.named_parameters()]
    if not isinstance(rule.adapt, str):
        for name in rule.adapt:
            if name not in names:
                raise SpoliaError(f"no parameter is called `{name}`", where="adapt", mend=did_you_mean(name, names))
        return [name for name in names if name in set(rule.adapt)]
    if rule.adapt == "all":
        return names
    holders = [path for path, part in module.named_modules() if any(True for _ in part.parameters(recurse=False))]
    head = rule.head or (holders[-1] if holders else "")
    inside = [name for name in names if name.startswith(f"{head}.")]
    if not inside or len(inside) == len(names):
        what = f"`{head}` does not part head and body"
        raise SpoliaError(what, where="head", mend=did_you_mean(head, [path for path in holders if path]))
    return inside if rule.adapt == "head" else [name for name in names if name not in set(inside)]


def cross_entropy(module: nn.Module, support: Any) -> Tensor:
    """Of a support (inputs, labels)."""
    x, y = support
    return torch.nn.functional.cross_entropy(module(x), y)


def first_of(module: nn.Module, query: Any) -> Any:
    """The module's output for a query (inputs, …)."""
    return module(query[0])


def mean_cross_entropy(outputs: Tensor, task: Task) -> Tensor:
    """Of a query (inputs, labels), mean over views: outputs [views, queries, classes]."""
    return torch.nn.functional.cross_entropy(outputs.flatten(0, 1), task.query[1].repeat(len(outputs)))


def dropping(module: nn.Module) -> bool:
    """Whether dropout is active in it."""
    kind = torch.nn.modules.dropout._DropoutNd
    return any(isinstance(layer, kind) and layer.training and layer.p > 0 for layer in module.modules())
