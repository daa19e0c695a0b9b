"""What a distillation leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spolia.bench.distillation import ACCURACY, ECE, NLL, PERPLEXITY, TAU, ledger_rows
from spolia.bench.multitask import t_interval
from spolia.data.digits import SIZES
from spolia.runs.distill_problems import DigitsDistillation, ImageDistillation, Problem
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

if TYPE_CHECKING:
    from spolia.bench.multitask import Interval

ALONE, TEACHER = "labels alone", "teacher"
LAST = ", last step"
_NEXT = "next-token accuracy"


def metrics_of(problem: Problem) -> list[str]:
    """The first is what the summary goes by."""
    if problem.source == "prose":
        return [PERPLEXITY, TAU, ECE, _NEXT, _NEXT + LAST]
    return [ACCURACY, TAU, ECE, NLL, ACCURACY + LAST]


def data_touched(problem: Problem, recipe: StudyRecipe) -> dict[str, str]:
    """What each phase sees."""
    settings = recipe.settings
    labels = f"with labels in {ALONE} and in losses that have cross-entropy or ask for them"
    if getattr(settings, "ce", 1.0) == 0 and recipe.method.name not in ("dkd", "nkd"):
        labels = f"without labels, but in {ALONE} and in kd"
    if isinstance(problem, DigitsDistillation):
        trained = SIZES["base"] + SIZES["train"]
        return {
            "teacher": f"{trained} labelled digits",
            "student": f"{problem.images} of these, {labels}; the teacher's answers to them as they are shown",
            "choice of step": f"{SIZES['validation']} other labelled digits",
            "test": f"{SIZES['test']} digits that nothing before had seen",
        }
    if isinstance(problem, ImageDistillation):
        most = "all" if problem.most is None else f"the first {problem.most}"
        given = "as given" if problem.teacher.weights is not None else "drawn anew"
        further = f", then {problem.teacher_epochs:g} epochs on the student's images, with labels"
        return {
            "teacher": given + (further if problem.teacher_epochs else ""),
            "student": f"nine tenths of {most} train images of {problem.data}, {labels}",
            "choice of step": "the other tenth, with labels",
            "test": f"{most} test images of the same file",
        }
    return {
        "teacher": "all windows of the training topics of pydoc_data.topics",
        "student": f"{problem.windows} windows of {problem.context} characters of these topics",
        "choice of step": "windows of other topics",
        "test": "windows of topics that nothing before had seen",
    }


def values_of(problem: Problem, found: list[dict[str, Any]]) -> dict[str, list[dict[str, float]]]:
    """By method and seed, every metric: at the step that validation chose, and the first one also at the last step."""
    made: dict[str, list[dict[str, float]]] = {}
    shown = _NEXT if problem.source == "prose" else ACCURACY
    for label in found[0]:
        rows = []
        for one in found:
            numbers = dict(one[label]["kept"])
            numbers[shown] = numbers[ACCURACY]
            if label == TEACHER:
                del numbers[TAU]  # with itself
            else:
                numbers[shown + LAST] = one[label]["last"][ACCURACY]
            rows.append(numbers)
        made[label] = rows
    return made


def ledger(
    run: RunFolder, recipe: StudyRecipe, found: list[dict[str, Any]], against: Mapping[str, str]
) -> dict[str, Any]:
    """results.json."""
    problem = recipe.problem
    values = values_of(problem, found)
    rows = ledger_rows(values, metrics_of(problem), _task(problem), against=against, baselines=(TEACHER, ALONE))
    return run.ledger(
        recipe.name,
        data=data_touched(problem, recipe),
        seeds=recipe.every_seed[: len(found)],
        rows=rows,
        notes=_notes(recipe, found),
    )


def _task(problem: Problem) -> str:
    return problem.data if isinstance(problem, ImageDistillation) else problem.source


def _notes(recipe: StudyRecipe, found: list[dict[str, Any]]) -> str:
    student = found[0][ALONE]["parameters"]
    lines = [f"The student has {student:,} weights; all start from the same and see the same batches."]
    if len(found) > 1:
        lines.append(
            "Intervals are 95 %, Student's over seeds: new splits where there are any, new teachers and students. Differences"
            " are seed by seed."
        )
    if recipe.problem.training.keep == "best":
        lines.append(f"Numbers are those of the step that validation chose; `{LAST[2:]}` is beside them.")
    lines.append(
        f"{ECE}: expected calibration error in 15 bins. {TAU.capitalize()}: Kendall's tau-b between the logits of student and"
        " teacher, mean over test inputs, in per cent" + (", of the teacher's 100 first." if _many(recipe) else ".")
    )
    return " ".join(lines)


def _many(recipe: StudyRecipe) -> bool:
    return not isinstance(recipe.problem, DigitsDistillation)


def figures(recipe: StudyRecipe, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """figures.json: two curves along the training, and how rank agreement goes with accuracy."""
    problem = recipe.problem
    first = PERPLEXITY if problem.source == "prose" else ACCURACY
    return [_curve(found, first), _curve(found, TAU), _plane(found, first)]


def _curve(found: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    series = []
    for label in found[0]:
        if label == TEACHER:
            continue
        by_step = [{look["step"]: look[metric] for look in one[label]["curve"]} for one in found]
        steps = sorted(set.intersection(*(set(one) for one in by_step)))  # a seed may have stopped early
        points: list[Interval] = [t_interval([one[step] for one in by_step]) for step in steps]
        line: dict[str, Any] = {"name": label, "x": steps, "y": [p.mean for p in points]}
        if len(found) > 1:
            line |= {"low": [p.low for p in points], "high": [p.high for p in points]}
        series.append(line)
    return {
        "kind": "lines",
        "title": f"{metric.capitalize()} on test inputs along the training",
        "caption": "Mean over seeds with 95 % intervals. Counted on the way; no choice goes by it.",
        "x_label": "step",
        "y_label": metric,
        "unit": "" if metric == PERPLEXITY else "%",
        "series": series,
    }


def _plane(found: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    series = [
        {
            "name": label,
            "x": [one[label]["kept"][TAU] for one in found],
            "y": [one[label]["kept"][metric] for one in found],
        }
        for label in found[0]
        if label != TEACHER
    ]
    return {
        "kind": "points",
        "title": f"Rank agreement with the teacher, and {metric}",
        "caption": "A point a seed, at the step that was kept.",
        "x_label": f"{TAU} (%)",
        "y_label": metric,
        "unit": "" if metric == PERPLEXITY else "%",
        "series": series,
    }


def summary(recipe: StudyRecipe, ledger: dict[str, Any], own: str, against: Mapping[str, str]) -> str:
    """One sentence."""
    metric = metrics_of(recipe.problem)[0]
    rows = {row["method"]: row for row in ledger["rows"] if row["metric"] == metric}
    unit = "" if metric == PERPLEXITY else " %"

    def shown(label: str) -> str:
        row = rows[label]
        held = f" [{row['low']:.1f}, {row['high']:.1f}]" if row["low"] is not None else ""
        return f"{row['mean']:.1f}{unit}{held}"

    count = f"{len(ledger['seeds'])} seeds" if len(ledger["seeds"]) > 1 else "one seed"
    gap = rows[own].get("paired_difference")
    than = ""
    if gap is not None:
        than = f", {gap['mean']:+.1f} [{gap['low']:+.1f}, {gap['high']:+.1f}] against {against[own]}"
    return (
        f"Over {count}, {own} brings the student to {metric} {shown(own)}{than}; the labels alone bring it to"
        f" {shown(ALONE)}, the teacher has {shown(TEACHER)}."
    )
