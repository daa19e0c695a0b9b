"""Continual recipes: a learner led through a stream beside its baselines, seed by seed on the same network and batches.

Every learner's run is kept as a loop and goes on where it was killed, inside a task or between two; a finished seed is kept
in checkpoints/; the results grow seed by seed.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

from spolia.catalog import Method
from spolia.core import kept
from spolia.core.checkpoint import write_checkpoint
from spolia.core.journal import Journal
from spolia.errors import Problems
from spolia.runs import continual_ledger
from spolia.runs.continual_entries import AT_ENDS, Entry, entries_of, host_of, label_of, learner_of, limited, passes
from spolia.runs.continual_problems import PROBLEMS as PROBLEMS
from spolia.runs.continual_problems import (
    ArraysStream,
    DatasetStream,
    DigitsStream,
    FolderStream,
    check_files,
    name_of,
    width_of,
)
from spolia.runs.continual_text import problem_text as problem_text
from spolia.runs.continual_text import told as told
from spolia.runs.digits_pool import one_thread
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.plan import Phase, Plan
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

_START, _PER_PASS = 5.0, {"mlp": 0.0012, "conv": 0.002}  # seconds on one core: imports; of ten inputs of few pixels
_PER_INPUT = {"mlp": 4e-5, "conv4": 2e-3, "resnet8": 4e-3}  # of larger ones, forward and back
_MEMORY = {"digits": 450_000_000}  # bytes of a process that has imported torch and scikit-learn
_IMAGES = 2_500_000_000
_INPUTS = {"mnist": 10_000, "fashion_mnist": 10_000, "kmnist": 8_000, "cifar10": 4_000, "tiny_imagenet100": 8_000}
_USUAL, _DIGITS = 50_000, 1_197  # training inputs where nothing is known; of the digits
_CLASSES = 10  # of the digits


def check_study(
    method: Method, settings: Any, problem: Any, where: Callable[[tuple[Any, ...]], str], problems: Problems
) -> None:
    """What method and problem ask of each other."""
    host, at = host_of(method, settings), where(("method", "host" if hasattr(settings, "host") else "name"))
    tasks = where(("problem", "tasks"))
    if problem.scenario == "online" and host in AT_ENDS:
        what = f"{host} learns what to hold when a task ends, and in `online` none does"
        problems.add(at, what, "take er, er_ace, der, derpp, agem or gdumb, or another scenario")
    if problem.scenario == "domain":
        if host == "icarl":
            problems.add(at, "icarl chooses exemplars of new classes, and domains have none", "take er or derpp")
        if not isinstance(problem.tasks, int):
            problems.add(tasks, f"{problem.tasks} are sizes of tasks, domains are counted", "write `tasks: 5`")
    if min([problem.tasks] if isinstance(problem.tasks, int) else problem.tasks, default=0) < 1:
        problems.add(tasks, f"{problem.tasks}", "give numbers above 0")
    elif isinstance(problem, DigitsStream) and problem.scenario != "domain":
        fits = _CLASSES % problem.tasks == 0 if isinstance(problem.tasks, int) else sum(problem.tasks) == _CLASSES
        if not fits:
            mend = "write 2, 5 or 10, or the classes of each: [4, 3, 3]"
            problems.add(tasks, f"ten classes do not go into {problem.tasks}", mend)
    if isinstance(problem, ArraysStream) and problem.file is None:
        problems.add(where(("problem", "file")), "no file is named", "add `file: PATH`")
    if isinstance(problem, FolderStream) and problem.folder is None:
        problems.add(where(("problem", "folder")), "no folder is named", "add `folder: PATH`")
    if isinstance(problem, DatasetStream) and not problem.data:
        problems.add(where(("problem", "data")), "no data set is named", "add `data: NAME`, or a folder")
    if getattr(problem, "channels", 3) == 1 and problem.network.startswith("resnet"):
        problems.add(where(("problem", "network")), "a ResNet takes colour", "write `channels: 3`, or conv4")
    if method.name == "refresh":
        from spolia.methods.continual.refresh import taken_back

        if (share := taken_back(settings)) >= 1:
            what = f"unlearning takes back {share:.0%} of every step: the loss climbs"
            mend = "lower gamma or steps, so that steps * gamma * max(1, 1 / damping) is below 1"
            problems.add(where(("method", "gamma")), what, mend)


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do. SpoliaError for files that are not there."""
    problem, entries = recipe.problem, entries_of(recipe)
    check_files(problem)
    touched = continual_ledger.data_touched(recipe)
    steps = _steps(problem)
    per_pass = _PER_PASS.get(problem.network, 0.0) if isinstance(problem, DigitsStream) else _pass_of(problem)
    seconds = _START + recipe.seeds * steps * per_pass * sum(passes(entry, problem) for entry in entries)
    each = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    label = label_of(recipe.method.name, recipe.settings)
    kinds = {"class": "class-incremental", "task": "task-incremental", "domain": "domain-incremental"}
    return Plan(
        title=f"{label} on a {kinds.get(problem.scenario, 'task-free')} stream of {name_of(problem)}{each}",
        method=recipe.method.name,
        phases=[
            Phase("train", f"leads {', '.join(e.label for e in entries)} through it", touched["stream"], "network"),
            Phase("keep", "memory, anchors or old networks, from task to task", touched["kept"]),
            Phase("test", "fills a row of the accuracy matrix after every task", touched["test"], writes="result/"),
        ],
        peak_memory_bytes=_MEMORY.get(problem.source, _IMAGES),
        disk_needed_bytes=(recipe.seeds * len(entries) + 1) * 3 * _bytes_of(recipe),
        seconds=round(seconds, 1),
        time_basis=f"{_START:g} s to start, {1000 * per_pass:.2g} ms a pass of a batch: measured on one core",
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=recipe.every_seed,
        notes=["every line has the same network, batches and learning rate in a seed; nothing is chosen by the test"],
    )


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """Every seed, the table and figures, and the first seed's learner in result/."""
    from spolia.runs.continual_streams import labelled_of, stream_of

    check_files(recipe.problem)
    entries, problem = entries_of(recipe), recipe.problem
    left = [seed for seed in recipe.every_seed if not (run.path / _scores(seed)).exists()]
    total = len(left) * len(entries) * _steps(problem)
    journal = run.journal(follow(progress, total))
    found: list[dict[str, Any]] = []
    with recorded(run, journal, progress, total), one_thread() if isinstance(problem, DigitsStream) else nullcontext():
        for seed in recipe.every_seed:
            scored = run.read_json(_scores(seed))
            if scored is None:
                run.set_status("running", phase=f"seed {seed}")
                held = labelled_of(problem, seed)
                stream = stream_of(problem, held, seed)
                scored = {e.label: _led(recipe, run, e, held, stream, seed, journal) for e in entries}
                run.write_json(_scores(seed), scored)
            found.append(scored)
            ledger = continual_ledger.ledger(run, recipe, found, continual_ledger.data_touched(recipe))
            run.write_json("results.json", ledger)
            run.write_json("figures.json", continual_ledger.figures(recipe, found))
        run.write_text("summary.txt", continual_ledger.summary(recipe, found) + "\n")


