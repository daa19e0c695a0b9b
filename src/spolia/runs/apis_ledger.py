"""What a run over APIs leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from spolia.bench.continual_ledger import (
    CLASS_IL,
    FORGETTING,
    TASK_IL,
    ledger_rows,
    mean_matrix,
    so_far,
    value_of,
)
from spolia.bench.multitask import AVERAGE, paired, t_interval
from spolia.runs.apis_entries import ALONE, FEW, JOINT, PLAIN, ROUTER, lines_of
from spolia.runs.apis_problems import ApiProblem, DigitsApis
from spolia.runs.apis_rounds import rounds_of
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

QUERIES, COST, GAP = "queries", "cost", "gap"
MEANINGS = {
    ALONE: "no remembered queries and no similarity: what distillation one after the other forgets",
    PLAIN: "finite differences through both networks",
    ROUTER: "no model: every input to every API so far, the most confident one's word; paid for at test",
    FEW: "the few real examples and no API",
    JOINT: "all real training data so far at each API",
}
SHOWN = 12  # queries of each API in the report


def ledger(run: RunFolder, recipe: StudyRecipe, found: list[dict[str, Any]]) -> dict[str, Any]:
    """results.json."""
    lines, problem, learners = lines_of(recipe), recipe.problem, by_line(found)
    baselines = [line.label for line in lines if not line.own]
    against = {line.label: line.against for line in lines if line.against}
    rows = ledger_rows(learners, task_of(problem), against=against, baselines=baselines, each=False)
    return run.ledger(
        recipe.name,
        data=data_touched(problem),
        seeds=recipe.every_seed[: len(found)],
        rows=[*rows, *asked_rows(learners, baselines, problem)],
        notes=_notes(recipe, found),
    )


def by_line(found: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """For every line what each seed found."""
    return {label: [one["lines"][label] for one in found] for label in found[0]["lines"]}


def task_of(problem: ApiProblem) -> str:
    name = "digits" if isinstance(problem, DigitsApis) else getattr(problem, "data", "")
    return f"{name}, {problem.count} APIs"


def data_touched(problem: ApiProblem) -> dict[str, str]:
    """What each phase sees."""
    few = f"{problem.few} labelled examples of each class" if problem.few else "no data"
    digits = isinstance(problem, DigitsApis)
    experts = "served elsewhere; what they were trained on is theirs" if problem.urls else (
        "labelled digits of their own classes" if digits else "the training part of their own classes"
    )  # fmt: skip
    return {
        "experts": experts,
        "learning": f"answers of the API at hand to synthetic inputs, at most {problem.budget:,} items of each; {few}",
        "bounds": f"`{JOINT}` sees all real training data, `{FEW}` the few examples",
        "test": f"{'600 digits' if digits else 'the test part'}, after every API; nothing is chosen by it",
    }


def asked_rows(
    found: Mapping[str, Sequence[dict[str, Any]]], baselines: Sequence[str], problem: ApiProblem
) -> list[dict[str, Any]]:
    """Items by line and API, and what they cost where the problem has a price. `found[line]` has one entry a seed."""
    rows = []
    for metric, unit, price in ((QUERIES, "items", 1.0), (COST, problem.currency, problem.price / 1000)):
        for label, seeds in found.items() if price else ():
            names = list(seeds[0]["asked"])
            for name in [*names, AVERAGE] if names else ():
                each = [fmean(one["asked"].values()) if name == AVERAGE else one["asked"][name] for one in seeds]
                row = {"method": label, "task": name, "metric": metric, "unit": unit, "mean": price * fmean(each)}
                row |= {"low": None, "high": None, "n": len(each)}
                rows.append(row | ({"baseline": True} if label in baselines else {}))
    return rows


def _notes(recipe: StudyRecipe, found: list[dict[str, Any]]) -> str:
    problem = recipe.problem
    rounds, once, each = rounds_of(problem, recipe.settings)
    asked = f"{rounds} rounds of {each:,} items an API" + (f", and up to {once:,} once" if once else "")
    lines = [f"{asked}; an item is one input, counted as it was asked for."]
    if found[0]["experts"]:
        reached = ", ".join(
            f"{name} {fmean(one['experts'][t] for one in found):.1f}" for t, name in enumerate(found[0]["apis"])
        )
        lines.append(f"The APIs' own accuracy in per cent: {reached}.")
    if problem.price:
        own = next(line.label for line in lines_of(recipe) if line.own)
        mean = {name: fmean(one["lines"][own]["asked"][name] for one in found) for name in found[0]["apis"]}
        told = ", ".join(f"{name} {items * problem.price / 1000:.2f}" for name, items in mean.items())
        lines.append(f"Estimated cost of {own} in {problem.currency}, a seed: {told}.")
    present = found[0]["lines"]
    lines.append(" ".join(f"`{label}`: {what}." for label, what in MEANINGS.items() if label in present))
    lines.append(f"{CLASS_IL} and {TASK_IL} come from the same run: each API only ranks its own classes.")
    if spent := found[-1].get("spent"):
        told = "; ".join(_spent(name, one, problem) for name, one in spent.items())
        lines.append(f"Sent over HTTP so far, all seeds: {told}.")
    lines.append("Querying a model to learn another from it may break the terms it is offered under.")
    return " ".join(lines)


def _spent(name: str, one: dict[str, Any], problem: ApiProblem) -> str:
    told = (
        f"{name} {one['calls']:,} calls, {one['items']:,} items, {one['failed']:,} calls in vain, {one['kept']:,} kept"
    )
    return told + (f", {one['money']:.2f} {problem.currency}" if problem.price else "")


def figures(recipe: StudyRecipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """figures.json: accuracy along the stream by both rules, the accuracy matrix, the gap, and queries as images."""
    learners = by_line(found)
    own = next(line for line in lines_of(recipe) if line.own)
    made: list[dict[str, Any]] = []
    for rule, judged in (("Class-IL", "class"), ("Task-IL", "task")):
        matrices = {label: mean_matrix(seeds, judged) for label, seeds in learners.items()}
        series = [{"name": n, "x": list(range(1, len(m) + 1)), "y": so_far(m)} for n, m in matrices.items()]
        caption = "Mean over the tests of the APIs so far; means over seeds."
        made.append(
            _lines(f"{rule} accuracy along the stream", caption, "APIs met", "accuracy", series) | {"unit": "%"}
        )
    tests = found[0]["apis"]
    values = [[None if v is None else round(v, 2) for v in row] for row in mean_matrix(learners[own.label])]
    matrix = {"kind": "matrix", "title": f"Class-IL accuracy matrix of {own.label}"}
    caption = "Row: after which API; column: on whose test, in per cent. Below the diagonal is what is kept."
    made.append(
        matrix | {"caption": caption, "rows": [f"after {n}" for n in tests], "columns": tests, "values": values}
    )
    gaps = {label: seeds[0]["gaps"] for label, seeds in learners.items() if seeds[0].get("gaps")}
    if gaps:
        series = [{"name": n, "x": list(range(1, len(y) + 1)), "y": y} for n, y in gaps.items()]
        caption = (
            "Between model and API on new queries, first seed. It rises where the generators find what is not known."
        )
        made.append(_lines("Gap by rounds", caption, "round", GAP, series))
    if sheet := found[0].get("sheet"):
        caption = "What the generators asked last of each API, first seed."
        columns = [str(i + 1) for i in range(sheet["count"])]
        about = {"kind": "images", "title": "Queries", "caption": caption, "rows": sheet["rows"], "columns": columns}
        made.append(about | {"shape": sheet["shape"], "pixels": sheet["pixels"]})
    return made


def sheet_of(images: dict[str, Any]) -> dict[str, Any] | None:
    """Queries [n, channels, height, width] in 0 … 1 of each API, as the report draws them. None where they are no images."""
    first = next(iter(images.values()), None)
    if first is None or first.dim() != 4 or first.shape[1] not in (1, 3):
        return None
    raw = b"".join((255 * x.clamp(0, 1)).round().byte().cpu().numpy().tobytes() for x in images.values())
    about = {"rows": list(images), "count": len(first), "shape": list(first.shape[1:])}
    return about | {"pixels": base64.b64encode(raw).decode()}


def summary(recipe: StudyRecipe, found: list[dict[str, Any]]) -> str:
    """One sentence."""
    lines, learners, problem = lines_of(recipe), by_line(found), recipe.problem
    own = next(line for line in lines if line.own)

    def shown(label: str, metric: str) -> str:
        return f"{t_interval([value_of(one, metric) for one in learners[label]]).mean:.1f} %"  # type: ignore[misc]

    count = f"{len(found)} seeds" if len(found) > 1 else "one seed"
    asked = fmean(sum(one["asked"].values()) for one in learners[own.label])
    text = f"On {task_of(problem)}, over {count}, {own.label} reaches {shown(own.label, TASK_IL)} Task-IL and"
    text += f" {shown(own.label, CLASS_IL)} Class-IL with {asked:,.0f} items asked"
    text += f" ({asked * problem.price / 1000:.2f} {problem.currency})" if problem.price else ""
    beside = [f"{line.label} {shown(line.label, CLASS_IL)}" for line in lines if not line.own]
    text += f"; Class-IL beside it: {', '.join(beside)}"
    lost = [value_of(one, FORGETTING) for one in learners[own.label]]
    if all(value is not None for value in lost):
        text += f"; it forgot {fmean(lost):.1f} points"  # type: ignore[arg-type]
    if len(found) > 1:
        gap = paired(*([value_of(one, CLASS_IL) for one in learners[name]] for name in (own.label, own.against)))  # type: ignore[arg-type]
        text += f"; {own.label} less {own.against}: {gap.mean:+.1f} [{gap.low:+.1f}, {gap.high:+.1f}]"
    return text + "."


def _lines(title: str, caption: str, x: str, y: str, series: list[dict[str, Any]]) -> dict[str, Any]:
    return {"kind": "lines", "title": title, "caption": caption, "x_label": x, "y_label": y, "series": series}
