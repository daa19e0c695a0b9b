"""The inner loop: a module adapted to every task in a few steps, and the gradient of how well that went.

    loop = InnerLoop(module, Inner(steps=5, lr=0.1))
    found = loop.gradient(tasks)                    # tasks: [Task.of(support_x, support_y, query_x, query_y), ...]
    found.write(module)                             # sets .grad; any optimizer of torch takes it from there

    theta_v = K steps on the v-th view of the support, from theta,    gradient of mean over tasks of
    outer(predict(theta_1, query) … predict(theta_V, query))          in theta, and in the rates of the steps if wanted

For any module: its weights are swapped in replicas that share its parameters, its norms by those of core/norms. The steps
and the ways through them are in inner_steps, the ways tasks are run in inner_running. First and second order are different
directions: nothing ever switches between them by itself.

Inside a process group every process is given all tasks and works on its share; losses and gradients are summed. One
process and several agree to rounding, as the modes do among each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core import inner_running as running
from spolia.core import inner_steps as steps
from spolia.core.dist import summed, world
from spolia.core.inner_problems import Replica, Single
from spolia.core.inner_rules import (
    Execution,
    Inner,
    Task,
    adapted_names,
    cross_entropy,
    dropping,
    first_of,
    mean_cross_entropy,
    tasks_of,
)
from spolia.core.lazy import torch
from spolia.errors import Problems, SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.inner_steps import Slope, Weights
__all__ = ["Execution", "Found", "Inner", "InnerLoop", "Task", "tasks_of"]


@dataclass
class Found:
    """`loss`: mean of the outer losses [tasks]. `gradient`: of that mean. `outputs`: of the tasks `places`, those of this
    process, each [views, queries, ...]."""

    loss: float
    losses: Tensor
    outputs: list[Any]
    places: range
    gradient: Weights
    rates: Weights

    def write(self, target: nn.Module | Mapping[str, Tensor]) -> None:
        """Set .grad of a module's parameters, or of tensors by name."""
        named = target if isinstance(target, Mapping) else dict(target.named_parameters())
        for name, tensor in named.items():
            if name in self.gradient:
                tensor.grad = self.gradient[name]


