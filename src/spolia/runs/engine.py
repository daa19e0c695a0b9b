"""From a recipe to a plan, and from a recipe to a finished run folder."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core.dist import world
from spolia.core.journal import Interrupted
from spolia.data.digits import SIZES
from spolia.runs.asked import request_of
from spolia.runs.devices import placed, repeatable
from spolia.runs.digits_ledger import sees
from spolia.runs.digits_pool import DATA_TOUCHED
from spolia.runs.digits_study import SCALES, Entry, Study, needs_base, pool_of, run_study
from spolia.runs.folder_ledger import figures as folder_figures
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.measuring import Measured
from spolia.runs.plan import Phase, Plan
from spolia.runs.preprocessing import chained, went_through
from spolia.runs.ranks import begun, check_shares
from spolia.runs.recipe import Recipe
from spolia.runs.schema import DigitsPool, FoldersPool
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe, module_of
from spolia.runs.surgery_study import plan_surgery, run_surgery

if TYPE_CHECKING:
    from spolia.runs.cost import Machine
    from spolia.runs.folder_merge import Study as FolderStudy

_BASELINES = ("average", "task_arithmetic")
_VARIANTS = {  # shown beside a method that learns, in fewer steps
    "adamerging": (
        Entry("adamerging, task-wise, fast", "adamerging", {"granularity": "task", "preset": "fast"}, baseline=True),
        Entry("adamerging++, fast", "adamerging", {"preprocess": "ties", "preset": "fast"}, baseline=True),
    ),
}
_START, _PER_BASE, _PER_EXPERT, _PER_MERGE = 5.0, 0.5, 0.7, 0.2  # seconds on one core, imports included in the first
_PER_STEP = 0.0025  # of a method that learns, and a domain
_MEMORY = 450_000_000  # bytes of a process that has imported torch and scikit-learn
_DISK = 500_000  # bytes of one model with the last checkpoints of its loop
_TRIED = 2  # steps of a dry run


def plan_recipe(recipe: Recipe | StudyRecipe, folder: RunFolder | None = None, machine: Machine | None = None) -> Plan:
    """What running `recipe` would do, on `machine` or here. Reads headers at most, imports no torch for them."""
    if isinstance(recipe, StudyRecipe):
        return module_of(recipe.family).plan_study(recipe)
    if isinstance(recipe.pool, FoldersPool) and recipe.pool.tasks:
        from spolia.runs.folder_plan import plan_study

        return plan_study(recipe, folder)
    if isinstance(recipe.pool, FoldersPool):
        from spolia.runs.merging import plan_merge

        output, target = recipe.output, folder.result if folder is not None else None
        return plan_merge(
            request_of(recipe),
            target,
            max_shard_size=output.max_shard_size,
            chunk_memory=output.chunk_memory,
            machine=machine,
        )
    if recipe.repair[0].family == "surgery":
        return plan_surgery(recipe)
    return _plan_digits(recipe)


def run_recipe(
    recipe: Recipe | StudyRecipe, folder: RunFolder, *, fresh: bool = False, dry_run: bool = False, progress: Any = None
) -> Path | Plan:
    """Runs `recipe` into `folder`, or goes on where the same recipe stopped there. Returns the folder's path.

    With `dry_run` returns the plan, after the first steps in a folder that is gone again.
    """
    if dry_run:
        plan = plan_recipe(recipe, folder)
        if _has_steps(recipe) and world()[1] == 1:
            plan.notes.append(_tried(recipe))
        return plan
    plan = plan_recipe(recipe, folder)  # everything headers can tell, before any folder is made
    settled, device = placed(recipe)  # and whether its device is there
    check_shares(recipe, world()[1])
    study = _opened(recipe)  # and whether data and models are each other's
    with begun(folder, recipe.to_yaml(), fresh) as run:
        run.write_json("plan.json", plan.to_dict())
        seeds = list(range(recipe.seed, recipe.seed + recipe.seeds))
        run.write_env(seed=recipe.seed, seeds=seeds, device=device)
        with _warnings_kept(run), repeatable(device):
            _run(settled, study, run, progress)
    return folder.path


def _run(recipe: Recipe | StudyRecipe, study: FolderStudy | None, run: RunFolder, progress: Any) -> None:
    if isinstance(recipe, StudyRecipe):
        module_of(recipe.family).run_study(recipe, run, progress)
    elif study is not None:
        from spolia.runs.folder_study import run_study

        run_study(study, run, progress)
    elif isinstance(recipe.pool, FoldersPool):
        _run_folders(recipe, recipe.pool, run, progress)
    elif recipe.repair[0].family == "surgery":
        run_surgery(recipe, run, progress)
    else:
        _run_digits(recipe, run, progress)


@contextmanager
def _warnings_kept(run: RunFolder) -> Iterator[None]:
    """Inside, what is warned of stands in log.txt too."""
    shown = warnings.showwarning

    def show(message: Warning | str, *more: Any) -> None:
        run.log(f"warning: {message}")
        shown(message, *more)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield
    finally:
        warnings.showwarning = shown


def _has_steps(recipe: Recipe | StudyRecipe) -> bool:
    """Whether a run takes steps that can be tried; merges of weights on disk take none."""
    from spolia.runs.folder_plan import steps_of

    return isinstance(recipe, StudyRecipe) or not isinstance(recipe.pool, FoldersPool) or steps_of(recipe) > 0


def _tried(recipe: Recipe | StudyRecipe) -> str:
    """Takes the first steps of a run, data, models and device as they will be; nothing of them stays."""
    with tempfile.TemporaryDirectory(prefix="spolia-dry-run-") as place:
        trial = RunFolder(Path(place) / "run")
        trial.most_steps = _TRIED
        with suppress(Interrupted):
            run_recipe(recipe, trial)
        status = trial.read_json("status.json")
    spent = sum(status["seconds"].values())
    end = status["message"] or "which is the whole run"
    return f"tried: {_TRIED} steps, {end}, after {spent:.1f} s; nothing was kept"


def _opened(recipe: Recipe | StudyRecipe) -> FolderStudy | None:
    """Models on disk and the data of their tasks, where the recipe names some."""
    if isinstance(recipe, StudyRecipe) or not isinstance(recipe.pool, FoldersPool) or not recipe.pool.tasks:
        return None
    from spolia.runs.folder_merge import open_study

    return open_study(recipe)


def _seeds(recipe: Recipe) -> list[int]:
    return list(range(recipe.seed, recipe.seed + recipe.seeds))


def _run_folders(recipe: Recipe, pool: FoldersPool, run: RunFolder, progress: Any) -> None:
    """One merge into result/."""
    from spolia.runs import verbs
    from spolia.runs.merging import run_merge

    journal = run.journal()
    with recorded(run, journal, progress, gentle=False):  # a merge goes on from any byte: Ctrl-C may stop it at once
        run.set_status("running", phase="merge")
        with journal.phase("merge"):
            if not run.result.exists():  # it appears when it is whole
                output = recipe.output
                run_merge(
                    request_of(recipe),
                    run.result,
                    max_shard_size=output.max_shard_size,
                    chunk_memory=output.chunk_memory,
                    progress=progress,
                    card=verbs.card_of,
                )
        names = ", ".join(entry.name for entry in pool.experts)
        run.write_text("summary.txt", f"{recipe.method.name} of {names} stands in result/; nothing was evaluated.\n")


def _run_digits(recipe: Recipe, run: RunFolder, progress: Any) -> None:
    """A pool for every seed, the merge beside its baselines, and the first seed's merged encoder in result/."""
    study = study_of(recipe)
    left = study.steps_left(run)
    journal = run.journal(follow(progress, left))
    with recorded(run, journal, progress, left):
        found = run_study(run, study, journal)
        if not run.result.exists():
            from spolia.runs.verbs import merge

            pool = pool_of(run, study, recipe.seed, journal)
            looks, whose = bool(recipe.method.data), " The weights are the first seed's." if recipe.seeds > 1 else ""
            measured: Any = Measured(found | {"notes": found["notes"] + whose}, study.entries[-1].label)
            merge(
                {domain: pool.expert(domain) for domain in pool.domains},
                network=pool.network if looks else None,
                unlabelled=pool.unlabelled(pool.domains) if looks else None,
                base=pool.base if needs_base(recipe.method.name, len(pool.domains)) else None,
                method=recipe.method.name,
                settings=recipe.settings,
                preprocess=[step.to_dict() for step in recipe.preprocess],
                out=run.result,
                dtype=recipe.output.dtype,
                seed=recipe.seed,
                max_shard_size=recipe.output.max_shard_size,
                chunk_memory=recipe.output.chunk_memory,
                evaluate=lambda _: measured,
            )
        if recipe.method.data:  # what the first seed's merge learned
            own = folder_figures(run, run.read_json("result/learned.json") or {}, {})
            run.write_json("figures.json", [*(run.read_json("figures.json") or []), *own])


