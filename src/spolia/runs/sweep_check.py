"""What a sweep asks for, checked whole: axes, place, every combination of the recipe, and the folder it is to stand in."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.runs import sweep_cluster, sweep_search
from spolia.runs.compared_runs import recipe_difference
from spolia.runs.engine import plan_recipe
from spolia.runs.overrides import apply_overrides
from spolia.runs.recipe import Recipe, Source, check_recipe, read_source
from spolia.runs.studies import StudyRecipe
from spolia.runs.sweep_grid import Axis, Over, Point, axes_of, check_axes, corners, grid, run_name
from spolia.runs.sweep_numbers import ACCURACY, LOSS, own_line, validated
from spolia.runs.sweep_table import FILE, Sweep, SweptRun, usual_folder

PLACES = ("local", "ray", "slurm")
_OURS = (FILE, sweep_search.JOURNAL, ".lock", "logs", "slurm")  # besides the runs
_LINES = 6  # of a difference of recipes


@dataclass(frozen=True)
class Asked:
    """A call as it was made; `spolia.sweep` says what each means."""

    recipe: str
    over: Over
    seeds: int | None
    folder: str | os.PathLike[str] | None
    overrides: Sequence[str]
    on: str
    resources: Mapping[str, Any] | Sequence[str]
    jobs: int | None
    search: int | None
    metric: str | None
    lowest: bool | None
    on_test: bool


@dataclass
class Ready:
    """A call that can be run. `runs` are those it asks for, `sweep` holds those of earlier calls too."""

    asked: Asked
    source: Source
    axes: list[Axis]
    seeds: list[int]
    options: dict[str, Any]
    sweep: Sweep
    runs: list[SweptRun]
    seconds: float = 0.0  # that the runs not done may take, one after another

    def made(self, point: Point, name: str = "") -> list[SweptRun]:
        """The runs of a point: one, or one a seed. They are called after its values, or `name`."""
        found = []
        for seed in self.seeds or [None]:
            more = [] if seed is None else [f"seed={seed}", "seeds=1"]
            end = "" if seed is None else f",seed={seed}"
            called = name + end if name else run_name(point.values, seed)
            overrides = [*self.asked.overrides, *point.overrides, *more]
            found.append(SweptRun(called, dict(point.values), seed, overrides))
        return found


def check(asked: Asked) -> Ready:
    """SpoliaError with everything that does not fit. Nothing is written."""
    source = read_source(asked.recipe)
    if source.is_mergekit or source.documents:
        mend = "write it in our form: spolia new METHOD -o my.yaml"
        raise SpoliaError("is a mergekit recipe", where=asked.recipe, mend=mend)
    problems = Problems()
    axes = axes_of(asked.over, problems)
    check_axes(axes, asked.overrides, asked.seeds, asked.search, problems)
    options = _check_place(asked, problems)
    if asked.search is not None:
        sweep_search.check_installed(problems)
    problems.raise_if_any()
    name = source.name.rpartition("/")[2]
    folder = usual_folder(name) if asked.folder is None else Path(asked.folder)
    first = 0 if asked.seeds is None else _first_seed(source, asked.overrides)
    seeds = list(range(first, first + (asked.seeds or 0)))
    swept = Sweep(folder, asked.recipe, _digest(source), list(asked.overrides), [])
    ready = Ready(asked, source, axes, seeds, options, swept, [])
    points = grid(axes) if asked.search is None else corners(axes)
    runs = [run for point in points for run in ready.made(point)]
    recipes = _checked(ready, runs)
    if asked.search is None:
        ready.runs = runs
    else:
        swept.search = _rule(recipes[0], asked, axes)
    if asked.search is None or asked.on_test:
        swept.metric = asked.metric
    _take_up(ready)
    return ready


def _check_place(asked: Asked, problems: Problems) -> dict[str, Any]:
    """What a run gets where it is run."""
    if asked.jobs is not None and asked.jobs < 1:
        problems.add("--jobs", f"{asked.jobs} is too small", "give 1 or more")
    if asked.on not in PLACES:
        problems.add("--on", f"`{asked.on}` is no place to run", did_you_mean(asked.on, PLACES))
        return {}
    options = sweep_cluster.options_of(asked.resources, asked.on, problems)
    if asked.on != "local":
        sweep_cluster.check_installed(asked.on, problems)
    return options


def _checked(ready: Ready, runs: Sequence[SweptRun]) -> list[Recipe | StudyRecipe]:
    """The recipe of every run, resolved and planned, and their lines set; SpoliaError with all that is wrong with any."""
    problems, recipes, seconds = Problems(), list[Recipe | StudyRecipe](), dict[tuple[Any, ...], float]()
    for run in runs:
        values = tuple(run.values.items())
        try:
            recipe = check_recipe(ready.source, run.overrides)
            if values not in seconds:  # seeds change no plan
                seconds[values] = plan_recipe(recipe).seconds or 0.0
        except SpoliaError as error:
            for problem in error.problems:
                problems.add(problem.where, problem.what, problem.mend)
            continue
        recipes.append(recipe)
        run.line = own_line(recipe)
        _check_kept(ready.sweep.folder / run.name, recipe, problems)
        run.look(ready.sweep.folder)
        ready.seconds += 0.0 if run.state == "done" else seconds[values]
    problems.raise_if_any()
    return recipes


def _check_kept(folder: Path, recipe: Recipe | StudyRecipe, problems: Problems) -> None:
    """A run that stands there already must be of this recipe."""
    kept = folder / "recipe.yaml"
    if not kept.is_file():
        return
    changed = recipe_difference(kept.read_text(encoding="utf-8", errors="replace"), recipe.to_yaml())
    if changed:
        told = "".join(f"\n    {line}" for line in changed[:_LINES])
        problems.add(str(kept), f"holds a run of another recipe{told}", "choose another folder with -o")


def _rule(recipe: Recipe | StudyRecipe, asked: Asked, axes: Sequence[Axis]) -> dict[str, Any]:
    """What a search goes by, and over."""
    known, metric = validated(recipe), asked.metric
    if not asked.on_test and not known:
        what = f"runs of {recipe.method.name} have the test alone, and who chooses by the test fools himself"
        mend = "go over a grid, which chooses nothing; or add --on-test, and the output says what was done"
        raise SpoliaError(what, where="--search", mend=mend)
    if not asked.on_test and metric not in (None, *known):
        mend = did_you_mean(str(metric), known)
        raise SpoliaError(f"`{metric}` is not taken on validation data", where="--metric", mend=mend)
    metric = metric or (ACCURACY if asked.on_test else known[0])
    lowest = asked.lowest
    if lowest is None:
        if metric != LOSS and not metric.lower().endswith(ACCURACY):
            what = f"is more of `{metric}` better, or less?"
            raise SpoliaError(what, where="--metric", mend="add --highest or --lowest")
        lowest = metric == LOSS
    space = {axis.key: list(axis.values) or [axis.low, axis.high, axis.whole, axis.log] for axis in axes}
    return {"metric": metric, "lowest": lowest, "on_test": asked.on_test, "seeds": asked.seeds, "space": space}


def _take_up(ready: Ready) -> None:
    """Puts the runs beside those of earlier calls in the same folder. SpoliaError where that is another sweep's."""
    swept, folder = ready.sweep, ready.sweep.folder
    if (folder / FILE).is_file():
        kept = Sweep.read(folder)
        if (kept.digest, kept.fixed, kept.search) != (swept.digest, swept.fixed, swept.search):
            older = "" if kept.digest == swept.digest else ", as it was then"
            told = "" if kept.fixed == swept.fixed else f" with {' '.join(kept.fixed) or 'no override'}"
            told += "" if kept.search == swept.search else ", searched otherwise" if kept.search else ", not searched"
            what = f"holds another sweep: of {kept.recipe}{older}{told}"
            raise SpoliaError(what, where=str(folder), mend="choose another folder with -o")
        before = {run.name: run for run in kept.runs}
        for run in ready.runs:
            if (known := before.get(run.name)) is not None:
                run.number, run.validation = known.number, known.validation
        asked = {run.name: run for run in ready.runs}
        swept.runs = [asked.pop(run.name, run) for run in kept.runs] + list(asked.values())
        for run in swept.runs if kept.metric != swept.metric else ():
            run.number = None  # of another metric
        return
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    strange = [path.name for path in found if path.name not in _OURS and not (path / "recipe.yaml").is_file()]
    if strange:
        what = f"the folder holds other files ({', '.join(strange[:5])}) and no {FILE}"
        raise SpoliaError(what, where=str(folder), mend="choose an empty or new folder with -o")
    swept.runs = list(ready.runs)


def _digest(source: Source) -> int:
    """A number that changes with what the recipe says, not with its comments."""
    return zlib.crc32(json.dumps(source.marked.value, sort_keys=True, default=str).encode())


def _first_seed(source: Source, overrides: Sequence[str]) -> int:
    """The recipe's own seed; where it is none, checking the runs says so."""
    value, _ = apply_overrides(source.marked.value, overrides, Problems())
    first = value.get("seed", 0) if isinstance(value, dict) else 0
    return first if isinstance(first, int) else 0
