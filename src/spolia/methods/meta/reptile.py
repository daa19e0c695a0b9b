"""Reptile: train on each task for a while and move the start towards where that led.

For meta-learning without a query set and without a gradient through the steps: the cheapest of the room. Nichol, Achiam,
Schulman, On First-Order Meta-Learning Algorithms, 2018, arXiv 1803.02999.

    theta <- theta + epsilon mean over tasks (U^K(theta) - theta),    U: one step of Adam on a minibatch of the task

| paper | here |
|---|---|
| epsilon | `lr`, of plain SGD, falling linearly to zero |
| K, minibatch | `inner_steps`, `batch` |
| Adam, beta_1 = 0 | `inner_optimizer: adam`; its state begins anew with every task |
| more shots in training | `joint`: queries join the support |

Data touched: labelled inputs of the training classes; at test the support of the episode, and under `bn: batch` all its
queries at once. Departures: the published code carries Adam's state from task to task; at test each step sees the whole
support, not a minibatch of it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spolia.core.dist import summed, world
from spolia.core.inner import Inner, InnerLoop, Task
from spolia.core.journal import Journal
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.core.settings import setting
from spolia.methods.meta.learner import MetaLearner, execution, learning
from spolia.methods.meta.train import SCHEDULES, Learning, Source, drawn, fit, fits

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.methods.meta.train import Watch

_L2L, _NICHOL = "learn2learn's Reptile", "Nichol et al. 2018"


class Reptile(Learning):
    """Settings of `reptile`."""

    method: ClassVar[str] = "reptile"

    optimizer: Literal["adam", "sgd"] = setting("sgd", "of the outer loop", source=_NICHOL)
    momentum: float = setting(0.0, "of sgd", source=_NICHOL, ge=0, lt=1)
    schedule: Literal["constant", "drops", "linear"] = setting("linear", SCHEDULES, source=_NICHOL)
    test_steps: int | None = setting(50, "inner steps at test", source=_L2L, ge=0)
    inner_steps: int = setting(8, "K, inner steps", source=_L2L, ge=1)
    inner_lr: float = setting(1e-3, "step size of the inner loop", source=_L2L, gt=0)
    inner_optimizer: Literal["adam", "sgd"] = setting("adam", "of the inner loop; adam has beta_1 = 0", source=_NICHOL)
    batch: int = setting(10, "inputs of an inner step", source=_L2L, ge=1)
    joint: bool = setting(True, "queries are trained on as well", source=_NICHOL)
    tasks: int = setting(5, "episodes of an outer step", source=_L2L, ge=1)
    lr: float = setting(1.0, "epsilon, outer step size", source=_L2L, gt=0)

    @property
    def steps_at_test(self) -> int:
        return self.inner_steps if self.test_steps is None else self.test_steps

    def rule(self, steps: int | None = None) -> Inner:
        """What the inner loop does."""
        return Inner(
            steps=self.inner_steps if steps is None else steps,
            lr=self.inner_lr,
            optimizer=self.inner_optimizer,
            betas=(0.0, 0.999),
            order=1,
            head=self.head,
            bn=self.bn,
        )


def reptile(
    network: nn.Module,
    episodes: Source,
    settings: Reptile,
    journal: Journal | None = None,
    *,
    watch: Watch | None = None,
) -> MetaLearner:
    """A start near every task's end. `network` ends with one output a way, and stays as it is. `watch`: see `maml`.

    `losses` of the learner are the squared lengths of the outer steps.
    """
    learner = MetaLearner(copy.deepcopy(network).train(), settings)
    fits(learner, episodes, settings)
    loop = InnerLoop(learner.network, settings.rule(), execution(settings.mode, learner.network), **learning(settings))

    def slope(step: int) -> tuple[Tensor | float, dict[str, float], Mapping[str, Tensor]]:
        tasks = [_task(one, settings, episodes.seed) for one in drawn(episodes, settings.tasks, step, learner)]
        gradient = pull(loop, tasks)
        return sum(float(g.square().sum()) for g in gradient.values()), {}, gradient

    return fit(learner, episodes, settings, slope, journal, {"inner": loop.choice}, watch)


def pull(loop: InnerLoop, tasks: list[Task]) -> dict[str, Tensor]:
    """theta less the mean of where the tasks end: what plain SGD takes for a gradient. Tasks are shared by processes."""
    rank, count = world()
    share = tasks[len(tasks) * rank // count : len(tasks) * (rank + 1) // count]
    with torch.no_grad():
        start = {name: parameter.detach() for name, parameter in loop.module.named_parameters()}
        total = {name: torch.zeros_like(parameter) for name, parameter in start.items()}
        for ends in loop.adapted(share) if share else []:
            for name, end in ends.items():
                total[name] += start[name] - end[0]
        return {name: summed(moved) / len(tasks) for name, moved in total.items()}


def _task(episode: Any, settings: Reptile, seed: int) -> Task:
    """Minibatches [1, steps, batch, ...] of one episode: through all inputs in random order, and again."""
    x, y = episode.support_x, episode.support_y
    if settings.joint:
        x, y = torch.cat([x, episode.query_x]), torch.cat([y, episode.query_y])
    draws, size = generator(seed, "reptile", episode.number), min(settings.batch, len(x))
    rounds = -(-settings.inner_steps * size // len(x))
    order = np.concatenate([draws.permutation(len(x)) for _ in range(rounds)])[: settings.inner_steps * size]
    places = torch.from_numpy(order).to(x.device).view(settings.inner_steps, size)
    return Task((x[places].unsqueeze(0), y[places].unsqueeze(0)), (), per_step=True)