def study_of(recipe: Recipe) -> Study:
    """The recipe's merge beside average and task arithmetic with their defaults, and without its preprocessing if it has one;
    with masks, also with the task known.
    """
    method, settings = recipe.method, recipe.settings
    label, steps = chained(recipe.preprocess, method.name), tuple(step.to_dict() for step in recipe.preprocess)
    own = Entry(label, method.name, settings.model_dump(), preprocess=steps)
    baselines = []
    for name in _BASELINES:
        if name != method.name:
            baselines.append(Entry(name, name, baseline=True))
        elif settings != type(settings)():
            baselines.append(Entry(f"{name}, defaults", name, baseline=True))
    if steps:
        baselines.append(Entry(method.name, method.name, settings.model_dump(), baseline=True))
    if method.data:
        scales = tuple(sorted(SCALES, key=lambda scale: scale != 0.3))  # the default first: it wins among equals
        chosen = Entry("task_arithmetic, scale chosen with labels", "task_arithmetic", scales=scales, baseline=True)
        baselines += [chosen, *_VARIANTS.get(method.name, ())]
    if getattr(settings, "masked", False):
        label = f"{method.name}, task known"
        baselines.append(Entry(label, method.name, settings.model_dump(), baseline=True, known=True))
    assert isinstance(recipe.pool, DigitsPool)
    return Study(recipe.name, tuple(recipe.pool.domains), tuple(_seeds(recipe)), (*baselines, own), recipe.output.dtype)


