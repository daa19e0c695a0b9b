"""The outer loop that gradient learners share: draw episodes, adapt to each, step towards what adapts better.

    for step: batch = episodes.draw(tasks, step);  theta <- optimizer(theta, gradient of the mean query loss after adapting)

What is adapted, on which views of the support, and what the queries are judged by is each method's own. An optional stage
before it trains the network's body on all training classes at once, as Ye & Chao (ICLR 2022, arXiv 2106.16245) do.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from spolia.core.inner import Inner, InnerLoop, Task
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError
from spolia.methods.meta.learner import MetaLearner, execution, head_names, learning
from spolia.methods.meta.pretrain import pretrain
from spolia.parts.selection import Selection

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.methods.meta.learner import Views
    from spolia.parts.episode import Episodes

    Watch = Callable[[int, MetaLearner], float]
    Outer = Callable[[Tensor, Task], Tensor]
    Slope = Callable[[int], tuple[Tensor | float, dict[str, float], Mapping[str, Tensor]]]

OURS = "our choice"
_YE = "Ye & Chao 2022, the authors' code"
SCHEDULES = "of the outer step size; drops: times 0.1 after every fifth of the steps; linear: down to zero"
TOLD_EVERY = 50  # steps between numbers told


class Source(Protocol):
    """Where episodes come from: parts.episode's EpisodeSampler, or anything that draws by place."""

    seed: int

    def draw(self, count: int, step: int) -> Episodes: ...


class Learning(Settings):
    """Settings of every learner of this kind."""

    method: ClassVar[str] = ""
    tied: ClassVar[bool] = False  # one vector is every class's head

    def basis(self) -> Learning:
        """What says how to adapt: these settings, or those of the learner that they stand on."""
        return self

    loss: Literal["cross_entropy", "squared"] = setting(
        "cross_entropy", "of support and query: for labels, or for numbers [n, outputs]", source=OURS
    )
    head: str = setting("", "path of the head; by default the last module that holds parameters", source=OURS)
    bn: Literal["batch", "support", "frozen"] = setting(
        "batch", "statistics of batch norm: each forward's own (transductive), the support's, or running", source=OURS
    )
    mode: Literal["fixed", "auto", "loop", "workers", "vmap"] = setting(
        "fixed",
        "how tasks are run; fixed: vmap, or workers for convolutions on a processor; auto measures, so that the bits may "
        "differ between runs",
        source=OURS,
    )
    steps: int = setting(60000, "outer steps", source="Finn et al. 2017", ge=0)
    check_every: int = setting(500, "steps between looks of `watch`", source=OURS, ge=1)
    optimizer: Literal["adam", "sgd"] = setting("adam", "of the outer loop; sgd has Nesterov's momentum", source=OURS)
    momentum: float = setting(0.9, "of sgd", source=_YE, ge=0, lt=1)
    weight_decay: float = setting(0.0, "of the outer optimizer", source=OURS, ge=0)
    head_lr: float = setting(1.0, "factor of the head's outer step size", source=OURS, gt=0)
    schedule: Literal["constant", "drops", "linear"] = setting("constant", SCHEDULES, source=OURS)
    test_steps: int | None = setting(None, "inner steps at test; by default as in training", source=OURS, ge=0)
    pretrain: int = setting(0, "steps on all training classes at once before; 0: none", source=OURS, ge=0)
    pretrain_lr: float = setting(0.05, "step size of that stage: SGD, Nesterov 0.9, cosine to zero", source=OURS, gt=0)
    pretrain_batch: int = setting(64, "inputs of a step of that stage", source=OURS, ge=1)


class Through(Learning):
    """Settings of those with a gradient through, or at the end of, the inner steps."""

    gradient: Literal["unroll", "reverse"] = setting(
        "unroll", "second order by the graph of all steps, or back a step at a time in less memory", source=OURS
    )
    rates: Literal["none", "tensor", "element"] = setting(
        "none",
        "learned inner rates, one a tensor or an element: Meta-SGD, arXiv 1707.09835",
        source="off: Finn et al. 2017",
    )
    rates_per_step: bool = setting(False, "learned rates are each step's own", source=OURS)
    temperature: float = setting(1.0, "outer logits are divided by it; inner ones are not", source=OURS, gt=0)


