"""What a few-shot run leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from spolia.bench.consistency import CONSISTENCY, COSINE
from spolia.bench.fewshot_scores import ACCURACY, SEEDS, Scores, ledger_rows
from spolia.runs.meta_entries import UNADAPTED, UNTRAINED, base_label, entries_of, label_of
from spolia.runs.meta_problems import scenarios_of
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe


def ledger(run: RunFolder, recipe: StudyRecipe, found: list[dict[str, Any]], data: dict[str, str]) -> dict[str, Any]:
    """results.json."""
    own, rows = label_of(recipe), []
    labels = list(found[0]["scores"])
    for test in scenarios_of(recipe.problem):
        scores = {label: [_scores(one["scores"][label][test]) for one in found] for label in labels}
        rows += ledger_rows(scores, test, baselines=set(labels) - {own}, against=base_label(recipe))
    return run.ledger(
        recipe.name,
        data=data,
        seeds=recipe.every_seed[: len(found)],
        rows=rows,
        notes=_notes(recipe, found),
    )


def _scores(kept: dict[str, Any]) -> Scores:
    values = {metric: tuple(each) for metric, each in kept["values"].items()}
    return Scores(kept["episodes"], kept["scenario"], values)


def _notes(recipe: StudyRecipe, found: list[dict[str, Any]]) -> str:
    problem = recipe.problem
    lines = [
        f"{problem.ways}-way {problem.shots}-shot; {problem.episodes} test episodes, the same for all lines and seeds.",
        "Intervals are 95 %: over episodes, each averaged over training seeds; in rows `over seeds` Student's.",
        "A line is the model that validation chose; `last` is the one at the end of training.",
        "Each measure of consistency stands beside its floor, that of independent answers as sure of themselves; the"
        " cosine of centred logits has the floor 0.",
    ]
    for entry in entries_of(recipe):
        chosen = ", ".join(str(one["selected"][entry.label]) for one in found)
        lines.append(f"{entry.label}: {entry.basis.steps} outer steps, chosen after {chosen}.")
    if recipe.method.name == "msd" and recipe.settings.parity:
        lines.append("Views cost tasks: msd takes the base's tasks of a step divided by the views.")
    return " ".join(lines)


def figures(recipe: StudyRecipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """figures.json: accuracy along the inner steps, and consistency against accuracy."""
    made = []
    if found[0]["along"]:
        series = []
        for label, first in found[0]["along"].items():
            each = [one["along"][label]["accuracy"] for one in found]
            series.append(
                {"name": label, "x": first["steps"], "y": [fmean(values) for values in zip(*each, strict=True)]}
            )
        made.append(
            {
                "kind": "lines",
                "title": "Accuracy by inner steps",
                "caption": "On a fourth of the test episodes, plain supports; means over seeds.",
                "x_label": "inner steps",
                "y_label": "accuracy",
                "unit": "%",
                "series": series,
            }
        )
    shown = [label for label in found[0]["scores"] if not label.endswith((UNADAPTED, UNTRAINED, ", last"))]
    points = [
        {"name": label, "x": [_mean(one, label, COSINE) for one in found], "y": [_mean(one, label) for one in found]}
        for label in shown
    ]
    made.append(
        {
            "kind": "points",
            "title": "Consistency and accuracy",
            "caption": "A point a seed. Consistency is the cosine of centred logits after two views of one support; independent"
            " answers have 0. Who is consistent alone is not yet right.",
            "x_label": "cosine of centred logits",
            "y_label": "accuracy",
            "unit": "%",
            "series": points,
        }
    )
    return made


def _mean(one: dict[str, Any], label: str, metric: str = ACCURACY) -> float:
    return round(_scores(one["scores"][label]["standard"]).mean(metric), 4)


def summary(recipe: StudyRecipe, ledger: dict[str, Any]) -> str:
    """One sentence."""
    own, base = label_of(recipe), base_label(recipe)
    seeds, problem = len(ledger["seeds"]), recipe.problem
    end = SEEDS if seeds > 1 else ""
    tests = list(scenarios_of(problem))

    def shown(label: str, test: str, metric: str = ACCURACY, unit: str = " %", digits: int = 1) -> str:
        row = next(r for r in ledger["rows"] if (r["method"], r["task"], r["metric"]) == (label, test, metric + end))
        low, high = row["low"], row["high"]
        span = "" if low is None else f" [{low:.{digits}f}, {high:.{digits}f}]"
        return f"{row['mean']:.{digits}f}{unit}{span}"

    said = [f"{shown(own, test)} with a {'plain' if test == 'standard' else test.split()[0]} support" for test in tests]
    beside = " and ".join(f"{shown(base, test)}" for test in tests)
    count = f"{seeds} seeds" if seeds > 1 else "one seed"
    return (
        f"Over {count}, {own} reaches {' and '.join(said)}, where {base} has {beside}; answers after two views of one"
        f" support have a consistency of {shown(own, 'standard', CONSISTENCY, '', 3)} against"
        f" {shown(base, 'standard', CONSISTENCY, '', 3)}."
    )
