"""Many runs of one recipe: `spolia sweep` as a function.

Each run is an ordinary run folder; sweep.json beside them holds the table. Asked again, finished runs are passed over,
interrupted ones go on, and failed ones are tried again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.journal import Interrupted
from spolia.errors import SpoliaError, did_you_mean
from spolia.runs.sweep_table import FILE, Sweep, SweptRun, points_of, score_of, usual_folder

if TYPE_CHECKING:
    from spolia.runs.sweep_check import Ready
    from spolia.runs.sweep_grid import Over, Point
    from spolia.runs.sweep_local import Job, Outcome, Place

Tell = Callable[[str], None]


def sweep(
    recipe: str | os.PathLike[str],
    over: Over = (),
    *,
    seeds: int | None = None,
    folder: str | os.PathLike[str] | None = None,
    overrides: Sequence[str] = (),
    on: str = "local",
    resources: Mapping[str, Any] | Sequence[str] = (),
    jobs: int | None = None,
    search: int | None = None,
    metric: str | None = None,
    lowest: bool | None = None,
    on_test: bool = False,
    dry_run: bool = False,
    tell: Tell | None = None,
) -> Sweep:
    """Run `recipe` at every combination of `over` and seeds, each in a folder of its own below `folder`.

    `over` maps keys of the recipe to lists of values (`{"method.scale": [0.1, 0.3]}`), or with `search` to ranges
    (`"0.1..0.9"`, `"1e-4..1e-1:log"`); texts as on the command line do too (`["method.scale=0.1,0.3"]`). `seeds` runs each
    point with so many seeds, from the recipe's own on. `search` has Optuna draw so many points, and goes by `metric` on
    validation data, where `lowest` says what is better; `on_test` lets it go by the test. `on` is local, ray or slurm,
    `resources` what a run gets there, `jobs` how many run at a time. `tell` hears the table of runs first, then of each run
    as it ends. The default folder is `runs/RECIPE-sweep`.

    A run that fails is kept with its error, and the others go on: see `.failed`. With `dry_run` nothing is run or written.
    Raises SpoliaError with everything that does not fit before anything runs, Interrupted after Ctrl-C.
    """
    from spolia.runs.sweep_check import Asked, check

    asked = Asked(
        str(recipe), over, seeds, folder, overrides, on, resources, jobs, search, metric, lowest, on_test
    )  # fmt: skip
    ready, told = check(asked), tell or (lambda _: None)
    told(_beginning(ready))
    if not dry_run:
        _run(ready, told)
    return ready.sweep


def listed(folder: str | os.PathLike[str]) -> Sweep:
    """The sweep in a folder, or a recipe's in its usual one, as it stands. Opens sweep.json, and unfinished runs' status."""
    path, usual = Path(folder), usual_folder(Path(folder).stem)
    return Sweep.read(usual if not (path / FILE).is_file() and (usual / FILE).is_file() else path)


def _beginning(ready: Ready) -> str:
    """What is told before anything runs."""
    swept, count = ready.sweep, ready.asked.search
    if count is None:
        cost = f"\nabout {max(1, round(ready.seconds / 60))} min, one after another" if ready.seconds else ""
        return swept.runs_text() + cost
    before = swept.runs_text() + "\n" if swept.runs else ""
    return f"{before}{swept.recipe}: a search of {count} points in {swept.folder}, the first ten drawn at random"


def _run(ready: Ready, tell: Tell) -> None:
    from spolia.runs.lock import Lock

    swept = ready.sweep
    swept.folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(swept.folder / ".lock")
    lock.take()
    try:
        for run in swept.runs:
            run.measure(swept.folder, swept.metric)
        swept.write()
        if ready.asked.search is None and all(run.state == "done" for run in ready.runs):
            return
        place = _place(ready)
        try:
            if ready.asked.search is None:
                _execute(ready, place, ready.runs, tell)
            else:
                _search(ready, place, tell)
        finally:
            place.close()
    finally:
        lock.release()


def _place(ready: Ready) -> Place:
    from spolia.runs import sweep_cluster, sweep_local

    if ready.asked.on == "ray":
        return sweep_cluster.Ray(ready.options)
    if ready.asked.on == "slurm":
        return sweep_cluster.Slurm(ready.sweep.folder, ready.options)
    return sweep_local.Local(ready.asked.jobs or 1)


def _execute(ready: Ready, place: Place, runs: Sequence[SweptRun], tell: Tell) -> None:
    """Runs what is not done yet; sweep.json grows with every run that ends."""
    from spolia.runs.sweep_local import Job, run_all

    swept, cwd = ready.sweep, str(Path.cwd())
    left = [run for run in runs if run.state != "done"]
    jobs = {Job(swept.recipe, str(swept.folder / run.name), tuple(run.overrides), cwd): run for run in left}
    count = 0

    def ended(job: Job, outcome: Outcome) -> None:
        nonlocal count
        count, run = count + 1, jobs[job]
        run.look(swept.folder)  # for the time it took
        run.state, run.error = outcome.state, outcome.error
        run.measure(swept.folder, swept.metric)
        swept.write()
        tell(f"[{count}/{len(left)}] {run.name}: {_ending(run)}")

    at_once = ready.asked.jobs or (1 if ready.asked.on == "local" else max(1, len(left)))
    if not run_all(place, list(jobs), at_once, ended):
        raise Interrupted("stopped between runs")


def _search(ready: Ready, place: Place, tell: Tell) -> None:
    from spolia.runs.sweep_search import search

    swept, rule, count = ready.sweep, ready.sweep.search or {}, ready.asked.search or 0

    def judge(points: Sequence[tuple[str, Point]]) -> list[float | None]:
        known = {run.name: run for run in swept.runs}
        made = [[known.get(run.name, run) for run in ready.made(point, name)] for name, point in points]
        runs = [run for group in made for run in group]
        swept.runs += [run for run in runs if run.name not in known]
        for run in runs:
            _name_line(ready, run)
        swept.write()
        _execute(ready, place, runs, tell)
        rows = [points_of(group)[0] for group in made]
        scores = [score_of(row, rule) if row.whole else None for row in rows]
        if any(row.whole and score is None for row, score in zip(rows, scores, strict=True)):
            raise _nothing_measured(ready, next(run for run in runs if run.state == "done"))
        return scores

    at_once = max(1, (ready.asked.jobs or 1) // max(1, len(ready.seeds)))
    first = ready.seeds[0] if ready.seeds else 0
    search(swept.folder, ready.axes, count, judge, lowest=rule["lowest"], at_once=at_once, seed=first)


def _name_line(ready: Ready, run: SweptRun) -> None:
    """Sets the line of a point that was drawn; what is wrong with that point alone its run will say."""
    from spolia.runs.recipe import check_recipe
    from spolia.runs.sweep_numbers import own_line

    try:
        run.line = run.line or own_line(check_recipe(ready.source, run.overrides))
    except SpoliaError:
        return


def _nothing_measured(ready: Ready, run: SweptRun) -> SpoliaError:
    from spolia.runs.sweep_numbers import metrics_in

    assert ready.sweep.search is not None
    metric, known = ready.sweep.search["metric"], metrics_in(ready.sweep.folder / run.name, run.line)
    return SpoliaError(f"no run measured `{metric}`", where="--metric", mend=did_you_mean(metric, known))


def _ending(run: SweptRun) -> str:
    """What is told of a run that ended."""
    if run.state != "done":
        return run.state + (f": {run.error.splitlines()[0]}" if run.error else "")
    number, took = run.number, f", {run.seconds:g} s" if run.seconds is not None else ""
    if number is None:
        return f"done{took}"
    return f"{number['metric']} {number['mean']:.4g}{' ' * bool(number['unit'])}{number['unit']}{took}"