class Adapting(Through):
    """Settings of MAML and those like it."""

    adapt: ClassVar[Literal["all", "head", "body"]] = "all"

    inner_steps: int = setting(5, "inner steps", source=OURS, ge=0)
    inner_lr: float = setting(
        0.1, "step size of the inner loop's SGD, or the first value of learned rates", source=OURS, ge=0
    )
    order: Literal[1, 2] = setting(2, "2: the exact meta-gradient; 1: updates count as constants", source=OURS)
    tasks: int = setting(4, "episodes of an outer step", source=OURS, ge=1)
    lr: float = setting(1e-3, "outer step size", source=OURS, gt=0)

    @property
    def steps_at_test(self) -> int:
        return self.inner_steps if self.test_steps is None else self.test_steps

    def rule(self, steps: int | None = None) -> Inner:
        """What the inner loop does."""
        steps = self.inner_steps if steps is None else steps
        return Inner(
            steps=steps,
            lr=self.inner_lr,
            order=self.order,
            gradient=self.gradient,
            adapt=self.adapt,
            head=self.head,
            bn=self.bn,
            rates_per_step=self.rates != "none" and self.rates_per_step,
        )


def meta_gradient(
    network: nn.Module,
    episodes: Source,
    settings: Any,
    journal: Journal | None = None,
    *,
    base: Adapting | None = None,
    views: Views | None = None,
    supports: Callable[[Episodes, int], tuple[Tensor, Tensor, bool]] | None = None,
    outer: Callable[[int], Outer] | None = None,
    tell: Callable[[list[Tensor], int], dict[str, float]] | None = None,
    watch: Watch | None = None,
) -> MetaLearner:
    """A copy of `network` trained so that the steps of `base` (by default `settings`) adapt it.

    `supports(batch, step)` gives inputs and labels [tasks, views, ...], and whether every inner step has its own;
    `outer(step)` the loss of a task; `tell(outputs, step)` more numbers for the journal. `watch(step, learner)` is a
    validation score; the best is kept in `learner.selection`.
    """
    base = settings if base is None else base
    learner = MetaLearner(copy.deepcopy(network).train(), settings, views)
    fits(learner, episodes, base)
    loop = InnerLoop(learner.network, base.rule(), execution(base.mode, learner.network), **learning(base))
    if base.rates != "none":
        learner.rates = loop.rates(elementwise=base.rates == "element")
        learner.selection = Selection(learner)
    heads = head_names(learner) if base.tied else []
    judge = outer or (lambda step: query_loss(base))

    def slope(step: int) -> tuple[Tensor | float, dict[str, float], Mapping[str, Tensor]]:
        batch = drawn(episodes, base.tasks, step, learner)
        x, y, per_step = (supports or plain)(batch, step)
        tasks = [
            Task((a, b), (c, d), per_step=per_step)
            for a, b, c, d in zip(x, y, batch.query_x, batch.query_y, strict=True)
        ]
        found = loop.gradient(tasks, judge(step), rates=learner.rates or None)
        for name in heads:  # every class has the same vector: its gradient is the sum of theirs
            total = found.gradient[name]
            total.copy_(total.sum(0, keepdim=True).expand_as(total))
        more = tell(found.outputs, step) if tell is not None and step % TOLD_EVERY == 0 else {}
        return found.loss, more, found.gradient | {f"rates.{name}": t for name, t in found.rates.items()}

    return fit(learner, episodes, base, slope, journal, {"inner": loop.choice}, watch)


def fit(
    learner: MetaLearner,
    episodes: Source,
    settings: Any,
    slope: Slope,
    journal: Journal | None = None,
    keep: Mapping[str, Any] | None = None,
    watch: Watch | None = None,
) -> MetaLearner:
    """The outer loop. `slope(step)` gives a loss, numbers to tell, and gradients by name; `rates.NAME` are the rates'."""
    told = journal or Journal()
    if settings.pretrain:
        with told.phase("pretrain"):
            pretrain(learner.network, episodes, settings, head_names(learner), told)
    if settings.tied:
        level(learner)
    trained = dict(learner.network.named_parameters()) | {f"rates.{name}": t for name, t in learner.rates.items()}
    optimizer = _optimizer(learner, trained, settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, _factor(settings))
    kept = {"learner": learner, "optimizer": optimizer, "schedule": schedule, "losses": learner.losses, **(keep or {})}
    kept |= {} if watch is None else {"selection": learner.selection}
    with told.phase(learner.settings.method):
        for step in told.steps(settings.steps, kept, shared=True):
            loss, numbers, gradient = slope(step)
            for name, tensor in trained.items():
                tensor.grad = gradient.get(name)
            optimizer.step()
            schedule.step()
            learner.losses[step] = loss
            if step % TOLD_EVERY == 0:
                told.log(loss=loss, **numbers)
            if watch is not None and ((step + 1) % settings.check_every == 0 or step + 1 == settings.steps):
                learner.selection.offer(step + 1, watch(step + 1, learner))
    for tensor in trained.values():
        tensor.grad = None
    return learner


