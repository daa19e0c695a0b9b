"""The lines of a data-free table: the recipe's learner, the same without its own idea, and what costs nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.bench.datafree import averaged, best, features_of
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.runs.datafree_problems import Arch, DataFree, Held, OwnModels, _Made, features, network_of
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from spolia.parts.white import WhitePool

SELECTED, REAL = ", selected", "real data"
RANDOM, BEST = "random features", "best model's features"
PLAIN = ", no meta-generator"
QUICK = {"generator_width": 16, "latent": 32, "per_class": 12, "replays": 3, "shots": 3, "queries": 5}  # at most
QUICK_LR = 0.01  # of generator and noise, at least: a small generator in few visits
WITHOUT: dict[str, tuple[str, dict[str, Any]]] = {
    "groupings": (", no groups", {"selection": "uniform", "align": "mean"}),
    "robust": (", unprotected", {"selection": "uniform", "interpolate": 0.0, "suspects": "keep"}),
}


@dataclass(frozen=True)
class Entry:
    """One training of a seed."""

    label: str
    settings: Any
    baseline: bool = False


def entries_of(recipe: StudyRecipe) -> list[Entry]:
    """Trainings: baselines first, the recipe's own last."""
    problem: DataFree = recipe.problem
    own = Entry(recipe.method.name, limited(recipe.settings, problem))
    beside = []
    if "plain" in problem.baselines and own.settings.recovery == "meta":
        changed = own.settings.model_copy(update={"recovery": "fresh"})
        beside.append(Entry(f"{own.label}{PLAIN}", changed, baseline=True))
    end, change = WITHOUT.get(own.label, ("", {}))
    if change and any(getattr(own.settings, name) != value for name, value in change.items()):
        beside.append(Entry(f"{own.label}{end}", own.settings.model_copy(update=change), baseline=True))
    return [*beside, own]


def against(recipe: StudyRecipe) -> str:
    """The line that the others are compared with: the last baseline that is a training, else random features."""
    beside = [entry.label for entry in entries_of(recipe) if entry.baseline]
    return beside[-1] if beside else RANDOM


def limited(settings: Any, problem: DataFree) -> Any:
    """The settings with tasks of the problem's ways, no more steps than it allows, and its looks along them."""
    steps = min(settings.steps, problem.most_steps or settings.steps)
    changed = {"steps": steps, "check_every": max(1, -(-steps // problem.checks)), "ways": problem.ways}
    changed["warm_up"] = min(settings.warm_up, steps // 4)
    if problem.quick:
        changed |= {name: min(getattr(settings, name), most) for name, most in QUICK.items()}
        changed |= {name: max(getattr(settings, name), QUICK_LR) for name in ("generator_lr", "latent_lr")}
    return settings.model_copy(update=changed)


def learner_network(problem: DataFree, pool: WhitePool, seed: int) -> Any:
    """The learner's network before training: of the pool's first kind where it is made here, else as its size allows."""
    arch: Arch = "conv2" if pool.shape[1] < 16 else "conv4"
    if isinstance(problem, _Made):
        arch = problem.archs[0]
    return network_of(problem, arch, pool.shape, problem.ways, "learner", seed)


def free_lines(problem: DataFree, pool: WhitePool, settings: Any, seed: int, suspects: list[int]) -> dict[str, Any]:
    """Learners that were never trained as such, by label."""
    from spolia.methods.datafree.learner import FewShotLearner

    plain = settings.model_copy(update={"head": "prototypes"})
    found: dict[str, Any] = {}
    if "random" in problem.baselines:
        found[RANDOM] = FewShotLearner(learner_network(problem, pool, seed), plain, features)
    if "average" in problem.baselines:
        place, network, count = averaged(pool, suspects)
        found[f"average of {count} models"] = FewShotLearner(network, plain, features_of(pool[place]))
    if "best" in problem.baselines:
        place = best(pool, suspects)
        found[BEST] = FewShotLearner(pool[place].module(), plain, features_of(pool[place]))
    return found


def on_real_data(problem: DataFree, pool: WhitePool, held: Held, settings: Any, seed: int, journal: Journal) -> Any:
    """The learner trained on real base classes, in as many steps on tasks as the recipe's."""
    from spolia.methods.datafree.learner import FewShotLearner
    from spolia.parts.episode import EpisodeSampler

    sets = [one for one in held.base.values() if len(one) >= problem.ways]
    learner = FewShotLearner(
        learner_network(problem, pool, seed), settings.model_copy(update={"head": "prototypes"}), features
    )
    shots, queries = settings.shots, min(settings.queries, 10)
    episodes = EpisodeSampler(sets, ways=problem.ways, shots=shots, queries=queries, seed=seed)
    optimizer = torch.optim.Adam(learner.network.parameters(), lr=settings.lr)
    for step in journal.steps(real_steps(problem, settings), {"learner": learner, "optimizer": optimizer}, shared=True):
        loss, _, gradient = learner.gradient(episodes.draw(settings.replay_tasks, step).floats())
        for name, weight in learner.weights().items():
            weight.grad = gradient.get(name)
        optimizer.step()
        if step % 50 == 0:
            journal.log(loss=loss)
    return learner


def real_steps(problem: DataFree, settings: Any) -> int:
    """Steps of the learner that has the data: as many as the recipe's learner takes on tasks."""
    if "real" not in problem.baselines or isinstance(problem, OwnModels):
        return 0
    return max(1, (settings.steps - settings.warm_up) * max(1, settings.replays))
