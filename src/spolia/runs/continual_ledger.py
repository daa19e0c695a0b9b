"""What a continual run leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

from typing import Any

from spolia.bench.continual_ledger import (
    FORGETTING,
    TASK_IL,
    ledger_rows,
    mean_matrix,
    metrics_of,
    so_far,
    value_of,
)
from spolia.bench.multitask import paired, t_interval
from spolia.runs.continual_entries import Entry, entries_of, host_of, limited
from spolia.runs.continual_problems import Continual, DigitsStream, name_of
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe


def ledger(run: RunFolder, recipe: StudyRecipe, found: list[dict[str, Any]], data: dict[str, str]) -> dict[str, Any]:
    """results.json."""
    entries, problem = entries_of(recipe), recipe.problem
    rows = ledger_rows(
        by_learner(found),
        task_of(problem),
        against={entry.label: entry.against for entry in entries if entry.against},
        baselines=[entry.label for entry in entries if entry.baseline],
        judged=problem.scenario,
    )
    return run.ledger(
        recipe.name,
        data=data,
        seeds=recipe.every_seed[: len(found)],
        rows=rows,
        notes=_notes(recipe, found),
    )


def by_learner(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For every learner what each seed found."""
    return {label: [one[label] for one in found] for label in found[0]}


def task_of(problem: Continual) -> str:
    return f"{name_of(problem)}, {problem.count} {'domains' if problem.scenario == 'domain' else 'tasks'}"


def data_touched(recipe: StudyRecipe) -> dict[str, str]:
    """What each phase sees."""
    problem, settings = recipe.problem, limited(recipe.settings, recipe.problem.memory)
    host = host_of(recipe.method, settings)
    steps = settings.hosted() if hasattr(settings, "hosted") else settings
    what = "1,197 labelled digits" if isinstance(problem, DigitsStream) else f"the training part of {name_of(problem)}"
    shown = {"domain": f", whole in each of {problem.count} domains", "online": ", once, one task after the other"}
    once = f", task by task, each {problem.epochs:g} times"
    kept = "nothing of a task once it is over"
    if host == "joint":
        kept = "everything: joint training is given all tasks so far"
    elif hasattr(steps, "items"):
        kept = f"at most {steps.items} inputs with labels" + (" and logits" if host in ("der", "derpp") else "")
    elif host in ("ewc", "mas", "si"):
        kept = "weights and how much each counts, no input"
    elif host in ("lwf", "vcl"):
        kept = "an old network, no input" if host == "lwf" else "a Gaussian over each weight, no input"
    tested = "600 other digits" if isinstance(problem, DigitsStream) else "the test part"
    return {
        "stream": what + shown.get(problem.scenario, once),
        "kept": kept,
        "joint": "the upper bound alone sees all tasks so far again and again",
        "test": f"{tested}, after every task; nothing is chosen by it",
    }


def _notes(recipe: StudyRecipe, found: list[dict[str, Any]]) -> str:
    problem, first = recipe.problem, next(iter(found[0].values()))
    entries = entries_of(recipe)
    lines = [f"Batches of {problem.batch}, {first['steps']} steps for every line; joint takes more of them a task."]
    replayed = [f"{e.label} {e.settings.replay}" for e in entries if hasattr(e.settings, "replay")]
    if replayed:
        lines.append(f"Replayed samples a draw: {', '.join(replayed)}.")
    rule = "of the classes seen" if problem.scenario != "task" else "of the test's own classes"
    lines += [
        f"An answer is the largest output {rule}; {TASK_IL} and Class-IL come from the same run.",
        "Incremental accuracy: mean over tasks of the accuracy so far. Backward transfer below 0 and forgetting above 0: lost.",
        "Time is the learner's own; memory is what it keeps besides network and optimiser.",
    ]
    if len(found) > 1:
        lines.append("Intervals are 95 %, Student's over seeds; differences are seed by seed.")
    return " ".join(lines)


def figures(recipe: StudyRecipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """figures.json: accuracy along the stream, and the accuracy matrix of the recipe's learner and of what it stands on."""
    learners, judged = by_learner(found), recipe.problem.scenario
    matrices = {label: mean_matrix(seeds, judged) for label, seeds in learners.items()}
    tests = [f"task {j + 1}" for j in range(len(next(iter(matrices.values()))[0]))]
    own = next(entry for entry in entries_of(recipe) if entry.own)
    series = [{"name": n, "x": list(range(1, len(m) + 1)), "y": so_far(m)} for n, m in matrices.items()]
    made: list[dict[str, Any]] = [
        {
            "kind": "lines",
            "title": "Accuracy along the stream",
            "caption": "Mean over the tests of the tasks so far; means over seeds.",
            "x_label": "tasks met",
            "y_label": "accuracy",
            "unit": "%",
            "series": series,
        }
    ]
    for label in dict.fromkeys([own.label, own.against]):
        made.append(
            {
                "kind": "matrix",
                "title": f"Accuracy matrix of {label}",
                "caption": "Row: after which task; column: on whose test, in per cent. Below the diagonal is what is kept.",
                "rows": [f"after {name}" for name in tests],
                "columns": tests,
                "values": [[None if v is None else round(v, 2) for v in row] for row in matrices[label]],
            }
        )
    return made


def summary(recipe: StudyRecipe, found: list[dict[str, Any]]) -> str:
    """One sentence."""
    entries, learners, judged = entries_of(recipe), by_learner(found), recipe.problem.scenario
    own, task = next(entry for entry in entries if entry.own), task_of(recipe.problem)
    scenario = next(iter(learners.values()))[0]["stream"]["scenario"]
    main = metrics_of(scenario, judged)[0]

    def values(label: str, metric: str) -> list[Any]:
        return [value_of(one, metric, judged) for one in learners[label]]

    def shown(entry: Entry, verb: str = "") -> str:
        interval = t_interval(values(entry.label, main))
        span = "" if interval.low is None else f" [{max(0.0, interval.low):.1f}, {min(100.0, interval.high or 0):.1f}]"
        return f"{entry.label}{verb} {interval.mean:.1f} %{span}"

    count = f"{len(found)} seeds" if len(found) > 1 else "one seed"
    beside = ", ".join(shown(entry) for entry in entries if not entry.own)
    text = f"On {task}, over {count}, {shown(own, ' reaches')} {main}; beside it {beside}"
    lost = [value for value in values(own.label, FORGETTING) if value is not None]
    if lost:
        text += f"; it forgot {t_interval(lost).mean:.1f} points"
    if len(found) > 1:
        gap = paired(values(own.label, main), values(own.against, main))
        text += f"; {own.label} less {own.against}: {gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
    return text + "."