def plain(batch: Episodes, step: int) -> tuple[Tensor, Tensor, bool]:
    """The support as it is: one view."""
    return batch.support_x.unsqueeze(1), batch.support_y.unsqueeze(1), False


def drawn(episodes: Source, tasks: int, step: int, learner: MetaLearner) -> Episodes:
    """The episodes of a step, where the network is. Of a process group every process draws all."""
    return episodes.draw(tasks, step).to(device_of(learner.network)).floats()


def query_loss(settings: Any) -> Outer:
    """The mean over views of the queries' loss. outputs [views, queries, ...]"""

    def outer(outputs: Tensor, task: Task) -> Tensor:
        labels = task.query[1]
        if settings.loss == "squared":
            return torch.nn.functional.mse_loss(outputs, labels.expand_as(outputs))
        logits = outputs / settings.temperature
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.repeat(len(logits)))

    return outer


def level(learner: MetaLearner) -> None:
    """Every class's head becomes their mean."""
    named = dict(learner.network.named_parameters())
    with torch.no_grad():
        for name in head_names(learner):
            named[name].copy_(named[name].mean(0, keepdim=True).expand_as(named[name]))


def fits(learner: MetaLearner, episodes: Source, settings: Any) -> None:
    """SpoliaError unless the network has an output for each way of the episodes."""
    batch = episodes.draw(1, 0).to(device_of(learner.network)).floats()
    probe = copy.deepcopy(learner.network)
    try:
        with torch.no_grad():
            outputs = probe(batch.query_x[0])
    except RuntimeError as error:
        what = f"cannot take inputs {list(batch.query_x.shape[2:])}: {str(error).splitlines()[0]}"
        raise SpoliaError(what, where="network", mend="give a network for the episodes' inputs") from None
    if settings.loss == "squared":
        if tuple(outputs.shape) != tuple(batch.query_y[0].shape):
            what = f"gives {list(outputs.shape)} for targets {list(batch.query_y[0].shape)}"
            raise SpoliaError(what, where="network", mend="give outputs and targets [n, outputs]")
    elif outputs.dim() != 2 or outputs.shape[1] != batch.ways:
        what = f"gives {list(outputs.shape[1:])} outputs for episodes of {batch.ways} ways"
        raise SpoliaError(what, where="network", mend=f"give its head {batch.ways} outputs")
    if settings.tied and (settings.loss == "squared" or not _linear_last(learner)):
        mend = "end the network with an nn.Linear, or name it in `head`"
        raise SpoliaError("one vector for all classes needs a linear head", where="network", mend=mend)


def device_of(network: nn.Module) -> Any:
    return next(network.parameters()).device


def _linear_last(learner: MetaLearner) -> bool:
    path = head_names(learner)[0].rpartition(".")[0]
    return isinstance(learner.network.get_submodule(path), torch.nn.Linear)


def _optimizer(learner: MetaLearner, trained: Mapping[str, Tensor], settings: Any) -> torch.optim.Optimizer:
    heads = set(head_names(learner)) if settings.head_lr != 1 else set()
    groups: list[dict[str, Any]] = [{"params": [t for n, t in trained.items() if n not in heads]}]
    if heads:
        groups.append({"params": [t for n, t in trained.items() if n in heads], "lr": settings.lr * settings.head_lr})
    if settings.optimizer == "adam":
        return torch.optim.Adam(groups, lr=settings.lr, weight_decay=settings.weight_decay)
    moving = settings.momentum > 0
    return torch.optim.SGD(
        groups, lr=settings.lr, momentum=settings.momentum, nesterov=moving, weight_decay=settings.weight_decay
    )


def _factor(settings: Any) -> Callable[[int], float]:
    """Of the outer step size at a step."""
    if settings.schedule == "linear":
        return lambda step: max(0.0, 1 - step / max(1, settings.steps))
    if settings.schedule == "drops":
        return lambda step: 0.1 ** (5 * step // max(1, settings.steps))
    return lambda step: 1.0
