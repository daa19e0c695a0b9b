"""Distillation as a recipe runs it: each seed makes its pair, trains the student in every way, and counts on test inputs.

The student of the labels alone, of KD, of the recipe's loss, and of that with a rank term start from the same weights and
see the same batches. A finished seed is kept in checkpoints/; the results grow seed by seed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core.checkpoint import write_checkpoint
from spolia.core.journal import Journal
from spolia.core.settings import Settings
from spolia.errors import Problems
from spolia.methods.distill.attention import Attention
from spolia.methods.distill.bases import objective_of
from spolia.methods.distill.fitnets import Fitnets
from spolia.methods.distill.kd import Kd
from spolia.methods.distill.mlkd import Mlkd
from spolia.methods.distill.objective import Objective
from spolia.methods.distill.rkd import Rkd
from spolia.methods.distill.rkkd import Rkkd, rkkd
from spolia.methods.distill.train import distill
from spolia.runs import distill_ledger
from spolia.runs.digits_pool import one_thread
from spolia.runs.distill_images import check_models
from spolia.runs.distill_pair import Pair, alone, config_of, make_pair
from spolia.runs.distill_problems import PROBLEMS as PROBLEMS
from spolia.runs.distill_problems import DigitsDistillation, ImageDistillation, Problem, ProseDistillation
from spolia.runs.distill_text import problem_text as problem_text
from spolia.runs.distill_text import told as told
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.plan import Phase, Plan
from spolia.runs.store import RunFolder, write_json
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from torch import nn

ALONE, TEACHER = distill_ledger.ALONE, distill_ledger.TEACHER
_START, _PER_STEP = 5.0, {"digits": 0.005, "npz": 0.8, "prose": 0.02}  # seconds on one core
_MEMORY = {"digits": 450, "npz": 3000, "prose": 600}  # MB


@dataclass(frozen=True)
class Entry:
    """One line of the table. `settings` of the loss, None for the labels alone; `against`: what it is compared with."""

    label: str
    settings: Settings | None = None
    against: str = ""
    own: bool = False

    def objective(self, pair: Pair) -> Objective:
        """Made anew for every training: what a loss learns belongs to one."""
        if self.settings is None:
            return alone()
        settings = _sited(self.settings, pair)
        return rkkd(settings) if isinstance(settings, Rkkd) else objective_of(settings)


def entries_of(recipe: StudyRecipe) -> list[Entry]:
    """The recipe's loss beside the labels alone, KD, and itself without or with a rank term."""
    settings, name, plain = recipe.settings, recipe.method.name, Kd()
    kd = Entry("kd", plain, ALONE)
    found = [Entry(ALONE), kd]
    if not isinstance(settings, Rkkd):
        own = Entry(name, settings, "kd", own=True)
        if name == "kd" and settings == plain:
            found[1] = own = Entry("kd", plain, ALONE, own=True)
        elif name == "kd":
            found[1], own = Entry("kd, defaults", plain, ALONE), Entry("kd", settings, "kd, defaults", own=True)
        if own not in found:
            found.append(own)
        return [*found, Entry(f"{name} + rank", Rkkd(base=settings), own.label)]
    base, label = settings.base, type(settings.base).__name__.lower()
    if base != plain:
        found[1:] = [Entry("kd, defaults", plain, ALONE)] if label == "kd" else [kd]
        found.append(Entry(label, base, found[1].label))
    found.append(Entry(f"{label} + rank", settings, label, own=True))
    if base == plain:
        cold = Kd(temperature=1.0)
        found += [
            Entry("kd at temperature 1", cold, ALONE),
            Entry("kd at temperature 1 + rank", settings.model_copy(update={"base": cold}), "kd at temperature 1"),
        ]
    return found


def _sited(settings: Any, pair: Pair) -> Any:
    """Losses that compare features, where the recipe names no modules: at those that the pair has for it."""
    if isinstance(settings, Rkkd):
        return settings.model_copy(update={"base": _sited(settings.base, pair)})
    if isinstance(settings, Fitnets | Attention) and not settings.student_sites and pair.sites is not None:
        ours, theirs = pair.sites
        return settings.model_copy(update={"student_sites": (ours,), "teacher_sites": (theirs,)})
    return settings


