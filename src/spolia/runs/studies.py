"""Recipes of the families that work on a `problem` (data, models, an evaluation) where merges work on a `pool`.

A family's study module says what its problems look like and how one is planned and run: PROBLEMS, the shapes by `source`;
check_study, what method and problem ask of each other; plan_study; run_study; and for `spolia new`, problem_text and told:
time, score and data touched.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import yaml

from spolia.catalog import Method
from spolia.errors import Problems, did_you_mean
from spolia.runs import yamlmarks
from spolia.runs.complaints import validate
from spolia.runs.schema import VERSION, Shape, StudyHead
from spolia.runs.yamlmarks import Marked

STUDIES: dict[str, str] = {
    "distill": "spolia.runs.distill_study",
    "meta": "spolia.runs.meta_study",
    "datafree": "spolia.runs.datafree_study",
    "link": "spolia.runs.link_study",
    "continual": "spolia.runs.continual_recipes",
}


@dataclass(frozen=True)
class StudyRecipe:
    """A checked recipe of such a family. `settings` is the method's own Settings, `problem` a shape of its family."""

    name: str
    text: str
    marked: Marked
    method: Method
    settings: Any
    problem: Any
    seed: int = 0
    seeds: int = 1

    @property
    def family(self) -> str:
        return self.method.family

    @property
    def short_name(self) -> str:
        """Last part of the name: the run's folder is called after it."""
        return self.name.rpartition("/")[2]

    @property
    def every_seed(self) -> list[int]:
        return list(range(self.seed, self.seed + self.seeds))

    def to_yaml(self) -> str:
        """The resolved recipe: every setting written out, overrides and defaults included. Loads back to itself."""
        resolved = {
            "spolia": VERSION,
            "seed": self.seed,
            "seeds": self.seeds,
            "problem": self.problem.model_dump(mode="json"),
            "method": {"name": self.method.name, **self.settings.model_dump(mode="json")},
        }
        return yaml.safe_dump(resolved, sort_keys=False, allow_unicode=True, width=100)


def module_of(family: str) -> Any:
    """The family's study module."""
    return import_module(STUDIES[family])


def check_study(
    name: str,
    marked: Marked,
    text: str,
    raw: dict[str, Any],
    method: Method,
    settings: Any,
    where: Callable[[yamlmarks.Path], str],
    problems: Problems,
) -> StudyRecipe:
    """The recipe with its head and problem checked, or everything that is wrong with it."""
    head = validate(StudyHead, raw, (), where, problems)
    study, problem = module_of(method.family), None
    given = raw.get("problem")
    if isinstance(given, dict):  # anything else has been told
        shapes: dict[str, type[Shape]] = study.PROBLEMS
        source = given.get("source", next(iter(shapes)))
        if isinstance(source, str) and source in shapes:
            problem = validate(shapes[source], given, ("problem",), where, problems)
        else:
            problems.add(where(("problem", "source")), f"`{source}` is not a source", did_you_mean(str(source), shapes))
    if problem is not None and settings is not None:
        study.check_study(method, settings, problem, where, problems)
    problems.raise_if_any()
    assert head is not None and problem is not None  # each None has left a problem
    return StudyRecipe(name, text, marked, method, settings, problem, head.seed, head.seeds)