class InnerLoop:
    """Adapts a module to tasks. `loss(module, support)` is a scalar; `predict(module, query)` a tensor or a tree of them.

    `choice` holds what `auto` has found; kept in a journal, a resumed run takes the same way, to the bit.
    """

    def __init__(
        self,
        module: nn.Module,
        rule: Inner,
        how: Execution | None = None,
        *,
        loss: Callable[[nn.Module, Any], Tensor] = cross_entropy,
        predict: Callable[[nn.Module, Any], Any] = first_of,
    ):
        self.module, self.rule, self.how = module, rule, how or Execution()
        self.loss, self.predict = loss, predict
        self.adapted_names = adapted_names(module, rule)
        self.choice: dict[str, Any] = {}
        self._held: dict[str, int] = {}  # bytes that one task's graphs keep, counted once
        self._replicas = running.Replicas(module, rule.bn)
        self._replicas.get(1)  # norms that cannot be swapped are told now

    def gradient(
        self,
        tasks: Iterable[Task],
        outer: Callable[[Any, Task], Tensor] = mean_cross_entropy,
        params: Mapping[str, Tensor] | None = None,
        rates: Mapping[str, Tensor] | None = None,
    ) -> Found:
        """The mean outer loss of `tasks` and its gradient in `params` (the module's own by default) and `rates`.

        `outer(outputs, task)` sees all views of one task at once. Under vmap it may not look at values.
        """
        tasks, (rank, count) = self._checked(tasks), world()
        places = range(len(tasks) * rank // count, len(tasks) * (rank + 1) // count)
        start, shared, rates = self._weights(params, rates)
        way = steps.first_order if self.rule.order == 1 else steps.unrolled
        if self.rule.order == 2 and self.rule.gradient == "reverse":
            if dropping(self.module):
                mend = 'take gradient="unroll", or call eval() on the module'
                raise SpoliaError("dropout would draw anew where steps are done again", where="gradient", mend=mend)
            way = steps.reverse
        losses = torch.zeros(len(tasks), dtype=torch.float64)
        found = Found(0.0, losses, [], places, {n: torch.zeros_like(t) for n, t in (start | shared).items()}, {})
        found.rates = {n: torch.zeros_like(t) for n, t in rates.items()}

        def take(slope: Slope) -> None:
            first = places.start + len(found.outputs)
            found.outputs += slope.outputs
            losses[first : places.start + len(found.outputs)] = slope.losses.to(losses)
            steps.add(found.gradient, slope.start | slope.shared)
            steps.add(found.rates, slope.rates)

        def job(problem: Any) -> Slope:
            with torch.enable_grad():
                return way(self.rule, problem, problem.replica.laid(start), problem.replica.laid(shared), rates)

        self._run("gradient", tasks[places.start : places.stop], outer, job, take)
        for tensor in (losses, *found.gradient.values(), *found.rates.values()):
            summed(tensor)
        for tensor in (*found.gradient.values(), *found.rates.values()):
            tensor /= len(tasks)
        found.loss = losses.mean().item()
        return found

    def outputs(
        self,
        tasks: Iterable[Task],
        params: Mapping[str, Tensor] | None = None,
        rates: Mapping[str, Tensor] | None = None,
    ) -> list[Any]:
        """What the adapted module predicts, [views, queries, ...] for each task given. Leaves nothing behind."""
        return self._ends(tasks, params, rates, "outputs")

    def adapted(
        self,
        tasks: Iterable[Task],
        params: Mapping[str, Tensor] | None = None,
        rates: Mapping[str, Tensor] | None = None,
    ) -> list[Weights]:
        """The adapted parameters, {name: [views, *shape]} for each task given."""
        return self._ends(tasks, params, rates, "adapted")

    def rates(self, lr: float | None = None, elementwise: bool = False) -> Weights:
        """Rates to learn, one a tensor or one an element, at `lr` (the rule's by default); a step each if the rule says so."""
        named, made = dict(self.module.named_parameters()), {}
        for name in self.adapted_names:
            shape = tuple(named[name].shape) if elementwise else ()
            shape = (self.rule.steps, *shape) if self.rule.rates_per_step else shape
            made[name] = named[name].new_full(shape, self.rule.lr if lr is None else lr).requires_grad_()
        return made

    def explain(self) -> str:
        """Which mode is taken, and why."""
        if self.how.mode != "auto":
            return f"{self.how.mode}: as asked"
        if not self.choice:
            return "auto: nothing was measured yet"
        lines = []
        for kind, seen in self.choice.items():
            rates = ", ".join(f"{mode} {1 / s:.3g}" for mode, s in seen["seconds"].items())
            where = f"{seen['device']}, {seen['threads']} threads"
            line = f"{kind}: {seen['mode']}; tasks a second on {where}: {rates}"
            lines.append("; ".join([line, *(f"{mode} cannot: {why}" for mode, why in seen["refused"].items())]))
        return "\n".join(lines)

    def _ends(
        self, tasks: Iterable[Task], params: Mapping[str, Tensor] | None, rates: Mapping[str, Tensor] | None, kind: str
    ) -> list[Any]:
        """Outputs or adapted weights of every task."""
        tasks = self._checked(tasks)
        start, shared, rates = self._weights(params, rates)
        made: list[Any] = []

        def job(problem: Any) -> list[Any]:
            begun, rest = problem.replica.laid(start), problem.replica.laid(shared)
            ends = []
            for i in range(problem.count):
                end = begun
                for weights, _, _ in steps.walk(self.rule, problem, i, begun, rest, rates):
                    end = weights
                ends.append(end)
            with torch.no_grad():
                return problem.outputs(ends, rest) if kind == "outputs" else problem.parted(ends)

        self._run(kind, tasks, None, job, made.extend)
        return made

    def _run(
        self,
        kind: str,
        tasks: Sequence[Task],
        outer: Callable[[Any, Task], Tensor] | None,
        job: Callable[[Any], Any],
        take: Callable[[Any], None],
    ) -> None:
        """`take(job(problem))` over the tasks, the way that was asked for or measured."""
        if not tasks:
            return  # this process's share

        def held() -> int:
            if kind not in self._held:
                (replica,) = self._ready("loop", 1, outer)
                self._held[kind] = running.held_by(job, Single(replica, tasks[0]), self._path())
            return self._held[kind]

        def tried(mode: str, tasks: Sequence[Task], take: Callable[[Any], None]) -> int:
            plan = running.planned(mode, self.how, tasks, held)
            running.run(plan, self._ready(mode, plan.workers, outer), tasks, job, take)
            return len(tasks)

        mode, random = self.how.mode, dropping(self.module)
        if mode == "auto":
            if kind not in self.choice and len(modes := running.candidates(tasks, self.how, random)) > 1:
                sample = tasks[: 2 * running.cores()]
                device = self._device().type
                self.choice[kind] = running.measured(modes, lambda mode: tried(mode, sample, lambda _: None), device)
            mode = self.choice[kind]["mode"] if kind in self.choice else "loop"
            mode = "loop" if len(tasks) == 1 and mode == "workers" else mode
        if random and mode == "workers":
            mend = 'take mode="loop" or "vmap", or call eval() on the module'
            raise SpoliaError("dropout would draw in the order of the threads", where="mode", mend=mend)
        tried(mode, tasks, take)

    def _ready(self, mode: str, count: int, outer: Callable[[Any, Task], Tensor] | None) -> list[Replica]:
        """Replicas for a mode, with the functions that are asked of them."""
        from spolia.core.norms import fuse

        last = self.how.channels_last
        if last is None:
            convolves = any(isinstance(layer, torch.nn.Conv2d) for layer in self.module.modules())
            last = convolves and self._device().type == "cpu" and mode != "vmap"
        made = []
        for module in self._replicas.get(count):
            layers = fuse(module, mode != "vmap")
            made.append(Replica(module, layers, self.loss, self.predict, outer, self.rule.bn == "support", last))
        return made

    def _weights(
        self, params: Mapping[str, Tensor] | None, rates: Mapping[str, Tensor] | None
    ) -> tuple[Weights, Weights, Weights]:
        """Parameters that are adapted, those that are not, and rates."""
        named = dict(self.module.named_parameters())
        given = {name: t.detach() for name, t in (named if params is None else params).items()}
        problems, adapted = Problems(), set(self.adapted_names)
        for name in given.keys() - named.keys():
            problems.add("params", f"the module has no parameter `{name}`", did_you_mean(name, named))
        for name in sorted(adapted - given.keys()):
            problems.add("params", f"`{name}` is adapted but not given", "give all parameters that are adapted")
        for name, rate in (rates or {}).items():
            if name not in adapted:
                problems.add("rates", f"`{name}` is not adapted", did_you_mean(name, adapted))
                continue
            shape = tuple(rate.shape)
            if self.rule.rates_per_step:
                first, shape = shape[:1], shape[1:]
                if first != (self.rule.steps,):
                    problems.add("rates", f"`{name}` has rates for {first} steps", f"give [{self.rule.steps}, ...]")
            if name in given and shape not in ((), tuple(given[name].shape)):
                what = f"rates of `{name}` are {list(shape)}, it is {list(given[name].shape)}"
                problems.add("rates", what, "one number, or one an element")
        problems.raise_if_any()
        start = {name: t for name, t in given.items() if name in adapted}
        return start, {n: t for n, t in given.items() if n not in adapted}, dict(rates or {})

    def _checked(self, tasks: Iterable[Task]) -> list[Task]:
        tasks = list(tasks)
        if not tasks:
            raise SpoliaError("no tasks are given", where="tasks", mend="give one at least")
        strange = {name for task in tasks for name in task.start} - set(self.adapted_names)
        if strange:
            what = f"`{min(strange)}` is given a start but is not adapted"
            raise SpoliaError(what, where="task.start", mend=did_you_mean(min(strange), self.adapted_names))
        return tasks

    def _path(self) -> int:
        """Bytes of the weights that a reverse recursion keeps beside graphs, for one view."""
        if self.rule.order == 1 or self.rule.gradient == "unroll":
            return 0
        named = dict(self.module.named_parameters())
        size = sum(named[name].numel() * named[name].element_size() for name in self.adapted_names)
        return size * (self.rule.steps + 1) * {"sgd": 1, "momentum": 2, "adam": 3}[self.rule.optimizer]

    def _device(self) -> torch.device:
        return next((p.device for p in self.module.parameters()), torch.device("cpu"))
