"""How data-free learners are judged: on unseen classes alone, along their training, and beside what costs nothing.

| line | what it is |
|---|---|
| random | a network never trained, its features as they are |
| average | the mean of the weights of the largest group of models of one kind, and of their statistics |
| best | the features of the model that claims the highest accuracy |
| real | the same learner on the real base classes: what the lost data would give |

Of a training three numbers are told apart: `last`, at its end; `selected`, where validation was best; `peak`, the best on the
test itself, which published codes report: it was chosen by the answer and bounds what selection could reach.
`variation`, last less peak, tells what was forgotten on the way.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from spolia.bench.continual_scores import forgetting
from spolia.bench.fewshot import evaluate
from spolia.bench.fewshot_scores import Point, Scores, Stages, stages
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.episode import EpisodeSampler
    from spolia.parts.white import White, WhitePool


def apart(pool: Iterable[str], test: Iterable[str]) -> None:
    """SpoliaError where a test class is one that a model of the pool was trained on."""
    known = sorted(set(pool) & set(test))
    if known:
        what = f"{len(known)} of its classes are known to models of the pool: {', '.join(known[:5])}"
        raise SpoliaError(what, where="test classes", mend="judge on classes that no model has seen")


@dataclass(frozen=True)
class Judge:
    """The same episodes for whoever is judged: `tests` by task; `looks` of them along a training."""

    tests: Mapping[str, EpisodeSampler]
    episodes: int
    looks: int = 60
    together: int = 1

    def scores(self, predict: Any) -> dict[str, Scores]:
        """By task."""
        return {
            task: evaluate(predict, sampler, self.episodes, together=self.together)
            for task, sampler in self.tests.items()
        }

    def glance(self, predict: Any) -> float:
        """Mean accuracy over the tasks, in per cent, on their first episodes; nan without a test."""
        found = [evaluate(predict, s, self.looks, together=self.together).mean() for s in self.tests.values()]
        return sum(found) / len(found) if found else math.nan


@dataclass
class Along:
    """A training watched: call it as `watch`. `validate(step, learner)` is what may choose; the test only stands beside.

    `points` by step, so that a step that is done again is not counted twice.
    """

    validate: Callable[[int, Any], float]
    judge: Judge
    points: dict[int, Point] = field(default_factory=dict)

    def __call__(self, step: int, learner: Any) -> float:
        score = self.validate(step, learner)
        self.points[step] = Point(step, score, self.judge.glance(learner.predict))
        return score

    @property
    def stages(self) -> Stages:
        return stages(list(self.points.values()))

    @property
    def variation(self) -> float:
        """Test accuracy at the end less that at its peak: 0, or below where something was forgotten."""
        found = self.stages
        return found.last.test - found.peak.test


@dataclass(frozen=True)
class Shift:
    """Models that arrive in turn: test accuracy on unseen classes after each phase, and, where the base classes' own data
    are at hand, accuracy on each phase's classes after each phase."""

    unseen: Sequence[float]
    own: Sequence[Sequence[float]] = ()

    @property
    def variation(self) -> float:
        """After the last phase, less the best."""
        return self.unseen[-1] - max(self.unseen)

    @property
    def forgotten(self) -> float | None:
        """Mean loss from its best of each earlier phase's classes: see continual_scores."""
        return forgetting(self.own) if len(self.own) > 1 else None


# --- features that cost nothing --------------------------------------------------------------------------------------


def penultimate(network: nn.Module, x: Tensor) -> Tensor:
    """What the last linear layer of a network sees, flattened [n, d]; of one without, its outputs."""
    linear = [layer for layer in network.modules() if isinstance(layer, torch.nn.Linear)]
    if not linear:
        return network(x).flatten(1)
    seen: list[Tensor] = []
    hook = linear[-1].register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        network(x)
    finally:
        hook.remove()
    if not seen:
        mend = "give an expert that runs its linear layers"
        raise SpoliaError("its last linear layer is not used", where="features", mend=mend)
    return seen[-1].flatten(1)


def features_of(expert: White) -> Callable[[nn.Module, Tensor], Tensor]:
    """(network, images in 0 … 1) -> features, for the expert's network or one of its kind."""
    return lambda network, images: penultimate(network, expert.shown(images))


def best(pool: WhitePool, leave: Iterable[int] = ()) -> int:
    """The place of the model that claims the most, those to `leave` aside; the first where none claims anything."""
    left = set(leave)
    places = [place for place in range(len(pool)) if place not in left] or list(range(len(pool)))
    return max(places, key=lambda place: (pool[place].claimed or 0.0, -place))


def averaged(pool: WhitePool, leave: Iterable[int] = ()) -> tuple[int, nn.Module, int]:
    """The mean network of the most models of one kind: the place of one of them, the network, and how many they are.

    Statistics of batch norms are averaged too; what is no floating tensor, as the count of batches, is the first one's.
    """
    left = set(leave)
    places = [place for place in range(len(pool)) if place not in left] or list(range(len(pool)))
    kind = Counter(pool[place].kind for place in places).most_common(1)[0][0]
    chosen = [place for place in places if pool[place].kind == kind]
    total: dict[str, Any] = {}
    for place in chosen:
        for name, tensor in pool[place].module().state_dict().items():
            if tensor.is_floating_point():
                total[name] = total.get(name, 0.0) + tensor.double() / len(chosen)
    made = copy.deepcopy(pool[chosen[0]].module())
    own = made.state_dict()
    made.load_state_dict({name: total.get(name, tensor).to(tensor) for name, tensor in own.items()})
    return chosen[0], made, len(chosen)
