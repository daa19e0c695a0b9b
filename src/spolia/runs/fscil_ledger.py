"""What a run of prompts leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

from typing import Any

from spolia.bench.fscil import ACCURACY, DROP, HARMONIC, ledger_rows, session_name, value_of
from spolia.bench.multitask import paired, t_interval
from spolia.runs.fscil_problems import DataSessions, DigitsSessions, Sessions, name_of
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

NCM = "ncm"


def ledger(run: RunFolder, recipe: StudyRecipe, found: list[dict[str, Any]], labels: list[str]) -> dict[str, Any]:
    """results.json. `labels`: the lines, the recipe's own last."""
    rows = ledger_rows(
        by_line(found, labels), task_of(recipe.problem), against=against_of(labels), baselines=labels[:-1]
    )
    return run.ledger(
        recipe.name,
        data=data_touched(recipe.problem),
        seeds=recipe.every_seed[: len(found)],
        rows=rows,
        notes=_notes(found),
    )


def by_line(found: list[dict[str, Any]], labels: list[str]) -> dict[str, list[dict[str, Any]]]:
    """For every line what each seed found."""
    return {label: [one["lines"][label] for one in found] for label in labels}


def against_of(labels: list[str]) -> str:
    """What differences are taken from: the class means, of which the recipe may be itself."""
    return NCM if labels[-1] != NCM else labels[0]


def task_of(problem: Sessions) -> str:
    return f"{name_of(problem)}, {problem.base} classes, then {problem.ways}-way {problem.shots}-shot"


def data_touched(problem: Sessions) -> dict[str, str]:
    """What each phase sees."""
    digits = isinstance(problem, DigitsSessions)
    what = "digits" if digits else "inputs" if isinstance(problem, DataSessions) else "images"
    base = f"labelled {what} of the {problem.base} base classes"
    encoder = (
        f"{base}, and their turns; no other class" if not problem.encoder else f"what {problem.encoder} was trained on"
    )
    return {
        "encoder": encoder,
        "base session": base,
        "further sessions": f"{problem.shots} labelled {what} of each of {problem.ways} new classes, twice; none stays",
        "test": f"{'600 other digits' if digits else 'the test part'}, after every session; nothing is chosen by it",
    }


def _notes(found: list[dict[str, Any]]) -> str:
    first = next(iter(found[0]["lines"].values()))
    lines = [
        f"Accuracy: of all classes seen, pooled over {sum(first['sizes'])} test inputs; average: mean over sessions.",
        "Base and novel accuracy, and their harmonic mean, after the last session; drop: first less last accuracy.",
        "Novel answers compete with base classes. Learned: what is kept beside the encoder to give answers.",
        "All lines have the same frozen encoder, classes and shots in a seed.",
    ]
    if len(found) > 1:
        lines.append("Intervals are 95 %, Student's over seeds; differences are seed by seed.")
    return " ".join(lines)


def figures(found: list[dict[str, Any]], labels: list[str]) -> list[dict[str, Any]]:
    """figures.json: accuracy by sessions; old against new after the last one."""
    lines = by_line(found, labels)
    count = len(found[0]["lines"][labels[0]]["sessions"])
    series = [
        {
            "name": label,
            "x": list(range(count)),
            "y": [t_interval([value_of(one, ACCURACY, i) for one in seeds]).mean for i in range(count)],
        }
        for label, seeds in lines.items()
    ]
    wide = {"kind": "matrix", "title": "Accuracy on each session's classes at the end"}
    wide |= {"caption": "In per cent, answers among all classes; means over seeds.", "rows": labels}
    values = [
        [round(t_interval([one["last row"][j] for one in seeds]).mean, 2) for j in range(count)]
        for seeds in lines.values()
    ]
    return [
        {
            "kind": "lines",
            "title": "Accuracy after each session",
            "caption": "Of all classes seen; means over seeds.",
            "x_label": "session",
            "y_label": "accuracy",
            "unit": "%",
            "series": series,
        },
        wide | {"columns": [session_name(j) for j in range(count)], "values": values},
    ]


def summary(recipe: StudyRecipe, found: list[dict[str, Any]], labels: list[str]) -> str:
    """One sentence."""
    lines, own, other = by_line(found, labels), labels[-1], against_of(labels)

    def mean(label: str, metric: str) -> float:
        return t_interval([value_of(one, metric) for one in lines[label]]).mean

    count = f"{len(found)} seeds" if len(found) > 1 else "one seed"
    text = f"On {task_of(recipe.problem)}, over {count}, {own} has {mean(own, ACCURACY):.1f} % mean accuracy, drops"
    text += f" {mean(own, DROP):.1f} points and ends with {mean(own, HARMONIC):.1f} % harmonic accuracy; beside it "
    text += ", ".join(f"{name} {mean(name, ACCURACY):.1f} / {mean(name, HARMONIC):.1f} %" for name in labels[:-1])
    if len(found) > 1:
        values, theirs = ([value_of(one, ACCURACY) for one in lines[name]] for name in (own, other))
        gap = paired(values, theirs)
        text += f"; {own} less {other}: {gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
    return text + "."
