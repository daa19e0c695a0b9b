"""The lines of a few-shot table: the recipe's learner, what it stands on, and the cheap ones beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core.journal import Journal
from spolia.runs.meta_judging import together
from spolia.runs.meta_problems import FewShot, features, network_of, sampler, views_of
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from spolia.runs.meta_judging import together
from spolia.runs.meta_problems import Classes

LOOKS = 4  # of validation along a training whose steps the problem limits
UNADAPTED = ", not adapted"
UNTRAINED = ", not trained"


@dataclass(frozen=True)
class Entry:
    """One training of a seed."""

    label: str
    method: str
    settings: Any
    baseline: bool = False

    @property
    def basis(self) -> Any:
        """The settings that hold the steps."""
        return self.settings.basis() if hasattr(self.settings, "basis") else self.settings

    @property
    def steps(self) -> int:
        """Of all its loops."""
        return self.basis.steps + getattr(self.basis, "pretrain", 0)


def entries_of(recipe: StudyRecipe) -> list[Entry]:
    """Baselines first, the recipe's own last."""
    problem: FewShot = recipe.problem
    own = Entry(label_of(recipe), recipe.method.name, limited(recipe.settings, problem.most_steps))
    beside = []
    if own.method != "protonet":
        kind = find("protonet").settings_class()
        steps = min(kind().steps, own.basis.steps)
        beside.append(Entry("protonet", "protonet", limited(kind(steps=steps), problem.most_steps), baseline=True))
    if own.method == "msd":
        base = recipe.settings.base
        beside.append(Entry(base, base, limited(recipe.settings.basis(), problem.most_steps), baseline=True))
    return [*beside, own]


def label_of(recipe: StudyRecipe) -> str:
    return f"msd on {recipe.settings.base}" if recipe.method.name == "msd" else recipe.method.name


def base_label(recipe: StudyRecipe) -> str:
    """The line that the others are compared with."""
    if recipe.method.name == "msd":
        return recipe.settings.base
    return "protonet" if recipe.method.name != "protonet" else f"protonet{UNTRAINED}"


def limited(settings: Any, most: int | None) -> Any:
    """The settings with no more outer steps than the problem allows, and then some looks at validation."""
    if most is None:
        return settings
    if hasattr(settings, "base_settings"):
        basis = limited(settings.basis(), most)
        return settings.model_copy(update={"base_settings": basis.model_dump(mode="json")})
    changed = {"steps": min(settings.steps, most)}
    changed["check_every"] = min(settings.check_every, max(1, changed["steps"] // LOOKS))
    if hasattr(settings, "pretrain"):
        changed["pretrain"] = min(settings.pretrain, most)
    return settings.model_copy(update=changed)


def trained(entry: Entry, problem: FewShot, classes: Classes, seed: int, journal: Journal) -> Any:
    """The learner of an entry after its training, last and selected weights in it."""
    from spolia.bench.fewshot import evaluate

    episodes = sampler(problem, classes.train, seed, problem.train_queries)
    judge = sampler(problem, classes.validation, seed)

    def watch(step: int, learner: Any) -> float:
        return evaluate(learner.predict, judge, problem.validation, together=together(learner)).mean()

    network = network_of(problem, classes.train.shape, seed)
    more: dict[str, Any] = {}
    if entry.method == "msd":
        more["views"] = views_of(problem).views
    elif entry.method == "protonet":
        more["embed"] = features
    return find(entry.method).function()(network, episodes, entry.settings, journal, watch=watch, **more)


def untrained(entry: Entry, problem: FewShot, classes: Classes, seed: int) -> Any:
    """ProtoNet's learner before any step."""
    from spolia.methods.meta.protonet import ProtonetLearner

    return ProtonetLearner(network_of(problem, classes.train.shape, seed), entry.settings, features)
