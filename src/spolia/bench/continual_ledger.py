"""What runs on one stream say together: means over paired seeds, intervals, differences, as rows of the results ledger.

A seed is one of everything: network, order of the batches, memory, and where the stream draws, its classes and domains. The
runs of one seed are pairs; differences are taken seed by seed. Intervals are Student's, 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from spolia.bench.continual import Outcome
from spolia.bench.continual_scores import average
from spolia.bench.multitask import AVERAGE, paired, t_interval

CLASS_IL, TASK_IL, ACCURACY = "Class-IL accuracy", "Task-IL accuracy", "accuracy"
INCREMENTAL, FORGETTING, BACKWARD = "incremental accuracy", "forgetting", "backward transfer"
TIME, MEMORY = "time", "memory"
UNITS = {TIME: "ms a step", MEMORY: "MB"}
MOST_COLUMNS = 10  # tests that have columns of their own

Found = dict[str, Any]


def found_of(outcome: Outcome) -> Found:
    """An outcome as JSON: numbers and matrices, null where nothing was asked."""
    numbers = {name: _told(value) for name, value in outcome.numbers().items()}
    matrices = {name: [[_told(v) for v in row] for row in getattr(outcome, name)] for name in ("matrix", "task_matrix")}
    about = {
        "scenario": outcome.stream["scenario"],
        "tests": outcome.sizes,
        "experiences": outcome.stream["experiences"],
    }
    cost = {"steps": outcome.steps, "seconds": outcome.seconds, "held": outcome.held}
    return {"stream": about, "numbers": numbers, **matrices, **cost}


def metrics_of(scenario: str, judged: str = "class") -> list[str]:
    """Those of a stream of this scenario; the first is what it is judged by: `judged` task or class."""
    rules = [ACCURACY]
    if scenario == "class":
        rules = [TASK_IL, CLASS_IL] if judged == "task" else [CLASS_IL, TASK_IL]
    return [*rules, INCREMENTAL, FORGETTING, BACKWARD, TIME, MEMORY]


def ledger_rows(
    found: Mapping[str, Sequence[Found]],
    task: str,
    *,
    against: Mapping[str, str] | None = None,
    baselines: Sequence[str] = (),
    judged: str = "class",
    each: bool = True,
) -> list[dict[str, Any]]:
    """Rows of every learner and metric. `found[learner]` has one entry a seed, in the same order for all.

    Accuracies have a row for each test, called as it is there, and one for their mean; everything else, and accuracies
    without `each`, have one row, called `task`. `against[learner]` names what its differences are taken from.
    """
    first = next(iter(found.values()))[0]
    scenario = first["stream"]["scenario"]
    tests = [f"task {j + 1}" for j in range(len(first["matrix"][0]))]
    rows = []
    for metric in metrics_of(scenario, judged):
        places: list[int | None] = [None]
        if each and metric in (CLASS_IL, TASK_IL, ACCURACY) and len(tests) <= MOST_COLUMNS:
            places = [*range(len(tests)), None]
        for learner, seeds in found.items():
            other = (against or {}).get(learner)
            for place in places:
                values = [value_of(one, metric, judged, place) for one in seeds]
                if any(value is None for value in values):
                    continue
                theirs = [value_of(one, metric, judged, place) for one in found.get(other or "", ())]
                name = tests[place] if place is not None else AVERAGE if len(places) > 1 else task
                rows.append(_row(learner, name, metric, values, theirs, other))
                if learner in baselines:
                    rows[-1]["baseline"] = True
    return rows


def value_of(one: Found, metric: str, judged: str = "class", place: int | None = None) -> float | None:
    """A metric of one run, of one test where `place` says which; None where it was not measured."""
    numbers = one["numbers"]
    if metric in (CLASS_IL, TASK_IL, ACCURACY):
        matrix = one["task_matrix" if metric == TASK_IL else "matrix"]
        return average(matrix) if place is None else matrix[-1][place]
    if metric == TIME:
        return numbers["milliseconds a step"]
    if metric == MEMORY:
        return numbers.get("megabytes held")
    named = {INCREMENTAL: "incremental average", FORGETTING: "forgetting", BACKWARD: "backward transfer"}[metric]
    return numbers.get(f"task {named}" if judged == "task" else named)


def mean_matrix(seeds: Sequence[Found], judged: str = "class") -> list[list[float | None]]:
    """The accuracy matrix, averaged over seeds."""
    matrices = [one["task_matrix" if judged == "task" else "matrix"] for one in seeds]
    return [[_mean(cells) for cells in zip(*rows, strict=True)] for rows in zip(*matrices, strict=True)]


def so_far(matrix: Sequence[Sequence[float | None]]) -> list[float]:
    """After every experience the mean accuracy on the tests so far."""
    return [fmean(v for v in row[: i + 1] if v is not None) for i, row in enumerate(matrix)]


def _row(
    learner: str, task: str, metric: str, values: Sequence[Any], theirs: Sequence[Any], other: str | None
) -> dict[str, Any]:
    interval = t_interval(values)
    low, high, unit = interval.low, interval.high, UNITS.get(metric, "%")
    if low is not None and high is not None:
        lowest = -100.0 if metric in (FORGETTING, BACKWARD) else 0.0
        low, high = max(lowest, low), min(100.0 if unit == "%" else math.inf, high)
    row: dict[str, Any] = {"method": learner, "task": task, "metric": metric, "unit": unit, "mean": interval.mean}
    row |= {"low": low, "high": high, "n": len(values)}
    if other and len(theirs) == len(values) > 1 and None not in theirs:
        gap = paired(values, theirs)
        row["paired_difference"] = {"against": other, "mean": gap.mean, "low": gap.low, "high": gap.high}
    return row


def _mean(cells: Sequence[float | None]) -> float | None:
    values = [cell for cell in cells if cell is not None]
    return fmean(values) if len(values) == len(cells) else None


def _told(value: float) -> float | None:
    return float(value) if math.isfinite(value) else None
