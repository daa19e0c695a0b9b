"""What a data-free run leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

from statistics import fmean
from typing import Any

from spolia.bench.fewshot_scores import ACCURACY, SEEDS, Point, Scores, ledger_rows, stages
from spolia.bench.multitask import t_interval
from spolia.runs.datafree_entries import SELECTED, against, entries_of
from spolia.runs.datafree_problems import DataFree
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

PEAK, VARIATION = "accuracy at the peak, chosen on the test", "last less peak"
HONEST, RECOVERY = "trust in honest models", "recovery"
LOOKS = "looks along the training"
PSEUDO = "accuracy on pseudo-tasks"


def ledger(run: RunFolder, recipe: StudyRecipe, found: list[dict[str, Any]], data: dict[str, str]) -> dict[str, Any]:
    """results.json."""
    own, rows = recipe.method.name, []
    labels = list(found[0]["scores"])
    for task in found[0]["scores"].get(own, {}):
        scores = {label: [_scores(one["scores"][label][task]) for one in found] for label in labels}
        rows += ledger_rows(scores, task, baselines=set(labels) - {own, own + SELECTED}, against=against(recipe))
    return run.ledger(
        recipe.name,
        data=data,
        seeds=recipe.every_seed[: len(found)],
        rows=[*rows, *_others(recipe, found)],
        notes=_notes(recipe, found),
    )


def _scores(kept: dict[str, Any]) -> Scores:
    return Scores(kept["episodes"], kept["scenario"], {metric: tuple(each) for metric, each in kept["values"].items()})


def _others(recipe: StudyRecipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows that are no accuracy over episodes: peaks, times, trust."""
    own, rows = recipe.method.name, []
    for label in found[0]["points"]:
        base = {"baseline": True} if label != own else {}
        points = [_points(one["points"][label]) for one in found]
        if all(points):
            three = [stages(each) for each in points]
            rows.append(_row(label, LOOKS, PEAK, "%", [s.peak.test for s in three]) | base)
            rows.append(_row(label, LOOKS, VARIATION, "points", [s.last.test - s.peak.test for s in three]) | base)
        elif (seen := [[p[1] for p in one["points"][label] if p[1] is not None] for one in found]) and all(seen):
            rows.append(_row(label, LOOKS, PSEUDO, "%", [each[-1] for each in seen]) | base)
        rows.append(_row(label, RECOVERY, "time", "s a model", [one["seconds"][label] for one in found]) | base)
    trust = [_honest(one) for one in found]
    if all(value is not None for value in trust):
        rows.append(_row(own, "all models", HONEST, "%", [value for value in trust if value is not None]))
    gains = [one["selection"].get("gain") for one in found]
    if all(gain is not None for gain in gains):
        rows.append(_row(own, "groups", "dissimilarity within, above chance", "", gains))
    return rows


def _points(kept: list[list[Any]]) -> list[Point]:
    """Those with a test; a validation that could not be is worse than any."""
    return [Point(step, -1.0 if v is None else v, test) for step, v, test in kept if test is not None]


def _row(method: str, task: str, metric: str, unit: str, values: list[float]) -> dict[str, Any]:
    made = t_interval(values)
    row = {"method": method, "task": task, "metric": metric, "unit": unit}
    return row | {"mean": made.mean, "low": made.low, "high": made.high, "n": len(values)}


def _honest(one: dict[str, Any]) -> float | None:
    """Per cent of all trust that lies on models which do not lie; None where nobody lies, or nothing is trusted."""
    told, attacks = one["selection"], one["attacks"]
    if "trust" not in told or not attacks:
        return None
    return 100 * sum(t for name, t in zip(told["models"], told["trust"], strict=True) if name not in attacks)


def _notes(recipe: StudyRecipe, found: list[dict[str, Any]]) -> str:
    problem: DataFree = recipe.problem
    chosen = "real episodes" if problem.validation == "real" else "pseudo-tasks of recovered images"
    lines = [
        f"{problem.ways}-way; {problem.episodes} test episodes of unseen classes, the same for all lines and seeds.",
        "Intervals are 95 %: over episodes, each averaged over training seeds; in rows `over seeds` Student's.",
        f"The method's line is the end of its training; `selected` is what validation chose, by {chosen}; the peak was"
        " chosen on the test itself, bounds what selection could reach, and is no result.",
        "`real data` is the same learner in as many steps on the base classes' own images.",
    ]
    lines += [f"{entry.label}: {entry.settings.steps} outer steps." for entry in entries_of(recipe)]
    told = [f"{name}: {what} ({level})" for name, level, what in found[0]["audit"] if level != "note"]
    if told:
        lines.append(f"The audit of the pool says: {'; '.join(told[:8])}{'; …' if len(told) > 8 else ''}.")
    if found[0]["attacks"]:
        said = ", ".join(f"{name} {attack}" for name, attack in found[0]["attacks"].items())
        lines.append(f"Models made to lie: {said}.")
    return " ".join(lines)


