"""Recipes of the family continual: those of labelled streams, and those of a method that has problems of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from spolia.catalog import Method
from spolia.errors import Problems
from spolia.runs import apis_study, continual_study, fscil_study
from spolia.runs.plan import Plan
from spolia.runs.schema import Shape
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

OWN: dict[str, Any] = {"apis": apis_study, **dict.fromkeys(("ncm", "l2p", "dualprompt", "coda", "asp"), fscil_study)}
PROBLEMS: dict[str, type[Shape]] = {**continual_study.PROBLEMS, **apis_study.PROBLEMS, **fscil_study.PROBLEMS}


def _of(method: Method) -> Any:
    return OWN.get(method.name, continual_study)


def check_study(
    method: Method, settings: Any, problem: Any, where: Callable[[tuple[Any, ...]], str], problems: Problems
) -> None:
    """What method and problem ask of each other."""
    study = _of(method)
    if not isinstance(problem, tuple(study.PROBLEMS.values())):
        what = f"{method.name} does not work on `{problem.source}`"
        problems.add(where(("problem", "source")), what, f"write one of {', '.join(study.PROBLEMS)}")
        return
    study.check_study(method, settings, problem, where, problems)


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do."""
    return _of(recipe.method).plan_study(recipe)


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """The run."""
    _of(recipe.method).run_study(recipe, run, progress)


def problem_text(method: Method, tiny: bool) -> str:
    """The `problem` of a new recipe."""
    return _of(method).problem_text(method, tiny)


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score and data touched, for the head of a new recipe."""
    return _of(method).told(method, tiny)
