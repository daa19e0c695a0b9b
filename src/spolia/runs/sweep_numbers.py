"""What a finished run says about its recipe's own method: the main number on the test, and what validation data said.

A point is judged by the first and chosen by the second. Only digits merges, distillation, few-shot and data-free learning keep
numbers on validation data; runs of other recipes have the test alone.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import AVERAGE

if TYPE_CHECKING:  # a sweep is listed without reading a recipe
    from spolia.runs.recipe import Recipe
    from spolia.runs.studies import StudyRecipe

ACCURACY, LOSS = "accuracy", "loss"


def own_line(recipe: Recipe | StudyRecipe) -> str:
    """What the tables of a run call the recipe's own method."""
    from spolia.runs import folder_ledger, surgery_ledger
    from spolia.runs.schema import DigitsPool
    from spolia.runs.studies import StudyRecipe

    if isinstance(recipe, StudyRecipe):
        return _line_of_study(recipe)
    if recipe.repair[0].family != "surgery":
        return folder_ledger.labels_of(recipe)[0]
    ledger = surgery_ledger.labels if isinstance(recipe.pool, DigitsPool) else folder_ledger.labels_of
    return ledger(recipe)[1]


def _line_of_study(recipe: StudyRecipe) -> str:
    name = recipe.method.name
    if recipe.family == "distill":
        from spolia.runs.distill_study import entries_of

        return next(entry.label for entry in entries_of(recipe) if entry.own)
    if recipe.family == "meta":
        from spolia.runs.meta_entries import label_of

        return label_of(recipe)
    if recipe.family == "link":
        from spolia.runs.link_schemes import schemes_of

        return schemes_of(recipe)[-1].label
    if recipe.family == "continual":
        from spolia.runs import apis_entries, continual_entries

        own = apis_entries.label_of(recipe.problem) if name == "apis" else ""
        return own or continual_entries.label_of(name, recipe.settings)
    return name


def validated(recipe: Recipe | StudyRecipe) -> tuple[str, ...]:
    """The metrics that a run of `recipe` takes on validation data, the main one first; none: it has the test alone."""
    from spolia.runs.recipe import Recipe
    from spolia.runs.schema import DigitsPool

    if isinstance(recipe, Recipe):
        merge_of_digits = isinstance(recipe.pool, DigitsPool) and recipe.repair[0].family != "surgery"
        return (ACCURACY,) if merge_of_digits else ()
    known = {"distill": (ACCURACY, LOSS), "datafree": (ACCURACY,), "meta": (ACCURACY,)}
    return known.get(recipe.family, ())


def number_of(folder: Path, line: str, metric: str | None) -> dict[str, Any] | None:
    """Metric, unit, mean, low, high and n of `line` in the run's results: its average over tasks, or its only task.

    Without `metric` accuracy, else the first that was measured. An average that the ledger does not state is the plain
    mean of the tasks, without interval. None where the run has no such row.
    """
    own = [row for row in _rows(folder) if row.get("method") == line and _finite(row.get("mean"))]
    metrics = list(dict.fromkeys(row["metric"] for row in own))
    chosen = metric or (ACCURACY if ACCURACY in metrics else next(iter(metrics), None))
    found = [row for row in own if row["metric"] == chosen]
    whole = [row for row in found if row["task"] == AVERAGE] or found
    if not whole:
        return None
    told = {"metric": chosen, "unit": whole[0].get("unit") or "", "mean": fmean(row["mean"] for row in whole)}
    one = whole[0] if len(whole) == 1 else {}
    return told | {key: one.get(key) for key in ("low", "high", "n")}


def metrics_in(folder: Path, line: str) -> list[str]:
    """What was measured of `line`."""
    return list(dict.fromkeys(row["metric"] for row in _rows(folder) if row.get("method") == line))


def validation_of(folder: Path, line: str) -> dict[str, float]:
    """By metric what `line` reached on validation data, mean over the run's seeds; empty where none was kept."""
    found: dict[str, list[float]] = {}
    for file in sorted((folder / "checkpoints").glob("*-seed-*.json")):
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            seen = _seen(file.name.partition("-")[0], kept, line)
        except (OSError, ValueError, KeyError, TypeError, IndexError):
            continue
        for name, value in seen.items():
            if _finite(value):
                found.setdefault(name, []).append(float(value))
    return {name: fmean(values) for name, values in found.items()}


def _seen(kind: str, kept: dict[str, Any], line: str) -> dict[str, Any]:
    """One seed's numbers on validation data, in the form that its family keeps them in."""
    if kind == "scores":
        return {metric: by_line[line] for metric, by_line in kept["validation"].items() if line in by_line}
    if kind == "distill":
        seen = kept[line]["validation"]
        return {ACCURACY: 100 * seen[ACCURACY], LOSS: seen[LOSS]}
    if kind == "datafree":
        return {ACCURACY: [value for _, value, _ in kept["points"][line] if value is not None][-1]}
    if kind == "meta":
        return {ACCURACY: kept["validation"][line]}
    return {}


def _rows(folder: Path) -> list[dict[str, Any]]:
    try:
        rows = json.loads((folder / "results.json").read_text(encoding="utf-8"))["rows"]
        return [row for row in rows if {"method", "task", "metric", "mean"} <= row.keys()]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return []


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
