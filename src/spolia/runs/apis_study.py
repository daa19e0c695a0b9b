"""Recipes of `apis`: a model learned from a stream of APIs beside its baselines, seed by seed.

Every learner's run is kept as a loop and goes on where it was killed. Answers that came over HTTP lie in
checkpoints/answers.sqlite: what is done again after a kill asks nobody.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

from spolia.catalog import Method
from spolia.core import kept
from spolia.core.checkpoint import write_checkpoint
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.errors import Problems
from spolia.runs import apis_ledger
from spolia.runs.apis_entries import FEW_PASSES, JOINT, JOINT_PASSES, ROUTER, Line, label_of, learner_of, lines_of
from spolia.runs.apis_ground import Ground, ground_of
from spolia.runs.apis_problems import PROBLEMS as PROBLEMS
from spolia.runs.apis_problems import ApiProblem, DigitsApis, PackedApis, as_stream, check_problem
from spolia.runs.apis_rounds import rounds_of
from spolia.runs.continual_problems import check_files
from spolia.runs.digits_pool import one_thread
from spolia.runs.lifecycle import follow, recorded
from spolia.runs.plan import Phase, Plan
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

STORE = "checkpoints/answers.sqlite"
_START, _PER_ITEM, _PER_SENT = 6.0, 3e-5, 1e-4  # seconds on one core: imports; an item of digits; one over HTTP
_IMAGE = 10  # times that, for images and their networks
_BATCH = 32  # examples of a step of lines that have real data
_DIGITS, _USUAL = 1_197, 50_000  # training inputs


def check_study(
    method: Method, settings: Any, problem: ApiProblem, where: Callable[[tuple[Any, ...]], str], problems: Problems
) -> None:
    """What method and problem ask of each other."""
    check_problem(problem, settings, where, problems)


def plan_study(recipe: StudyRecipe) -> Plan:
    """What running the recipe would do. Nothing is asked of any API."""
    problem, lines = recipe.problem, lines_of(recipe)
    if isinstance(problem, PackedApis):
        check_files(as_stream(problem))
    touched = apis_ledger.data_touched(problem)
    rounds, once, each = rounds_of(problem, recipe.settings)
    items = recipe.seeds * problem.count * (rounds * each + once)
    asking = sum(line.asks and line.label != ROUTER for line in lines)
    per = (_PER_ITEM if isinstance(problem, DigitsApis) else _IMAGE * _PER_ITEM) + (_PER_SENT if problem.urls else 0)
    repeats = f" for each of {recipe.seeds} seeds" if recipe.seeds > 1 else ""
    notes = [f"{rounds} rounds of {each:,} items an API: {items:,} items in all for {label_of(problem)}"]
    if problem.price:
        notes.append(f"estimated cost: {items * asking * problem.price / 1000:,.2f} {problem.currency}")
    notes.append("querying a model to learn another from it may break the terms it is offered under")
    return Plan(
        title=f"{label_of(problem)} from {problem.count} APIs of {apis_ledger.task_of(problem).split(',')[0]}{repeats}",
        method=recipe.method.name,
        phases=[
            Phase("experts", "are looked at" if problem.urls else "are trained", touched["experts"]),
            Phase("learn", f"{', '.join(line.label for line in lines)}", touched["learning"], "network"),
            Phase("test", "fills a row of the accuracy matrix after every API", touched["test"], writes="result/"),
        ],
        peak_memory_bytes=500_000_000 if isinstance(problem, DigitsApis) else 3_000_000_000,
        disk_needed_bytes=20_000_000 + (items * 60 if problem.urls else 0),
        seconds=round(_START + items * asking * per, 1),
        time_basis=f"{_START:g} s to start, {1e6 * per:.3g} µs an item: "
        + ("measured on one core" if isinstance(problem, DigitsApis) else "guessed from that of digits"),
        files=["results.json", "figures.json", "summary.txt", "report.html", "checkpoints/", "result/"],
        seeds=recipe.every_seed,
        notes=notes,
    )


def run_study(recipe: StudyRecipe, run: RunFolder, progress: Any) -> None:
    """Every seed, the table and figures, and the first seed's model in result/."""
    problem = recipe.problem
    if isinstance(problem, PackedApis):
        check_files(as_stream(problem))
    lines = lines_of(recipe)
    left = [seed for seed in recipe.every_seed if not (run.path / _scores(seed)).exists()]
    total = len(left) * sum(_steps(line, recipe) for line in lines)
    journal = run.journal(follow(progress, total))
    found: list[dict[str, Any]] = []
    with recorded(run, journal, progress, total), one_thread() if isinstance(problem, DigitsApis) else nullcontext():
        for seed in recipe.every_seed:
            scored = run.read_json(_scores(seed))
            if scored is None:
                run.set_status("running", phase=f"seed {seed}")
                scored = _seed(recipe, run, lines, seed, journal)
                run.write_json(_scores(seed), scored)
            found.append(scored)
            run.write_json("results.json", apis_ledger.ledger(run, recipe, found))
            run.write_json("figures.json", apis_ledger.figures(recipe, found))
        run.write_text("summary.txt", apis_ledger.summary(recipe, found) + "\n")


def _scores(seed: int) -> str:
    return f"checkpoints/apis-seed-{seed}.json"


