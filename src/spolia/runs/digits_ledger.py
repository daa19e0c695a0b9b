"""What a study of digits merges leaves behind: results.json, figures.json and the sentence of summary.txt."""

from __future__ import annotations

from statistics import fmean
from typing import TYPE_CHECKING, Any

from spolia.bench.multitask import AVERAGE, Share, ledger_rows, t_interval
from spolia.catalog import find
from spolia.data.digits import SIZES
from spolia.runs.digits_pool import DATA_TOUCHED
from spolia.runs.store import RunFolder

if TYPE_CHECKING:
    from spolia.runs.digits_study import Study

BASE, EXPERTS = "base", "experts, each on its own"
METRIC = "accuracy"


def ledger(run: RunFolder, study: Study, found: list[dict[str, Any]]) -> dict[str, Any]:
    """results.json."""
    rows: list[dict[str, Any]] = []
    marked = {entry.label for entry in study.entries if entry.baseline}
    for metric, first in found[0]["scores"].items():
        scores = {
            label: [{t: Share(*counts) for t, counts in one["scores"][metric][label].items()} for one in found]
            for label in first
        }
        references = set(first) - {entry.label for entry in study.entries}
        rows += ledger_rows(scores, metric=metric, baselines=marked | references, against=AVERAGE)
    return run.ledger(
        study.name,
        data=DATA_TOUCHED
        | {"merge": sees(study)}
        | ({"choice of scale": f"{SIZES['validation']} labelled validation digits"} if found[0]["chosen"] else {})
        | {"test": f"{SIZES['test']} digits that nothing before had seen"},
        seeds=list(study.seeds[: len(found)]),
        rows=rows,
        notes=_notes(study, found),
    )


def sees(study: Study) -> str:
    """What the merges look at."""
    looking = sorted({entry.method for entry in study.entries if find(entry.method).data})
    if not looking:
        return "weights only"
    return f"weights only; {', '.join(looking)}: {SIZES['validation']} validation digits a domain, without labels"


def _notes(study: Study, found: list[dict[str, Any]]) -> str:
    lines = [
        "Base and experts are residual MLPs trained in this run on scikit-learn's 8x8 digits;"
        " numbers of other checkpoints do not compare, and the order of methods may differ on large models.",
        "Intervals are 95 %, Student's over seeds (new splits, training and merge each)."
        if len(found) > 1
        else "Intervals are 95 %, Wilson's over test images of one seed.",
    ]
    if any(entry.known for entry in study.entries):
        lines.append(
            "Task known: judged with the mask of the task's own expert put on; several models, like the experts."
        )
    if found[0]["chosen"] and any(find(entry.method).data for entry in study.entries):
        lines.append(
            "Scales are chosen on the same validation digits that others see without labels, with their labels."
        )
    for label in found[0]["chosen"]:
        lines.append(f"{label}: {', '.join(format(one['chosen'][label], 'g') for one in found)}.")
    return " ".join(lines)


def figures(study: Study, found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """figures.json: accuracy over scale, and how alike the task vectors are. Bars a task come from the results."""
    drawn: list[dict[str, Any]] = []
    lines = [e for e in study.entries if e.scales and e.method in ("task_arithmetic", "ties")]
    series = []
    for entry in lines:
        order = sorted(range(len(entry.scales)), key=entry.scales.__getitem__)
        points = [t_interval([one["curves"][entry.label][i] for one in found]) for i in order]
        line = {"name": entry.method, "x": [entry.scales[i] for i in order], "y": [p.mean for p in points]}
        if len(found) > 1:
            line |= {"low": [p.low for p in points], "high": [p.high for p in points]}
        series.append(line)
    if series:
        drawn.append(
            {
                "kind": "lines",
                "title": "Accuracy over scale, on validation",
                "caption": "Mean over tasks and seeds, with 95 % intervals over seeds."
                " Each seed's scale is chosen here; test images play no part.",
                "x_label": "scale",
                "y_label": "accuracy",
                "unit": "%",
                "series": series,
            }
        )
    if len(study.domains) > 1:
        size = range(len(study.domains))
        drawn.append(
            {
                "kind": "matrix",
                "title": "Cosines between task vectors",
                "caption": "Mean over seeds. Near 0: the experts changed the base in unrelated directions.",
                "rows": list(study.domains),
                "columns": list(study.domains),
                "values": [[fmean(one["cosines"][i][j] for one in found) for j in size] for i in size],
            }
        )
    return drawn


def summary(study: Study, found: list[dict[str, Any]], ledger: dict[str, Any]) -> str:
    """One sentence. The method it names is the best on validation, so its test accuracy is no pick among many."""
    last = "average" if len(study.domains) > 1 else study.domains[0]
    test = {row["method"]: row for row in ledger["rows"] if row["metric"] == METRIC and row["task"] == last}
    rivals = [entry.label for entry in study.entries if entry.metric == METRIC and not entry.baseline]
    best = max(rivals, key=lambda label: fmean(one["validation"][METRIC][label] for one in found))

    def shown(label: str) -> str:
        row = test[label]
        return f"{row['mean']:.1f} % [{row['low']:.1f}, {row['high']:.1f}]"

    tasks = f"{len(study.domains)} tasks" if len(study.domains) > 1 else "one task"
    count = f"{len(found)} seeds" if len(found) > 1 else "one seed"
    pick = " (the best on validation)" if len(rivals) > 1 else ""
    return (
        f"Over {count}, {best}{pick} reaches {shown(best)} on {tasks} with one model,"
        f" where the base has {shown(BASE)} and the experts, each on its own task, {shown(EXPERTS)}."
    )
