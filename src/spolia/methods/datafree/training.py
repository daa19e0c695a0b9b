"""The loop that data-free learners share: recover images of a few experts, align with their answers, replay what is stored.

    for step:
        experts = selection.choose(step);  found = recovery.recover(experts);  store <- found
        theta <- along one direction from all of found: mean, sequential, displaced     (core/alignment)
        replays times: theta <- optimizer(theta, gradient of the queries' loss in pseudo-tasks of the store)

Which experts, how their images are made, how gradients are joined and what pseudo-tasks are is each method's own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

from spolia.core import alignment
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.core.settings import setting
from spolia.methods.datafree.inversion import OURS, Fresh, Inverting
from spolia.methods.datafree.learner import FewShotLearner, Learning, fits
from spolia.methods.datafree.metagenerator import MetaGenerator
from spolia.parts.imagestore import ImageStore, StoreEpisodes

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.alignment import Aligned, Loss
    from spolia.methods.datafree.inversion import Recovered, Recovery
    from spolia.methods.datafree.learner import Embed
    from spolia.parts.white import WhitePool

    Weights = dict[str, Tensor]
    Align = Callable[[Sequence[Loss], Mapping[str, Tensor]], Aligned]
    Replay = Callable[[FewShotLearner, StoreEpisodes, int], tuple[float, float, Weights]]
    Watch = Callable[[int, FewShotLearner], float]

_FREE = "Wei et al. 2024, the released code"
RELEASED = 67.0  # factor of theta - theta' in the released code, taken over from Fang et al. 2022
TOLD_EVERY = 10  # steps between numbers told
_PATIENT = 100  # replays of a step, at most, where they go on until nothing is gained


class Training(Inverting, Learning):
    """Settings of the loop."""

    method: ClassVar[str] = "datafree"

    recovery: Literal["meta", "fresh", "pixels"] = setting(
        "meta", "one generator for all experts, a fresh one for each visit, or pixels", source=_FREE
    )
    meta: Literal["reptile", "fomaml_last", "fomaml_sum", "released"] = setting(
        "reptile", "how that one generator learns from its visits", source="Fang et al. 2022"
    )
    meta_lr: float = setting(1e-3, "step size of fomaml_* and released", source=_FREE, gt=0)
    steps: int = setting(999, "outer steps", source=_FREE, ge=1)
    warm_up: int = setting(20, "of them for the generator alone", source=_FREE, ge=0)
    every: int = setting(1, "outer steps between two recoveries", source=_FREE, ge=1)
    experts: int = setting(4, "experts of a recovery, different ones where there are enough", source=_FREE, ge=1)
    suspects: Literal["stop", "drop", "keep"] = setting(
        "stop", "what becomes of experts that nothing was learned by", source=OURS
    )
    per_class_kept: int = setting(400, "images of each class in the store, at most", source=_FREE, ge=1)
    stored: Literal["all", "last"] = setting("all", "of a step's experts, whose images are kept", source=OURS)
    tasks: Literal["auto", "cross", "within"] = setting(
        "auto",
        "pseudo-tasks take classes across experts, or of one; auto: across where all have class lists",
        source=OURS,
    )
    align: Literal["mean", "sequential", "displaced", "released"] = setting(
        "sequential", "how the experts' gradients become one direction", source="Wei et al. 2024"
    )
    align_rate: float = setting(
        1e-3,
        "step size of sequential and released, which step on each expert in turn; eta of displaced",
        source=_FREE,
        ge=0,
    )
    align_optimizer: Literal["adam", "sgd"] = setting("adam", "of those steps", source=_FREE)
    reach: float = setting(1.0, "epsilon, share of the way to where sequential ends", source=OURS, ge=0)
    lr: float = setting(1e-3, "step size of Adam, of all other directions", source=_FREE, gt=0)
    replays: int = setting(10, "steps on pseudo-tasks after each outer step", source=OURS, ge=0)
    patience: int = setting(
        0, "replay until so many gained nothing, in the place of `replays`; 0: off", source=f"10: {_FREE}", ge=0
    )
    replay_tasks: int = setting(4, "pseudo-tasks of a replay", source="Hu et al. 2023, the released code", ge=1)
    check_every: int = setting(50, "outer steps between looks of `watch`", source=OURS, ge=1)


class Selection(Protocol):
    """Says which experts are visited, and is told what came of it."""

    def due(self, step: int) -> bool: ...

    def choose(self, step: int, count: int) -> list[int]: ...

    def feedback(
        self, step: int, found: list[Recovered], learner: FewShotLearner, store: ImageStore, episodes: StoreEpisodes
    ) -> None: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


class Uniform:
    """Every expert equally likely at each visit, without repetition within one where there are enough."""

    def __init__(self, pool: WhitePool, settings: Any, seed: int = 0):
        self.count, self.every, self.seed = len(pool), settings.every, seed

    def due(self, step: int) -> bool:
        return step % self.every == 0

    def choose(self, step: int, count: int) -> list[int]:
        return generator(self.seed, "uniform", step).permutation(self.count)[:count].tolist()

    def feedback(self, step: int, found: Any, learner: Any, store: Any, episodes: Any) -> None:
        return None

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        return None


def audited(pool: WhitePool, settings: Training) -> WhitePool:
    """The pool as it may be used. SpoliaError for broken experts, and for suspects unless they are dropped or kept."""
    audit = pool.audit()
    audit.raise_if_any("broken")
    if not audit.suspects or settings.suspects == "keep":
        return pool
    if settings.suspects == "stop" or len(audit.suspects) == len(pool):
        audit.raise_if_any("suspect")
    return pool.without(audit.suspects)


def train(
    pool: WhitePool,
    network: nn.Module,
    settings: Any,
    journal: Journal | None = None,
    *,
    seed: int = 0,
    embed: Embed | None = None,
    selection: Selection | None = None,
    recovery: Recovery | None = None,
    align: Align | None = None,
    replay: Replay | None = None,
    watch: Watch | None = None,
) -> FewShotLearner:
    """A copy of `network` trained on what the experts of an audited `pool` remember; neither is changed.

    What is not given follows from the settings. `watch(step, learner)` is a validation score; the best is kept in
    `learner.selection`.
    """
    learner = FewShotLearner(network, settings, embed, settings.steps)
    fits(learner, pool.shape, pool.ways)
    learner.store = ImageStore(len(pool.names), pool.shape, settings.per_class_kept)
    chosen, made = selection or Uniform(pool, settings, seed), recovery or recovery_of(pool, settings, seed)
    loop = _Loop(
        pool, settings, learner, (chosen, made, align or aligner(settings), replay or _replayed(settings)), seed
    )
    kept = loop.kept() | ({} if watch is None else {"selection of weights": learner.selection})
    told = journal or Journal()
    with told.phase(settings.method):
        for step in told.steps(settings.steps, kept, shared=True):
            numbers = loop.step(step)
            learner.losses[step] = numbers.get("loss", 0.0)
            if step % TOLD_EVERY == 0:
                told.log(**numbers)
            if watch is not None and ((step + 1) % settings.check_every == 0 or step + 1 == settings.steps):
                learner.selection.offer(step + 1, watch(step + 1, learner))
    for parameter in learner.network.parameters():
        parameter.grad = None
    return learner


def recovery_of(pool: WhitePool, settings: Training, seed: int) -> Recovery:
    """What makes the images, by `settings.recovery`."""
    if settings.recovery == "meta":
        return MetaGenerator(pool, settings, seed)
    return Fresh(pool, settings, seed, "pixels" if settings.recovery == "pixels" else "generator")


def aligner(settings: Training) -> Align:
    """What joins gradients, by `settings.align`."""
    rate = settings.align_rate
    if settings.align == "mean":
        return alignment.mean
    if settings.align == "displaced":
        return lambda losses, weights: alignment.displaced(losses, weights, rate)
    return lambda losses, weights: alignment.sequential(losses, weights, rate, settings.align_optimizer)


class _Loop:
    """One training at work: its parts, and one outer step."""

    def __init__(
        self,
        pool: WhitePool,
        settings: Any,
        learner: FewShotLearner,
        parts: tuple[Selection, Recovery, Align, Replay],
        seed: int,
    ):
        self.pool, self.settings, self.learner, self.seed = pool, settings, learner, seed
        self.selection, self.recovery, self.align, self.replay = parts
        self.optimizer = torch.optim.Adam(learner.network.parameters(), lr=settings.lr)
        sizes = {"ways": settings.ways, "shots": settings.shots, "queries": settings.queries}
        self.episodes = StoreEpisodes(learner.store, **sizes, seed=seed, tasks=settings.tasks, shared=pool.shared)

    def kept(self) -> dict[str, Any]:
        """Everything that changes from step to step."""
        learner = self.learner
        parts = {"learner": learner, "optimizer": self.optimizer, "store": learner.store, "losses": learner.losses}
        return parts | {"recovered": learner.recovered, "recovery": self.recovery, "selection": self.selection}

    def step(self, step: int) -> dict[str, float]:
        """One outer step; what is to be told of it."""
        settings, learner = self.settings, self.learner
        warm = step >= settings.warm_up or settings.recovery != "meta"
        found: list[Recovered] = []
        numbers: dict[str, float] = {}
        if self.selection.due(step):
            places = self.selection.choose(step, settings.experts)
            found = self.recovery.recover(places, step, learner.student if warm else None)
            for one in found:
                parts = {"ce": one.ce, "bn": one.bn, "top1": one.top1, "seconds": one.seconds}
                learner.recovered[one.expert] = parts
            told = ("ce", "bn", "top1", "sound", "seconds")
            numbers = {f"images {name}": _mean(getattr(one, name) for one in found) for name in told}
        if not warm:
            return numbers
        if found:
            self._keep(found, step)
            numbers |= self._learn(found, step)
        if self.episodes.ready:
            numbers |= self._replayed(step)
        self.selection.feedback(step, found, learner, learner.store, self.episodes)
        return numbers

    def _keep(self, found: Sequence[Recovered], step: int) -> None:
        for one in found if self.settings.stored == "all" else found[-1:]:
            keys = torch.tensor(self.pool.keys[one.expert], device=one.labels.device)[one.labels]
            self.learner.store.add(one.images, keys, expert=one.expert, step=step)

    def _learn(self, found: Sequence[Recovered], step: int) -> dict[str, float]:
        """A step along the experts' joined gradients; their mean loss, and how far they agreed where that is known."""
        settings, weights = self.settings, self.learner.weights()
        order = generator(self.seed, "order", step).permutation(len(found))
        losses = [self.learner.teacher_loss(found[i]) for i in order]
        made = self.align(losses, {name: w.detach() for name, w in weights.items()})
        if settings.align == "sequential":
            with torch.no_grad():
                for name, w in weights.items():
                    w -= settings.reach * made.gradient[name]
        else:
            factor = RELEASED if settings.align == "released" else 1.0
            self._descend({name: factor * g for name, g in made.gradient.items()})
        agreed = {} if made.cosine is None else {"cosine": made.cosine}
        return {"teachers": _mean(made.losses)} | agreed

    def _replayed(self, step: int) -> dict[str, float]:
        """Steps on pseudo-tasks, and what the last one saw."""
        settings = self.settings
        count = _PATIENT if settings.patience else settings.replays
        best, stall, turn = -1.0, 0, 0
        loss = accuracy = 0.0
        while turn < count and not (settings.patience and stall >= settings.patience):
            loss, accuracy, gradient = self.replay(self.learner, self.episodes, step * max(count, 1) + turn)
            self._descend(gradient)
            best, stall = (accuracy, 0) if accuracy > best else (best, stall + 1)
            turn += 1
        return {"loss": loss, "accuracy": accuracy, "replays": float(turn), "stored": float(len(self.learner.store))}

    def _descend(self, gradient: Mapping[str, Tensor]) -> None:
        for name, w in self.learner.weights().items():
            w.grad = gradient.get(name)
        self.optimizer.step()


def _replayed(settings: Training) -> Replay:
    def replay(learner: FewShotLearner, episodes: StoreEpisodes, number: int) -> tuple[float, float, Weights]:
        device = next(learner.network.parameters()).device
        return learner.gradient(episodes.draw(settings.replay_tasks, number).to(device).floats())

    return replay


def _mean(values: Any) -> float:
    held = list(values)
    return sum(held) / max(len(held), 1)
