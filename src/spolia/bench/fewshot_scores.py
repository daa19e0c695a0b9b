"""What few-shot learners reached: by episode, with intervals, as differences on the same episodes, as rows of the ledger.

Intervals are 95 %. Over episodes mean ± 1.96 sd / sqrt(n): it holds for the one model that was trained. Over training seeds
Student's: it holds for the training. Of one training, the last model, the one that validation chose and the one that
happened to be best on test are three different numbers.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean, stdev
from typing import Any

from spolia.bench.consistency import AGREEMENT, FLOOR, JS
from spolia.bench.multitask import Interval, paired, t_interval
from spolia.errors import SpoliaError

Z = 1.96
ACCURACY, ORDERS, SPREAD = "accuracy", "accuracy over label orders", "spread over label orders"
PERCENT = (ACCURACY, ORDERS, SPREAD, AGREEMENT, AGREEMENT + FLOOR)
SEEDS = " over seeds"
UNITS = {JS: "nats", JS + FLOOR: "nats"}


@dataclass(frozen=True)
class Scores:
    """What a learner reached in every episode, by metric; shares are 0 … 1.

    `episodes` says which these were and `scenario` what was done to their support: only equals are compared.
    """

    episodes: str
    scenario: str
    values: Mapping[str, tuple[float, ...]] = field(repr=False)

    def __len__(self) -> int:
        return len(self.values[ACCURACY])

    def mean(self, metric: str = ACCURACY) -> float:
        """In the metric's unit: per cent where it is a share."""
        return _factor(metric) * fmean(self.of(metric))

    def interval(self, metric: str = ACCURACY) -> Interval:
        """Over episodes."""
        return z_interval([_factor(metric) * value for value in self.of(metric)])

    def of(self, metric: str) -> tuple[float, ...]:
        if metric not in self.values:
            raise SpoliaError(f"`{metric}` was not measured", where="scores", mend=f"there is {', '.join(self.values)}")
        return self.values[metric]


# --- intervals and differences ---------------------------------------------------------------------------------------


def z_interval(values: Sequence[float]) -> Interval:
    """Mean of many episodes ± 1.96 sd / sqrt(n); a single one has none."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean)
    half = Z * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def difference(a: Scores, b: Scores, metric: str = ACCURACY) -> Interval:
    """a minus b on the same episodes, over episodes, so that what makes an episode easy or hard cancels."""
    _same([a, b])
    return z_interval([_factor(metric) * (x - y) for x, y in zip(a.of(metric), b.of(metric), strict=True)])


def over_seeds(scores: Sequence[Scores], metric: str = ACCURACY) -> Interval:
    """One Scores for each training seed: the mean of their means, with Student's interval."""
    return t_interval([one.mean(metric) for one in scores])


def difference_over_seeds(a: Sequence[Scores], b: Sequence[Scores], metric: str = ACCURACY) -> Interval:
    """a minus b, seed by seed."""
    _same([*a, *b])
    if len(a) != len(b):
        raise SpoliaError(f"{len(a)} and {len(b)} seeds", where="scores", mend="train both with the same seeds")
    return paired([one.mean(metric) for one in a], [one.mean(metric) for one in b])


def averaged(scores: Sequence[Scores]) -> Scores:
    """Each episode's mean over training seeds, for all metrics that all of them have."""
    _same(scores)
    shared = [metric for metric in scores[0].values if all(metric in one.values for one in scores)]
    values = {m: tuple(map(fmean, zip(*(one.of(m) for one in scores), strict=True))) for m in shared}
    return Scores(scores[0].episodes, scores[0].scenario, values)


# --- which of a training's models ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """A model along its training: accuracy on validation classes and on test classes, in per cent."""

    step: int
    validation: float
    test: float


@dataclass(frozen=True)
class Stages:
    """`last`: at the end of training. `selected`: best on validation, the earliest of equals. `peak`: best on test.

    The peak was chosen by the answer: it bounds what selection could reach and is no result.
    """

    last: Point
    selected: Point
    peak: Point


def stages(points: Sequence[Point]) -> Stages:
    """The three models that are often mixed up, of one training's checks."""
    if not points:
        raise SpoliaError("there are none", where="points", mend="check the model along its training")
    ordered = sorted(points, key=lambda point: point.step)
    return Stages(ordered[-1], max(ordered, key=lambda p: p.validation), max(ordered, key=lambda p: p.test))


# --- rows of the results ledger --------------------------------------------------------------------------------------


def ledger_rows(
    scores: Mapping[str, Sequence[Scores]],
    task: str,
    *,
    baselines: Iterable[str] = (),
    against: str | None = None,
) -> list[dict[str, Any]]:
    """Rows of every method and metric. `scores[method]` has one entry for each training seed, in the same order.

    The interval is over episodes, each averaged over seeds; with several seeds a second row, `METRIC over seeds`, has
    Student's over seeds. `against` names the method that the others' paired differences are taken from.
    """
    baselines, rows = set(baselines), []
    for method, seeds in scores.items():
        mean = averaged(seeds)
        for metric in mean.values:
            own = [_row(method, task, metric, metric, mean.interval(metric), len(mean))]
            if len(seeds) > 1:
                own.append(_row(method, task, metric + SEEDS, metric, over_seeds(seeds, metric), len(seeds)))
            if against in scores and method != against and all(metric in one.values for one in scores[against]):
                gaps = [difference(mean, averaged(scores[against]), metric)]
                gaps += [difference_over_seeds(seeds, scores[against], metric)] if len(seeds) > 1 else []
                for row, gap in zip(own, gaps, strict=True):
                    row["paired_difference"] = {"against": against, "mean": gap.mean, "low": gap.low, "high": gap.high}
            rows += [row | {"baseline": True} if method in baselines else row for row in own]
    return rows


def _row(method: str, task: str, name: str, metric: str, found: Interval, n: int) -> dict[str, Any]:
    low, high = found.low, found.high
    if metric in PERCENT and low is not None and high is not None:
        low, high = max(0.0, low), min(100.0, high)  # a share ends there
    unit = "%" if metric in PERCENT else UNITS.get(metric, "")
    row = {"method": method, "task": task, "metric": name, "unit": unit}
    return row | {"mean": found.mean, "low": low, "high": high, "n": n}


def _factor(metric: str) -> float:
    return 100.0 if metric in PERCENT else 1.0


def _same(scores: Sequence[Scores]) -> None:
    """SpoliaError unless all are of the same episodes in the same scenario."""
    kinds = {(one.episodes, one.scenario) for one in scores}
    if len(kinds) != 1:
        what = f"they are of different episodes or scenarios: {'; '.join(' '.join(kind) for kind in sorted(kinds))}"
        raise SpoliaError(what, where="scores", mend="evaluate all with one sampler, as many episodes, one `augment`")