# --- figures ---------------------------------------------------------------------------------------------------------


def figures(recipe: StudyRecipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """figures.json: what the models remember, the training, and how the models were chosen, of the first seed."""
    first, made = found[0], []
    if first["sheet"]:
        caption = (
            "Images recovered from the models alone, the newest of each class; rows are the classes that models claim."
        )
        made.append({"kind": "images", "title": "What the models remember", "caption": caption, **first["sheet"]})
    made += _training(found)
    told = first["selection"]
    names = dict(zip(told["models"], first["kinds"], strict=True))
    if "dissimilarity" in told:
        made.append(_matrix(told, names))
    if "trust" in told:
        made.append(_trust(told, names))
    quality = [(name, one) for name, one in first["recovered"].items()]
    groups = [names[name] for name, _ in quality]
    series = [{"name": "top-1", "values": [round(100 * one["top1"], 2) for _, one in quality]}]
    caption = "How often a model takes its own recovered images for what they should be, at its last visit."
    title = "Recovered images as their models see them"
    if groups:
        bars = {"kind": "bars", "title": title, "caption": caption, "y_label": "top-1", "unit": "%"}
        made.append(bars | {"groups": groups, "series": series})
    return made


def _training(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Accuracy on the test and on validation along the training, means over seeds."""
    series = []
    for label in found[0]["points"]:
        each = [one["points"][label] for one in found]
        for column, what in ((2, "test"), (1, "validation")):
            rows = [row for row in zip(*each, strict=False) if all(p[column] is not None for p in row)]
            if len(rows) > 1:
                y = [fmean(p[column] for p in row) for row in rows]
                series.append({"name": f"{label}, {what}", "x": [float(row[0][0]) for row in rows], "y": y})
    if not series:
        return []
    caption = "On a few episodes, means over seeds. Validation may choose; the test only stands beside it."
    figure = {"kind": "lines", "title": "Accuracy along the training", "caption": caption, "x_label": "outer steps"}
    return [figure | {"y_label": "accuracy", "unit": "%", "series": series}]


def _matrix(told: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    place = {model: group for group, members in enumerate(told["groups"], 1) for model in members}
    rows = [f"{place[at]}: {names[told['models'][at]]}" for at in told["order"]]
    count, gain = len(told["groups"]), told["gain"]
    caption = (
        f"Models by group (the number before the name): {count} groups of unlike models, whose mean dissimilarity within"
        f" lies {gain:+.4f} from that of random groups."
    )
    figure = {"kind": "matrix", "title": "How unlike the models are", "caption": caption}
    return figure | {"rows": rows, "columns": rows, "values": told["dissimilarity"]}


def _trust(told: dict[str, Any], names: dict[str, str]) -> dict[str, Any]:
    order = sorted(range(len(told["trust"])), key=lambda at: -told["trust"][at])
    values = [round(100 * told["trust"][at], 3) for at in order]
    caption = f"Softmax of the learned scores after {len(told['rewards'])} rewards; {100 / len(order):.2g} % is an even share."
    if told["evicted"]:
        caption += f" Images were taken back from {', '.join(names[name] for name in told['evicted'])}."
    figure = {"kind": "bars", "title": "Trust in each model", "caption": caption, "y_label": "trust", "unit": "%"}
    groups = [names[told["models"][at]] for at in order]
    return figure | {"groups": groups, "series": [{"name": "trust", "values": values}]}


# --- the sentence ----------------------------------------------------------------------------------------------------


def summary(recipe: StudyRecipe, ledger: dict[str, Any]) -> str:
    """One sentence."""
    own, base = recipe.method.name, against(recipe)
    end = SEEDS if len(ledger["seeds"]) > 1 else ""
    rows = {(row["method"], row["task"]): row for row in ledger["rows"] if row["metric"] == ACCURACY + end}
    tasks = [task for method, task in rows if method == own]
    if not tasks:
        return f"{own} was trained; without unseen classes to ask about, nothing was measured but its recovered images."

    def shown(label: str, task: str) -> str:
        row = rows[label, task]
        span = "" if row["low"] is None else f" [{row['low']:.1f}, {row['high']:.1f}]"
        return f"{row['mean']:.1f} %{span}"

    said = " and ".join(f"{shown(own, task)} ({task})" for task in tasks[:2])
    beside = " and ".join(shown(base, task) for task in tasks[:2])
    count = f"{len(ledger['seeds'])} seeds" if len(ledger["seeds"]) > 1 else "one seed"
    labels = [label for label, task in rows if task == tasks[0] and label not in (own, base, own + SELECTED)]
    others = ", ".join(f"{label} {rows[label, tasks[0]]['mean']:.1f} %" for label in labels)
    return f"Over {count}, {own} reaches {said} on unseen classes, where {base} has {beside}; in the first, {others}."