def check_study(
    method: Method, settings: Any, problem: Problem, where: Callable[[tuple[int | str, ...]], str], problems: Problems
) -> None:
    """What loss and problem ask of each other."""
    loss, name = (settings.base, "base") if hasattr(settings, "base") else (settings, "name")
    at, called = where(("method", name)), type(loss).__name__.lower()
    if isinstance(problem, ProseDistillation):
        if isinstance(loss, Mlkd):
            problems.add(at, "mlkd looks at two views of an input; a text has one", "use images, or dkd")
        if isinstance(loss, Fitnets | Attention):
            problems.add(
                at, f"{called} compares features of whole inputs, not of tokens", "use images, or a logit loss"
            )
        if isinstance(loss, Rkd) and loss.angle:
            problems.add(at, "rkd's angles are n^3 in the tokens of a batch", "write `angle: 0`")
    if isinstance(problem, DigitsDistillation) and problem.network == "mlp" and isinstance(loss, Attention):
        problems.add(at, "attention compares places, hidden layers have none", "write `network: conv` in the problem")
    tokens = isinstance(problem, ProseDistillation)
    if (problem.training.task == "tokens") != tokens:
        wanted = "tokens" if tokens else "classes"
        problems.add(
            where(("problem", "training", "task")), f"{problem.source} has {wanted}", f"write `task: {wanted}`"
        )
    if isinstance(problem, ImageDistillation):
        for role in ("teacher", "student"):
            if getattr(problem, role).network is None and getattr(problem, role).weights is None:
                problems.add(where(("problem", role)), "neither network nor weights", "write `resnet20`, or a path")
        if problem.teacher.weights is None and not problem.teacher_epochs:
            mend = "give its weights, or `teacher_epochs`, so that it is trained first"
            problems.add(where(("problem", "teacher")), "the teacher has learned nothing", mend)


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do. SpoliaError for files that are not there."""
    problem, entries = recipe.problem, entries_of(recipe)
    if isinstance(problem, ImageDistillation):
        check_models(problem)
    touched = distill_ledger.data_touched(problem, recipe)
    steps, settings = _steps(problem), problem.training
    seconds = _START + recipe.seeds * steps * (len(entries) + 1) * _PER_STEP[problem.source]
    each = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    names = ", ".join(entry.label for entry in entries)
    return Plan(
        title=f"{recipe.method.name}: a student on {problem.source}, in {len(entries)} ways{each}",
        method=recipe.method.name,
        phases=[
            Phase("teacher", "trained on labels, or taken as it is", touched["teacher"], "teacher"),
            Phase("distil", f"the same student by {names}", touched["student"], "student", "teacher", "result/"),
            Phase("choose", f"every {settings.check_every or 'epoch'}: which step is kept", touched["choice of step"]),
            Phase("test", "accuracy, calibration, rank agreement with the teacher", touched["test"]),
        ],
        peak_memory_bytes=_MEMORY[problem.source] * 1_000_000,
        disk_needed_bytes=recipe.seeds * len(entries) * 2_000_000,
        seconds=round(seconds, 1),
        time_basis=f"{_START:g} s to start, {1000 * _PER_STEP[problem.source]:g} ms a step: measured on one core",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=recipe.every_seed,
    )


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """Every seed, the table and figures, and the first seed's student of the recipe's own loss in result/."""
    entries = entries_of(recipe)
    left = [seed for seed in recipe.every_seed if not (run.path / _scores(seed)).exists()]
    total = len(left) * _steps(recipe.problem) * len(entries)
    journal = run.journal(follow(progress, total))
    found: list[dict[str, Any]] = []
    with recorded(run, journal, progress, total), one_thread():
        for seed in recipe.every_seed:
            scored = run.read_json(_scores(seed))
            if scored is None:
                run.set_status("running", phase=f"seed {seed}")
                scored = _score(recipe, run, entries, seed, journal)
                run.write_json(_scores(seed), scored)
            found.append(scored)
            against = {entry.label: entry.against for entry in entries if entry.against}
            ledger = distill_ledger.ledger(run, recipe, found, against)
            run.write_json("results.json", ledger)
            run.write_json("figures.json", distill_ledger.figures(recipe, found))
        own = next(entry for entry in entries if entry.own)
        run.write_text("summary.txt", distill_ledger.summary(recipe, ledger, own.label, against) + "\n")


def _scores(seed: int) -> str:
    return f"checkpoints/distill-seed-{seed}.json"


def _steps(problem: Problem) -> int:
    """Steps of one training, about."""
    training = problem.training
    if training.steps is not None:
        return training.steps
    inputs = {"digits": getattr(problem, "images", 0), "npz": getattr(problem, "most", None) or 10_000}[problem.source]
    return max(1, round(training.epochs * inputs / training.batch))


def _score(
    recipe: StudyRecipe, run: RunFolder, entries: list[Entry], seed: int, journal: Journal
) -> dict[str, dict[str, Any]]:
    """One seed: of the teacher and every student what the test inputs say, at the step kept, the last, and on the way."""
    pair = make_pair(recipe.problem, seed, run.checkpoints, journal)
    scored: dict[str, dict[str, Any]] = {TEACHER: {"kept": pair.judged(pair.teacher).to_dict()}}
    for entry in entries:
        objective, looks = (
            entry.objective(pair),
            Looks(pair, run.checkpoints / f"looks-{seed}-{_slug(entry.label)}.json"),
        )
        facts: dict[str, Any] = {}
        with journal.phase(f"seed {seed} distil {entry.label}"):
            student = distill(
                pair.student,
                pair.teacher,
                pair.train,
                pair.training,
                objective=objective,
                validation=pair.validation,
                evaluate=looks,
                augment=pair.shown(objective),
                journal=journal,
                seed=seed,
                facts=facts,
            )
        kept = facts["best" if facts["returned"] == "best" else "last"]["step"]
        scored[entry.label] = looks.told(kept) | {"validation": facts["best"], "parameters": facts["parameters"]}
        if entry.own and seed == recipe.seed and not run.result.exists():
            write_checkpoint(run.result, student.state_dict(), config_of(pair.student))
    return scored


def _slug(label: str) -> str:
    return label.replace(" + ", "-").replace(" ", "-").replace(",", "")


@dataclass
class Looks:
    """Test inputs counted at every look of a training, by step, on disk: apart from what the training itself may see."""

    pair: Pair
    file: Path

    def __call__(self, student: nn.Module, done: int) -> dict[str, float]:
        before = {step: numbers for step, numbers in self._kept().items() if int(step) < done}
        self.file.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.file, before | {str(done): self.pair.judged(student).to_dict()})
        return {}

    def told(self, kept: int) -> dict[str, Any]:
        """The numbers at the step that is kept, at the last one, and all of them."""
        every = {int(step): numbers for step, numbers in self._kept().items()}
        last = max(every)
        curve = [{"step": step, **every[step]} for step in sorted(every)]
        return {"kept": every[kept], "step": kept, "last": every[last], "steps": last, "curve": curve}

    def _kept(self) -> dict[str, Any]:
        return json.loads(self.file.read_text(encoding="utf-8")) if self.file.exists() else {}