def _scores(seed: int) -> str:
    return f"checkpoints/continual-seed-{seed}.json"


def _led(
    recipe: StudyRecipe, run: RunFolder, entry: Entry, held: Any, stream: Any, seed: int, journal: Journal
) -> dict[str, Any]:
    """One learner of a seed through the stream."""
    from spolia.bench.continual import Protocol
    from spolia.bench.continual import run as lead
    from spolia.bench.continual_ledger import found_of
    from spolia.runs.continual_streams import config_of, model_of

    problem = recipe.problem
    model = model_of(problem, held, seed)
    learner = learner_of(entry.method, entry.settings, model, stream, seed)
    protocol = Protocol(epochs=problem.epochs, batch=problem.batch)
    outcome = lead(learner, stream, protocol, journal, seed, phase=f"seed {seed} train {entry.label}")
    if entry.own and seed == recipe.seed:
        if not run.result.exists():
            write_checkpoint(run.result, model.network.state_dict(), config_of(problem, held))
        kept.save(run.result / "learner.safetensors", learner.state_dict())
    return found_of(outcome)


# --- cost ------------------------------------------------------------------------------------------------------------


def _steps(problem: Any) -> int:
    """Of a stream, about."""
    inputs = _DIGITS if isinstance(problem, DigitsStream) else _INPUTS.get(name_of(problem), _USUAL)
    inputs = min(inputs, getattr(problem, "most", None) or inputs)
    times = 1.0 if problem.scenario == "online" else problem.epochs
    return max(1, round(times * inputs * (problem.count if problem.scenario == "domain" else 1) / problem.batch))


def _pass_of(problem: Any) -> float:
    """Seconds of a pass of a batch of images of 32 pixels."""
    name = problem.network
    depth = (int(name.removeprefix("resnet")) - 2) / 6 if name.startswith("resnet") else 1
    known = _PER_INPUT.get(name, _PER_INPUT["resnet8"] * depth)
    wide = (width_of(problem) / width_of(problem.model_copy(update={"width": None}))) ** 2
    return problem.batch * known * wide


def _bytes_of(recipe: StudyRecipe) -> int:
    """Of a checkpoint, about: network, optimiser, memory."""
    problem, settings = recipe.problem, limited(recipe.settings, recipe.problem.memory)
    steps = settings.hosted() if hasattr(settings, "hosted") else settings
    image = 256 if isinstance(problem, DigitsStream) else (getattr(problem, "size", None) or 32) ** 2 * 3
    weights = 100_000 if isinstance(problem, DigitsStream) else 5_000_000
    return weights + getattr(steps, "items", 0) * (image + 400)
