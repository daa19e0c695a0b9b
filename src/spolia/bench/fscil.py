"""Few-shot class-incremental tables: accuracy of all classes seen after each session, old against new, what was lost.

A seed is one of everything: order of classes, shots, prompts' start. The runs of one seed are pairs; differences are taken seed
by seed. Intervals are Student's, 95 %.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from spolia.bench.continual import Outcome
from spolia.bench.continual_scores import harmonic, pooled
from spolia.bench.multitask import AVERAGE, paired, t_interval

ACCURACY, BASE, NOVEL, HARMONIC, DROP = (
    "accuracy",
    "base accuracy",
    "novel accuracy",
    "harmonic accuracy",
    "performance drop",
)
TIME, LEARNED = "time", "learned"
METRICS = (ACCURACY, BASE, NOVEL, HARMONIC, DROP, TIME, LEARNED)
UNITS = {TIME: "s", LEARNED: "kB"}
KEYS = {
    BASE: "base",
    NOVEL: "novel",
    HARMONIC: "harmonic",
    DROP: "performance drop",
    TIME: "seconds",
    LEARNED: "learned",
}

Found = dict[str, Any]


def found_of(outcome: Outcome, learned: int = 0) -> Found:
    """An outcome as JSON. `learned`: bytes of what is kept for answers beside the encoder."""
    seen = [pooled(outcome.matrix, outcome.sizes, i) for i in range(len(outcome.matrix))]
    last = [float(a) for a in outcome.matrix[-1]]
    cost = {"seconds": outcome.seconds, "learned": learned / 1e3, "steps": outcome.steps}
    return {"sessions": seen, "last row": last, "sizes": outcome.sizes, **outcome.fewshot(), **cost}


def grouped_harmonic(accuracies: Sequence[float], base: int, size: int) -> float:
    """Harmonic accuracy as ASP's program has it, of each class's accuracy by id: old and new are means over groups of `size`
    classes in turn, old those that end within the first `base`."""
    groups = [accuracies[start : start + size] for start in range(0, len(accuracies), size)]
    old = [fmean(group) for i, group in enumerate(groups) if (i + 1) * size <= base]
    new = [fmean(group) for i, group in enumerate(groups) if (i + 1) * size > base]
    return harmonic(fmean(old), fmean(new)) if old and new else 0.0


def ledger_rows(
    found: Mapping[str, Sequence[Found]], task: str, *, against: str = "", baselines: Sequence[str] = ()
) -> list[dict[str, Any]]:
    """Rows of every method and metric. `found[method]` has one entry a seed, in the same order for all.

    Accuracy has a row for each session and one, `average`, for their mean; all else one, called `task`. Differences are
    taken from `against`.
    """
    rows = []
    count = len(next(iter(found.values()))[0]["sessions"])
    for metric in METRICS:
        places: list[int | None] = [*range(count), None] if metric == ACCURACY else [None]
        for method, seeds in found.items():
            for place in places:
                name = task if metric != ACCURACY else AVERAGE if place is None else session_name(place)
                values = [value_of(one, metric, place) for one in seeds]
                theirs = [value_of(one, metric, place) for one in found.get(against, ())] if method != against else []
                rows.append(_row(method, name, metric, values, theirs, against))
                if method in baselines:
                    rows[-1]["baseline"] = True
    return rows


def value_of(one: Found, metric: str, place: int | None = None) -> float:
    if metric == ACCURACY:
        return one["mean"] if place is None else one["sessions"][place]
    return one[KEYS[metric]]


def session_name(place: int) -> str:
    return f"session {place}" if place else "base"


def _row(
    method: str, task: str, metric: str, values: Sequence[float], theirs: Sequence[float], against: str
) -> dict[str, Any]:
    interval, unit = t_interval(values), UNITS.get(metric, "%")
    low, high = interval.low, interval.high
    if low is not None and high is not None and unit == "%":
        low, high = max(-100.0 if metric == DROP else 0.0, low), min(100.0, high)
    elif low is not None:
        low = max(0.0, low)
    row: dict[str, Any] = {"method": method, "task": task, "metric": metric, "unit": unit, "mean": interval.mean}
    row |= {"low": low, "high": high, "n": len(values)}
    if len(theirs) == len(values) > 1:
        gap = paired(values, theirs)
        row["paired_difference"] = {"against": against, "mean": gap.mean, "low": gap.low, "high": gap.high}
    return row
