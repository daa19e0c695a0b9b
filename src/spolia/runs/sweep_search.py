"""A search: Optuna's TPE draws the points of a sweep, a few at a time, and learns from what validation says of them.

What was drawn and told stands in search.journal beside the runs. A search that was stopped goes on as if it had not been:
each draw has a seed of its own, and a point drawn but not finished is finished first.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.errors import Problems
from spolia.runs.environment import installed
from spolia.runs.sweep_grid import Axis, Point

if TYPE_CHECKING:
    from optuna.study import Study
    from optuna.trial import FrozenTrial, Trial

JOURNAL = "search.journal"

Judge = Callable[[Sequence[tuple[str, Point]]], list[float | None]]
"""Runs named points; what each scored, None where a run of it failed."""


def check_installed(problems: Problems) -> None:
    """A problem where Optuna is missing."""
    if installed("optuna") is None:
        problems.add("--search", "optuna is not installed", "pip install 'spolia[tune]'")


def search(
    folder: Path, axes: Sequence[Axis], count: int, judge: Judge, *, lowest: bool, at_once: int, seed: int
) -> None:
    """Draws until `count` points were tried, `at_once` before it learns again; those of earlier calls count."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with _without_warnings():
        study = _study(folder, lowest)
        left = [trial for trial in _drawn(study, axes) if trial.state == optuna.trial.TrialState.RUNNING]
        _try(study, axes, left, judge)
        while (missing := count - len(_drawn(study, axes))) > 0:
            _try(study, axes, [_ask(study, axes, seed) for _ in range(min(missing, at_once))], judge)


def trial_name(number: int) -> str:
    return f"point-{number:03d}"


def _study(folder: Path, lowest: bool) -> Study:
    import optuna
    from optuna.storages.journal import JournalFileBackend

    (folder / f"{JOURNAL}.lock").unlink(missing_ok=True)  # of one that was killed; the sweep has a lock of its own
    storage = optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
    direction = "minimize" if lowest else "maximize"
    return optuna.create_study(storage=storage, study_name="sweep", direction=direction, load_if_exists=True)


def _drawn(study: Study, axes: Sequence[Axis]) -> list[FrozenTrial]:
    """All points so far. One that a kill cut off in the middle of its drawing has no values, and does not count."""
    keys = {axis.key for axis in axes}
    return [trial for trial in study.get_trials(deepcopy=False) if trial.params.keys() == keys]


def _ask(study: Study, axes: Sequence[Axis], seed: int) -> Trial:
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    space: dict[str, Any] = {}
    for axis in axes:
        if not axis.is_range:
            space[axis.key] = CategoricalDistribution(axis.values)
        elif axis.whole:
            space[axis.key] = IntDistribution(int(axis.low), int(axis.high), log=axis.log)
        else:
            space[axis.key] = FloatDistribution(axis.low, axis.high, log=axis.log)
    number = len(study.get_trials(deepcopy=False))
    # A point that is being tried counts as a bad one, so that those tried together keep apart.
    study.sampler = optuna.samplers.TPESampler(seed=1_000_003 * seed + number, constant_liar=True)
    return study.ask(space)


def _try(study: Study, axes: Sequence[Axis], trials: Sequence[Trial | FrozenTrial], judge: Judge) -> None:
    """Judges points and tells what they scored. A failed one is told nothing: it is tried again next time."""
    points = [(trial_name(trial.number), _point(trial, axes)) for trial in trials]
    for trial, score in zip(trials, judge(points) if points else (), strict=True):
        if score is not None:
            study.tell(trial.number, score)


def _point(trial: Trial | FrozenTrial, axes: Sequence[Axis]) -> Point:
    drawn = trial.params
    return Point(tuple((a.key, a.text(drawn[a.key]) if a.is_range else drawn[a.key]) for a in axes))


@contextmanager
def _without_warnings() -> Iterator[None]:
    """Optuna calls parts of itself experimental, which is nothing a user could act on."""
    import optuna

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield
