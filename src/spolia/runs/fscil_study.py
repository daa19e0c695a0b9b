"""Recipes of prompts: a frozen encoder led through few-shot sessions, beside class means and a pool of prompts.

Pretraining and every learner's run are kept as loops and go on where they were killed; a finished seed is kept in checkpoints/.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method, find
from spolia.core.checkpoint import write_checkpoint
from spolia.core.journal import Journal
from spolia.errors import Problems
from spolia.runs import fscil_ledger
from spolia.runs.digits_pool import one_thread
from spolia.runs.fscil_problems import PROBLEMS as PROBLEMS
from spolia.runs.fscil_problems import DataSessions, DigitsSessions, check_files
from spolia.runs.fscil_text import problem_text as problem_text
from spolia.runs.fscil_text import told as told
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.plan import Phase, Plan
from spolia.runs.prompted import timed
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from spolia.parts.stream import Stream

BESIDE = ("ncm", "l2p")
FILE = "prompts.safetensors"
_START, _DIGITS_STEP = 6.0, 0.04  # seconds on one core: imports; a step of 64 digits, forward and back
_STEP = 12.0  # of 48 images through ViT-B/16, forward and back, on two cores
_BASE = {"digits_sessions": (720, 2), "packed_sessions": (4_800, 8)}  # examples of the base session; further sessions
_USUAL, _SESSIONS = 30_000, 8  # where nothing is known
_CLASSES = 10  # of the digits


def check_study(
    method: Method, settings: Any, problem: Any, where: Callable[[tuple[Any, ...]], str], problems: Problems
) -> None:
    """What method and problem ask of each other."""
    if isinstance(problem, DigitsSessions):
        new = _CLASSES - problem.base
        if new < problem.ways or new % problem.ways:
            what = f"ten classes: {problem.base} and sessions of {problem.ways}"
            problems.add(where(("problem", "base")), what, "let base + sessions * ways be 10, such as 6 and 2")
        if 8 % problem.patch:
            problems.add(where(("problem", "patch")), f"{problem.patch} does not divide 8", "write 1, 2, 4 or 8")
    if not problem.encoder and problem.width % problem.heads:
        what = f"a width of {problem.width} does not part into {problem.heads} heads"
        problems.add(where(("problem", "heads")), what, "choose a number that divides the width")
    for name in ("blocks", "shared_blocks", "own_blocks"):
        blocks = getattr(settings, name, ())
        if not problem.encoder and blocks and max(blocks) >= problem.depth:
            what = f"block {max(blocks)} of an encoder of {problem.depth}"
            problems.add(where(("method", name)), what, f"name blocks below {problem.depth}, or raise problem.depth")
    for name, kind in (("file", "npz_sessions"), ("folder", "folder_sessions")):
        if problem.source == kind and getattr(problem, name) is None:
            problems.add(where(("problem", name)), f"no {name} is named", f"add `{name}: PATH`")
    if isinstance(problem, DataSessions):
        for name, mend in (("encoder", "FOLDER"), ("train", "FILE"), ("test", "FILE")):
            if not getattr(problem, name):
                problems.add(where(("problem", name)), f"no {name} is named", f"add `{name}: {mend}`")


def lines_of(recipe: StudyRecipe) -> list[tuple[str, Any]]:
    """Names and settings of the lines, the recipe's own last. Learning rates fall over the problem's epochs."""
    own = recipe.method.name
    found = [(name, find(name).settings_class()()) for name in BESIDE if name != own] + [(own, recipe.settings)]
    return [(name, timed(settings, recipe.problem.epochs)) for name, settings in found]


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do. SpoliaError for files that are not there."""
    problem, lines = recipe.problem, lines_of(recipe)
    check_files(problem)
    touched = fscil_ledger.data_touched(problem)
    digits = isinstance(problem, DigitsSessions)
    steps, each = sum(_steps(problem, name) for name, _ in lines), _STEP if problem.encoder else _DIGITS_STEP
    first = 0 if problem.encoder else problem.pretraining
    seconds = _START + recipe.seeds * each * (first + 1.5 * steps)
    repeats = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    return Plan(
        title=f"{recipe.method.name} on {fscil_ledger.task_of(problem)}{repeats}",
        method=recipe.method.name,
        phases=[
            Phase(
                "train", "the encoder" if first else "opens the encoder", touched["encoder"], "encoder" if first else ""
            ),
            Phase("learn", f"{', '.join(name for name, _ in lines)}", touched["base session"], "prompts", "encoder"),
            Phase(
                "extend", "a prototype for each new class", touched["further sessions"], "nothing", "encoder, prompts"
            ),
            Phase("test", "all classes seen, after every session", touched["test"], writes="result/"),
        ],
        peak_memory_bytes=500_000_000 if digits else 4_000_000_000,
        disk_needed_bytes=20_000_000 if digits else 200_000_000,
        seconds=round(seconds, 1),
        time_basis=f"{_START:g} s to start, {each:.2g} s a step of the encoder: measured on one core",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=recipe.every_seed,
        notes=["every line has the same frozen encoder, classes and shots in a seed; nothing is chosen by the test"],
    )


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """Every seed, the table and figures, and the first seed's prompts in result/."""
    problem, lines = recipe.problem, lines_of(recipe)
    check_files(problem)
    labels = [name for name, _ in lines]
    left = [seed for seed in recipe.every_seed if not (run.path / _scores(seed)).exists()]
    total = len(left) * (
        sum(_steps(problem, name) for name in labels) + (0 if problem.encoder else problem.pretraining)
    )
    journal = run.journal(follow(progress, total))
    found: list[dict[str, Any]] = []
    with (
        recorded(run, journal, progress, total),
        one_thread() if isinstance(problem, DigitsSessions) else nullcontext(),
    ):
        for seed in recipe.every_seed:
            scored = run.read_json(_scores(seed))
            if scored is None:
                run.set_status("running", phase=f"seed {seed}")
                scored = _seed(recipe, run, lines, seed, journal)
                run.write_json(_scores(seed), scored)
            found.append(scored)
            run.write_json("results.json", fscil_ledger.ledger(run, recipe, found, labels))
            run.write_json("figures.json", fscil_ledger.figures(found, labels))
        run.write_text("summary.txt", fscil_ledger.summary(recipe, found, labels) + "\n")


def _scores(seed: int) -> str:
    return f"checkpoints/fscil-seed-{seed}.json"


def _seed(
    recipe: StudyRecipe, run: RunFolder, lines: list[tuple[str, Any]], seed: int, journal: Journal
) -> dict[str, Any]:
    """What every line of a seed found, as JSON."""
    from spolia.runs.fscil_ground import encoder_for, ground_of
    from spolia.runs.prompted import learner_of, save_prompts

    problem = recipe.problem
    ground = ground_of(problem, seed)
    encoder = encoder_for(problem, ground, seed, journal)
    scored: dict[str, Any] = {"lines": {}}
    for name, settings in lines:
        learner = learner_of(name, settings, encoder, ground.stream, seed, ground.view, ground.show)
        phase = f"seed {seed} learn {name}"
        scored["lines"][name] = led(learner, ground.stream, problem.epochs, problem.batch, journal, seed, phase)
        if name == recipe.method.name and seed == recipe.seed:
            if not problem.encoder and not (run.result / "encoder").exists():
                vit: Any = encoder.module
                write_checkpoint(run.result / "encoder", vit.state_dict(), vit.config())
            save_prompts(learner, run.result / FILE, classes=ground.classes)
    return scored


def led(
    learner: Any, stream: Stream, epochs: float, batch: int, journal: Journal | None, seed: int, phase: str
) -> dict[str, Any]:
    """One learner through the stream, as JSON. Class means read it once: they take no steps."""
    from spolia.bench.continual import Protocol
    from spolia.bench.continual import run as lead
    from spolia.bench.fscil import found_of
    from spolia.runs.prompted import size_of

    readings = 1.0 if learner.method == "ncm" else epochs
    outcome = lead(learner, stream, Protocol(epochs=readings, batch=batch, ahead=False), journal, seed, phase=phase)
    return found_of(outcome, size_of(learner))


def _steps(problem: Any, method: str) -> int:
    """Of a learner in all sessions, about."""
    epochs = 1.0 if method == "ncm" else problem.epochs
    base, later = _BASE.get(problem.source, (_USUAL, _SESSIONS))
    new = math.ceil(epochs * problem.ways * problem.shots / problem.batch)
    return math.ceil(epochs * base / problem.batch) + later * new