def _seed(recipe: StudyRecipe, run: RunFolder, lines: list[Line], seed: int, journal: Journal) -> dict[str, Any]:
    """What every line of a seed found, as JSON."""
    ground = ground_of(recipe, seed, run.path / STORE)
    scored: dict[str, Any] = {"apis": [api.name for api in ground.apis], "experts": ground.experts, "lines": {}}
    try:
        for line in lines:
            scored["lines"][line.label] = _led(recipe, run, line, ground, seed, journal, scored)
        if recipe.problem.urls:
            scored["spent"] = {api.name: asdict(api.spent) for api in ground.apis}
    finally:
        for api in ground.apis:
            api.close()
    return scored


def _led(
    recipe: StudyRecipe, run: RunFolder, line: Line, ground: Ground, seed: int, journal: Journal, scored: dict[str, Any]
) -> dict[str, Any]:
    """One learner of a seed through its stream."""
    from spolia.bench.continual import Protocol
    from spolia.bench.continual import run as lead
    from spolia.bench.continual_ledger import found_of

    learner, stream, passes = learner_of(line, recipe, ground, seed)
    protocol = Protocol(epochs=passes, batch=_BATCH, ahead=line.label != ROUTER)  # which would ask again and again
    outcome = lead(learner, stream, protocol, journal, seed, phase=f"seed {seed} {_verb(line)} {line.label}")
    told = found_of(outcome) | {"asked": dict(getattr(learner, "asked", {})), "gaps": getattr(learner, "gaps", [])}
    if line.own:
        scored["sheet"] = apis_ledger.sheet_of(_queries(learner, ground))
    if line.own and seed == recipe.seed:
        if not run.result.exists():
            write_checkpoint(run.result, learner.network.state_dict(), _config(recipe.problem, ground))
        kept.save(run.result / "learner.safetensors", learner.state_dict())
    return told


def _steps(line: Line, recipe: StudyRecipe) -> int:
    """Of a seed, about: for progress."""
    problem = recipe.problem
    if line.asks:
        return problem.count * (1 if line.label == ROUTER else rounds_of(problem, recipe.settings)[0])
    inputs = _DIGITS if isinstance(problem, DigitsApis) else getattr(problem, "most", None) or _USUAL
    inputs = inputs if line.label == JOINT else problem.few * problem.count * 2
    passes = JOINT_PASSES if line.label == JOINT else FEW_PASSES
    return max(1, round(passes * inputs / _BATCH))


def _verb(line: Line) -> str:
    return "learn" if line.asks else "fit"


def _queries(learner: Any, ground: Ground) -> dict[str, Any]:
    """A few remembered queries of each API."""
    held, shown = learner.memory.all(), {}
    for experience in ground.stream.experiences if held else ():
        own = torch.isin(held["y"].cpu(), torch.tensor(experience.classes))
        if int(own.sum()) >= apis_ledger.SHOWN:
            shown[experience.name] = held["x"].cpu()[own][: apis_ledger.SHOWN].view(-1, *ground.held.shape)
    return shown


def _config(problem: Any, ground: Ground) -> dict[str, Any]:
    """What config.json says beside the weights."""
    about = {"model_type": "spolia_continual", "network": problem.network, "width": problem.width}
    names = [ground.held.classes[raw] for raw in ground.labelled.order]
    return about | {"input": list(ground.held.shape), "num_labels": len(names), "classes": names}


# --- words -----------------------------------------------------------------------------------------------------------


def problem_text(method: Method, tiny: bool) -> str:
    """The `problem` of a new recipe."""
    if tiny:
        lines = [
            "  source: apis  # experts of scikit-learn's digits, trained on the spot; no download. Also: packed_apis",
            "  tasks: 5  # APIs of equally many classes; or the classes of each: [4, 3, 3]",
            "  answers: probabilities  # also: logits, top, label; `decimals: 2` rounds them",
            "  budget: 12600  # items that an API may be asked in a repeat; an item is one input",
            "  few: 0  # real labelled examples of each class that come with an API (DECL); 0: none",
            "  urls: []  # [http://127.0.0.1:8080]: ask what `spolia serve digits:01 digits:23 …` serves there",
        ]
    else:
        lines = [
            "  source: packed_apis  # experts of NAME.npz in the folder SPOLIA_DATA; also: apis, of digits",
            "  data: cifar10_full_jpeg75",
            "  tasks: 5  # APIs of equally many classes; or the classes of each: [4, 3, 3]",
            "  experts: [conv4, resnet8, mlp]  # architectures of the experts, in turn",
            "  answers: probabilities  # also: logits, top, label; `decimals: 2` rounds them",
            "  budget: 2000000  # items that an API may be asked in a repeat; an item is one input",
            "  few: 0  # real labelled examples of each class that come with an API (DECL); 0: none",
            "  urls: []  # http://HOST/v2/models/NAME of each API, in the place of experts trained here",
            "  token: null  # environment variable that holds the servers' bearer token",
            "  network: resnet8  # of the model that learns",
            "  device: cpu  # cpu, cuda, auto",
        ]
    return "\n".join(["", "problem:", *lines])


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score and data touched, for the head of a new recipe."""
    score = (
        "Task-IL and Class-IL after the last API, beside no replay, the plain estimator, a router and joint training"
    )
    if tiny:
        data = "experts: labelled digits of their own classes; the model: no data, only answers; 600 other digits for the test"
        return "about a minute on one core", score, data
    data = "experts: the training part of their own classes; the model: no data, only answers; the test part after every API"
    return "hours on a GPU; `spolia plan` estimates it and its cost", score, data