def _plan_digits(recipe: Recipe) -> Plan:
    study = study_of(recipe)
    domains, seeds, merges = len(study.domains), len(study.seeds), len(study.entries)
    seconds = _START + seeds * (_PER_BASE + _PER_EXPERT * domains + _PER_MERGE * merges)
    learned = [find(e.method).settings_class()(**e.settings) for e in study.entries if find(e.method).data]
    learns = "coefficients" if hasattr(recipe.settings, "schedule") else "nothing"
    seconds += (seeds + 1) * _PER_STEP * domains * sum(getattr(one, "schedule", (0, 0.0))[0] for one in learned)
    models = seeds * (domains + 2) + 1
    what = recipe.method.summary + went_through(recipe.preprocess)
    each = f" for each of {seeds} seeds" if seeds > 1 else ""
    return Plan(
        title=f"{chained(recipe.preprocess, recipe.method.name)} merge of {domains} digits experts{each}",
        method=recipe.method.name,
        phases=[
            Phase("base", "fits the base and one head a domain", DATA_TOUCHED["base and heads"], "encoder and heads"),
            Phase("fine-tune", "fine-tunes an encoder a domain", DATA_TOUCHED["experts"], "encoder", "heads"),
            Phase("merge", what, sees(study), learns, writes="result/ (first seed)"),
            Phase(
                "test", "counts right answers of merge, base, experts and baselines", f"{SIZES['test']} other digits"
            ),
        ],
        dtypes={recipe.output.dtype or "float32": 1},
        peak_memory_bytes=_MEMORY,
        disk_needed_bytes=models * _DISK,
        seconds=round(seconds, 1),
        time_basis=f"{_START:g} s to start, then {_PER_EXPERT:g} s an expert: measured on one core",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=list(study.seeds),
    )
