"""The lines of a continual table: the recipe's learner, what it goes around, fine-tuning below and joint training above."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method, find
from spolia.runs.continual_problems import Continual
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from spolia.methods.continual.features import Features
    from spolia.methods.continual.learner import Model
    from spolia.parts.stream import Stream

AROUND = ("cpr", "refresh")
AT_ENDS = ("ewc", "si", "mas", "lwf", "icarl", "vcl")  # learn what to hold when a task ends
LOWER, UPPER = "finetune", "joint"
_STEP = ("lr", "momentum", "weight_decay", "fresh")


@dataclass(frozen=True)
class Entry:
    """One learner of a seed. `against`: the line its differences are taken from."""

    label: str
    method: str
    settings: Any
    against: str = ""
    baseline: bool = False
    own: bool = False


def entries_of(recipe: StudyRecipe) -> list[Entry]:
    """Baselines first, the recipe's own last. Baselines take the same steps: learning rate, momentum, weight decay."""
    name, most = recipe.method.name, recipe.problem.memory
    own = limited(recipe.settings, most)
    steps = own.hosted() if name in AROUND else own
    plain = {field: getattr(steps, field) for field in _STEP}
    found = [
        Entry(label, label, find(label).settings_class()(**plain), "" if label == LOWER else LOWER, baseline=True)
        for label in (LOWER, UPPER)
        if label != name
    ]
    label = label_of(name, own)
    if name not in AROUND:
        return [*found, Entry(label, name, own, UPPER if name == LOWER else LOWER, own=True)]
    if own.host != LOWER:
        found.append(Entry(own.host, own.host, steps, LOWER, baseline=True))
    return [*found, Entry(label, name, own, own.host, own=True)]


def label_of(name: str, settings: Any) -> str:
    return f"{settings.host} + {name}" if name in AROUND else name


def host_of(method: Method, settings: Any) -> str:
    """The learner that meets the stream: the method, or what it goes around."""
    return settings.host if method.name in AROUND else method.name


def limited(settings: Any, most: int | None) -> Any:
    """The settings with no more memory than the problem allows."""
    if most is None:
        return settings
    if hasattr(settings, "host_settings"):
        host = limited(settings.hosted(), most).model_dump(mode="json")
        return settings.model_copy(update={"host_settings": host})
    return settings.model_copy(update={"items": min(settings.items, most)}) if hasattr(settings, "items") else settings


def learner_of(
    name: str, settings: Any, model: Model, stream: Stream, seed: int, *, features: Features | None = None
) -> Any:
    """The learner of a method. `features` are asked for by icarl alone."""
    made: Any = find(name).function()
    match name:
        case "joint":
            return made(model, settings, stream=stream, seed=seed)
        case "icarl" if features is not None:
            return made(model, settings, features=features, seed=seed)
        case "cpr" | "refresh":
            host = learner_of(settings.host, settings.hosted(), model, stream, seed, features=features)
            return made(host, settings) if name == "cpr" else made(host, settings, seed=seed)
    return made(model, settings, seed=seed)


def passes(entry: Entry, problem: Continual) -> float:
    """Forward and backward passes of a step, about: what its time is counted by."""
    if entry.method in AROUND:
        more = getattr(entry.settings, "steps", 0)
        return passes(Entry("", entry.settings.host, entry.settings.hosted()), problem) + more
    if entry.method == UPPER:
        return (problem.count + 1) / 2 if problem.scenario != "online" else 1.0
    replay = getattr(entry.settings, "replay", 0) / problem.batch
    return 1.0 + replay * (2 if entry.method in ("derpp", "unified") else 1)
