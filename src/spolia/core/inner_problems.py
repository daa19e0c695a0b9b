"""What the inner steps are taken on: one task by itself, or a stack of tasks and views under vmap.

Only the forward passes are vmapped; gradients are taken outside, of the sum over the stack, whose parts do not meet. So no
derivative is ever taken of a gradient inside vmap, where the framework's fused norms go wrong: even a layer that calls
these by itself is exact here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.inner_rules import Task
    from spolia.core.inner_steps import Weights
    from spolia.core.norms import BatchNorm


@dataclass(frozen=True)
class Replica:
    """A copy of the module that one thread may run, and what is asked of it."""

    module: nn.Module
    layers: list[BatchNorm]
    loss: Callable[[nn.Module, Any], Tensor]
    predict: Callable[[nn.Module, Any], Any]
    outer: Callable[[Any, Task], Tensor] | None  # None where only outputs are wanted
    from_support: bool  # the query is normalised by the support's statistics
    channels_last: bool = False

    def lost(self, weights: Weights, support: Any) -> Tensor:
        """The support loss under `weights`."""
        from spolia.core.functional import call

        return call(self.module, weights, self.loss, support)

    def answered(self, weights: Weights, support: Any, query: Any) -> Any:
        """What `predict` makes of the query under `weights`."""
        from spolia.core.functional import call
        from spolia.core.norms import phase

        if not (self.from_support and self.layers):
            return call(self.module, weights, self.predict, query)
        with phase(self.layers, "record"):
            call(self.module, weights, self.loss, support)
        with phase(self.layers, "recorded"):
            return call(self.module, weights, self.predict, query)

    def laid(self, tree: Any) -> Any:
        """Images in the order of memory that the convolutions like."""
        if not self.channels_last:
            return tree
        last = torch.channels_last
        return mapped(lambda t: t.contiguous(memory_format=last) if t.dim() == 4 and t.is_floating_point() else t, tree)


class Single:
    """One task; its views are adapted one after the other."""

    def __init__(self, replica: Replica, task: Task):
        self.replica, self.task = replica, task
        self.count = views(task)
        self.supports = [replica.laid(mapped(lambda t, v=v: t[v], task.support)) for v in range(self.count)]

    def start(self, i: int, weights: Weights) -> Weights:
        own = {name: t[i].detach().requires_grad_() for name, t in self.task.start.items()}
        return {name: own.get(name, t) for name, t in weights.items()}

    def support(self, i: int, k: int) -> Any:
        return mapped(lambda t: t[k], self.supports[i]) if self.task.per_step else self.supports[i]

    def loss(self, i: int, weights: Weights, shared: Weights, k: int) -> Tensor:
        return self.replica.lost(weights | shared, self.support(i, k))

    def outputs(self, ends: list[Weights], shared: Weights) -> list[Any]:
        """[views, queries, ...], of the one task."""
        query = self.replica.laid(self.task.query)
        made = [self.replica.answered(w | shared, self.support(i, -1), query) for i, w in enumerate(ends)]
        return [stacked(made)]

    def outer(self, ends: list[Weights], shared: Weights) -> tuple[Tensor, list[Any]]:
        assert self.replica.outer is not None
        (made,) = self.outputs(ends, shared)
        return self.replica.outer(made, self.task).view(1), [mapped(lambda t: t.detach(), made)]

    def parted(self, ends: list[Weights]) -> list[Weights]:
        """Adapted weights by task: [views, ...]."""
        return [{name: torch.stack([w[name].detach() for w in ends]) for name in ends[0]}]


class Stack:
    """Tasks and their views at once: every weight is [tasks, views, ...], one element of the problem."""

    count = 1

    def __init__(self, replica: Replica, tasks: Sequence[Task]):
        self.replica, self.per_step = replica, tasks[0].per_step
        kinds = {(views(t), t.per_step, tuple(t.start)) for t in tasks}
        if len(kinds) > 1:
            raise _unlike("differ in views, in steps or in what they start from")
        self.support = stacked([t.support for t in tasks])
        self.query = stacked([t.query for t in tasks])
        self.own = stacked([dict(t.start) for t in tasks])
        self.size = (len(tasks), views(tasks[0]))

    def start(self, i: int, weights: Weights) -> Weights:
        own = {name: t.detach().requires_grad_() for name, t in self.own.items()}
        return {name: own.get(name, t.expand(*self.size, *t.shape)) for name, t in weights.items()}

    def at(self, k: int) -> Any:
        return mapped(lambda t: t[:, :, k], self.support) if self.per_step else self.support

    def loss(self, i: int, weights: Weights, shared: Weights, k: int) -> Tensor:
        def lost(weights: Weights, support: Any) -> Tensor:
            return self.replica.lost(weights | shared, support)

        return over(over(lost, (0, 0)), (0, 0))(weights, self.at(k)).sum()

    def outputs(self, ends: list[Weights], shared: Weights) -> list[Any]:
        made = self._answered(ends[0], shared)
        return [mapped(lambda t, i=i: t[i], made) for i in range(self.size[0])]

    def _answered(self, weights: Weights, shared: Weights) -> Any:
        def answered(weights: Weights, support: Any, query: Any) -> Any:
            return self.replica.answered(weights | shared, support, query)

        return over(over(answered, (0, 0, None)), (0, 0, 0))(weights, self.at(-1), self.query)

    def outer(self, ends: list[Weights], shared: Weights) -> tuple[Tensor, list[Any]]:
        from spolia.core.inner_rules import Task

        def lost(outputs: Any, support: Any, query: Any) -> Tensor:
            assert self.replica.outer is not None
            return self.replica.outer(outputs, Task(support, query, per_step=self.per_step))

        made = self._answered(ends[0], shared)
        losses = over(lost, (0, 0, 0))(made, self.support, self.query)
        return losses, [mapped(lambda t, i=i: t[i].detach(), made) for i in range(self.size[0])]

    def parted(self, ends: list[Weights]) -> list[Weights]:
        return [{name: t[i].detach() for name, t in ends[0].items()} for i in range(self.size[0])]


def over(function: Callable[..., Any], dims: tuple[int | None, ...]) -> Callable[..., Any]:
    return torch.vmap(function, in_dims=dims, randomness="different")


def views(task: Task) -> int:
    """The number of views, the length of every leaf of the support."""
    found = {len(leaf) for leaf in flat(task.support) if torch.is_tensor(leaf)}
    if len(found) != 1:
        what = f"the support's leaves have {' and '.join(map(str, sorted(found))) or 'no'} views"
        raise SpoliaError(what, where="task", mend="every leaf of a support is [views, ...]; one view: Task.of(...)")
    return found.pop()


# --- trees -----------------------------------------------------------------------------------------------------------


def mapped(function: Callable[[Tensor], Any], tree: Any) -> Any:
    """`function` of every tensor in tuples, lists and dicts; what else there is stays."""
    if isinstance(tree, Mapping):
        return {name: mapped(function, part) for name, part in tree.items()}
    if isinstance(tree, tuple | list):
        return type(tree)(mapped(function, part) for part in tree)
    return function(tree) if torch.is_tensor(tree) else tree


def flat(tree: Any) -> list[Any]:
    """The leaves of a tree."""
    if isinstance(tree, Mapping):
        return [leaf for part in tree.values() for leaf in flat(part)]
    if isinstance(tree, tuple | list):
        return [leaf for part in tree for leaf in flat(part)]
    return [tree]


def stacked(trees: Sequence[Any]) -> Any:
    """One tree whose tensors have a new first dimension; SpoliaError where they cannot be stacked."""
    first = trees[0]
    if isinstance(first, Mapping):
        return {name: stacked([tree[name] for tree in trees]) for name in first}
    if isinstance(first, tuple | list):
        return type(first)(stacked(parts) for parts in zip(*trees, strict=True))
    if not all(torch.is_tensor(t) for t in trees):
        raise _unlike(f"hold a {type(first).__name__} that is no tensor")
    shapes = {tuple(t.shape) for t in trees}
    if len(shapes) > 1:
        raise _unlike(f"differ in shape: {', '.join(map(str, sorted(shapes)))}")
    return torch.stack(list(trees))


def _unlike(what: str) -> SpoliaError:
    return SpoliaError(
        f"tasks or views {what}", where="tasks", mend='give them alike, or take mode="loop" or "workers"'
    )
