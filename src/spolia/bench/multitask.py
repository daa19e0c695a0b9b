"""How a merge is judged: one model, several tasks, accuracy with an interval, and differences on equal terms.

Over two seeds or more the interval is Student's over seeds: it covers new splits, new training and new merges. With one
seed it is Wilson's over test items and covers nothing else. A knob is turned by `choose`, on validation data only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist, fmean, stdev
from typing import TYPE_CHECKING, Any, TypeVar

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

LEVEL = 0.95
AVERAGE = "average"
T = TypeVar("T")


@dataclass(frozen=True)
class Share:
    """`correct` out of `total` test items."""

    correct: int
    total: int

    @property
    def percent(self) -> float:
        return 100 * self.correct / self.total


@dataclass(frozen=True)
class Interval:
    """A mean and where it lies with 95 % confidence; None where nothing can be said."""

    mean: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Task:
    """A task's items: inputs x [n, ...], labels y [n]."""

    name: str
    x: Tensor
    y: Tensor


def accuracy(outputs: Callable[[Any], Tensor], x: Any, y: Tensor, batch: int = 1024) -> Share:
    """How often the largest of `outputs(x)` [n, classes] is the label. A row with a NaN counts as wrong.

    `x`: inputs [n, ...], or whatever gives a batch of them for a slice.
    """
    correct = 0
    with torch.no_grad():
        for start in range(0, len(y), batch):
            scores = outputs(x[start : start + batch])
            right = (scores.argmax(1) == y[start : start + batch]) & ~scores.isnan().any(1)
            correct += int(right.sum())
    return Share(correct, len(y))


def evaluate(outputs: Callable[[str, Tensor], Tensor], tasks: Iterable[Task]) -> dict[str, Share]:
    """One model on every task; `outputs(task name, x)` gives its logits there."""
    return {task.name: accuracy(lambda x, name=task.name: outputs(name, x), task.x, task.y) for task in tasks}


def mean_percent(shares: Mapping[str, Share]) -> float:
    """Mean over tasks, each of equal weight."""
    return fmean(share.percent for share in shares.values())


def choose(values: Sequence[T], validation: Callable[[T], float]) -> tuple[T, list[float]]:
    """The value that scores highest on validation data, the first of equals, and every score."""
    scores = [validation(value) for value in values]
    return values[max(range(len(values)), key=lambda i: (not math.isnan(scores[i]), scores[i], -i))], scores


# --- intervals -------------------------------------------------------------------------------------------------------


def wilson(share: float, n: int, level: float = LEVEL) -> tuple[float, float]:
    """Wilson's interval of a proportion `share` (0 … 1) seen on n items (Wilson 1927)."""
    z = NormalDist().inv_cdf((1 + level) / 2)
    middle = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, min(share, middle - half)), min(1.0, max(share, middle + half))  # at 0 and 1 an end is the share


def t_interval(values: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean of independent repeats with Student's interval; a single value has none."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean)
    half = t_quantile((1 + level) / 2, len(values) - 1) * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def paired(values: Sequence[float], against: Sequence[float], level: float = LEVEL) -> Interval:
    """Mean of `values` minus `against`, seed by seed, so that what a seed makes easy or hard cancels."""
    return t_interval([a - b for a, b in zip(values, against, strict=True)], level)


def t_quantile(probability: float, degrees: int) -> float:
    """Where Student's distribution function reaches `probability` (above 1/2), to 1e-10."""
    low, high = 0.0, 1.0
    while _t_inside(high, degrees) < 2 * probability - 1:
        high *= 2
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _t_inside(middle, degrees) < 2 * probability - 1 else (low, middle)
    return (low + high) / 2


def _t_inside(t: float, degrees: int) -> float:
    """P(|T| < t), the closed sums of Abramowitz & Stegun 26.7.3 and 26.7.4."""
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, odd = math.cos(angle), degrees % 2
    term, total = (cosine, cosine) if odd else (1.0, 1.0)
    if degrees == 1:
        total = 0.0
    for k in range(3 if odd else 2, degrees - 1, 2):  # degrees - 1 excluded: the last power is degrees - 2
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + math.sin(angle) * total) if odd else math.sin(angle) * total


# --- rows of the results ledger --------------------------------------------------------------------------------------


def ledger_rows(
    scores: Mapping[str, Sequence[Mapping[str, Share]]],
    *,
    metric: str = "accuracy",
    baselines: Iterable[str] = (),
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of every method: each task, then their average. `scores[method]` has one entry per seed, in the same order.

    A method measured on fewer tasks than the first one has no average. `against` names the method that the others'
    paired differences are taken from.
    """
    baselines, rows = set(baselines), []
    every_task = set(next(iter(scores.values()))[0]) if scores else set()
    for method, seeds in scores.items():
        whole = set(seeds[0]) == every_task
        for task in [*seeds[0], *([AVERAGE] if whole and len(every_task) > 1 else [])]:
            values, n = _values(seeds, task)
            row = {"method": method, "task": task, "metric": metric, "unit": "%"} | _measured(values, n)
            if method in baselines:
                row["baseline"] = True
            if against in scores and method != against and whole:
                other, _ = _values(scores[against], task)
                gap = paired(values, other)
                row["paired_difference"] = {"against": against, "mean": gap.mean, "low": gap.low, "high": gap.high}
            rows.append(row)
    return rows


def _values(seeds: Sequence[Mapping[str, Share]], task: str) -> tuple[list[float], int]:
    """Per cent for each seed, and the test items behind one of them (tasks may show the same images: counted once)."""
    if task == AVERAGE:
        return [mean_percent(shares) for shares in seeds], min(share.total for share in seeds[0].values())
    return [shares[task].percent for shares in seeds], seeds[0][task].total


def _measured(values: Sequence[float], items: int) -> dict[str, Any]:
    """mean, low, high and n: seeds where there are several, else test items."""
    if len(values) == 1:
        low, high = wilson(values[0] / 100, items)
        return {"mean": values[0], "low": 100 * low, "high": 100 * high, "n": items}
    interval = t_interval(values)
    assert interval.low is not None and interval.high is not None
    low, high = max(0.0, interval.low), min(100.0, interval.high)  # accuracy ends there
    return {"mean": interval.mean, "low": low, "high": high, "n": len(values)}
