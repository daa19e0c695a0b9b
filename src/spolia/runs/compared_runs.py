"""Run folders side by side: the same rows of their results, differences seed by seed, and what their recipes change."""

from __future__ import annotations

import difflib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from spolia.bench.multitask import AVERAGE, paired
from spolia.errors import Problems, SpoliaError
from spolia.runs.describe import columns

_OWN = ("merge", "surgery", "choice of scale")  # what a method looks at; runs may differ in it, and are told to
MOST_LINES = 60  # of a difference of recipes, in the text form


@dataclass
class Row:
    """One method on one task. `means` has one value a run, None where it was not measured. `differences` are later runs
    minus the first, seed by seed: mean, low, high and the number of seeds; low and high are None for one seed."""

    method: str
    task: str
    metric: str
    unit: str
    means: list[float | None]
    differences: list[dict[str, Any] | None]


@dataclass
class RunComparison:
    """Runs in the order given; what differs is told against the first."""

    runs: list[str]
    rows: list[Row]
    seeds: list[list[int]]
    recipes: list[list[str]] = field(default_factory=list)  # for each later run, the lines that differ
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {"kind": "runs", **asdict(self)}

    def to_text(self, width: int | None = None) -> str:
        labels = [chr(ord("a") + i) if i < 26 else str(i) for i in range(len(self.runs))]
        parts = [f"{label}  {run}" for label, run in zip(labels, self.runs, strict=True)]
        heads = ["method", "task", *labels, *(f"{label} - a, same seeds" for label in labels[1:])]
        for metric, unit in dict.fromkeys((row.metric, row.unit) for row in self.rows):
            rows = [
                [row.method, row.task, *map(_mean, row.means), *map(_shown, row.differences)]
                for row in self.rows
                if (row.metric, row.unit) == (metric, unit)
            ]
            parts += ["", f"{metric} ({unit})" if unit else metric, columns(heads, rows, width)]
        for label, lines in zip(labels[1:], self.recipes, strict=True):
            if lines:
                more = [f"  … {len(lines) - MOST_LINES} more lines"] if len(lines) > MOST_LINES else []
                parts += ["", f"recipe of a (-) and {label} (+)", *("  " + line for line in lines[:MOST_LINES]), *more]
            else:
                parts += ["", f"recipes of a and {label}: equal"]
        return "\n".join([*parts, *(["", *self.notes] if self.notes else [])])


def _mean(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _shown(difference: dict[str, Any] | None) -> str:
    if difference is None:
        return "-"
    text = f"{difference['mean']:+.2f}"
    return text if difference["low"] is None else f"{text} [{difference['low']:+.2f}, {difference['high']:+.2f}]"


def is_run(folder: Path) -> bool:
    """Whether `spolia run` wrote it. A merged model has a recipe too, and results where it was evaluated."""
    kept = (folder / "results.json").is_file() and not any(folder.glob("*.safetensors*"))
    return kept or (folder / "status.json").is_file()


def compare_runs(folders: list[Path]) -> RunComparison:
    """Every row that at least one of the runs has: those in which they differ, equal ones, those that some lack.

    SpoliaError for runs that were not measured alike.
    """
    results = [_results(folder) for folder in folders]
    _alike(folders, results)
    found: dict[tuple[str, str, str], list[dict[str, Any] | None]] = {}
    for number, one in enumerate(results):
        for row in one["rows"]:
            key = (str(row["metric"]), str(row["method"]), str(row["task"]))
            if key not in found:
                found[key] = [None for _ in folders]
            found[key][number] = row
    seeds = [list(one.get("seeds") or []) for one in results]
    scores = [_scores(folder, own) for folder, own in zip(folders, seeds, strict=True)]
    rows = []
    for (metric, method, task), measured in found.items():
        units = [str(row.get("unit") or "") for row in measured if row is not None]
        differences = [_paired(scores[0], other, metric, method, task) for other in scores[1:]]
        means = [None if row is None else row.get("mean") for row in measured]
        rows.append(Row(method, task, metric, units[0], means, differences))
    rows.sort(key=lambda row: 2 if None in row.means else len(set(row.means)) == 1)
    comparison = RunComparison([str(folder) for folder in folders], rows, seeds)
    texts = [_text(folder / "recipe.yaml") for folder in folders]
    comparison.recipes = [recipe_difference(texts[0], text) for text in texts[1:]]
    comparison.notes = [*_notes(comparison), *_seen(folders, results)]
    return comparison


def _notes(comparison: RunComparison) -> list[str]:
    lines = []
    counts = {d["seeds"] for row in comparison.rows for d in row.differences if d is not None}
    if counts:
        said = "Differences are paired by seed, with 95 % intervals of Student."
        lines.append(said if min(counts) > 1 else "Differences are of one seed each where they have no interval.")
    if any(own != comparison.seeds[0] for own in comparison.seeds[1:]):
        lines.append("The runs have different seeds: only those in common are paired.")
    return lines


def recipe_difference(a: str, b: str) -> list[str]:
    """Lines by which two recipes differ: `-` for a, `+` for b."""
    lines = difflib.unified_diff(a.splitlines(), b.splitlines(), n=0, lineterm="")
    return [line for line in lines if not line.startswith(("---", "+++", "@@"))]


def _text(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace") if file.is_file() else ""


def _results(folder: Path) -> dict[str, Any]:
    file = folder / "results.json"
    try:
        results = json.loads(file.read_text(encoding="utf-8"))
        keys = ("method", "task", "metric")
        results["rows"] = [row for row in results["rows"] if all(key in row for key in keys)]
    except FileNotFoundError:
        raise SpoliaError("the run has no results", where=str(folder), mend="run it again to continue") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise SpoliaError("cannot be read", where=str(file), mend="run it again to continue") from None
    return results


def _alike(folders: list[Path], results: list[dict[str, Any]]) -> None:
    """Numbers compare where the same metric was taken on the same data."""
    problems, first = Problems(), results[0]
    metrics = {row["metric"] for row in first["rows"]}
    for folder, one in zip(folders[1:], results[1:], strict=True):
        data, other = first.get("data") or {}, one.get("data") or {}
        keys = dict.fromkeys(key for key in (*data, *other) if key not in _OWN)
        for key in [key for key in keys if data.get(key) != other.get(key)]:
            what = f"data of `{key}`: {other.get(key) or 'none'}; in {folders[0]}: {data.get(key) or 'none'}"
            problems.add(str(folder), what, "numbers on other data do not compare: run both on the same")
        own = {row["metric"] for row in one["rows"]}
        if not own & metrics:
            what = f"measured {', '.join(sorted(own)) or 'nothing'}, {folders[0]} {', '.join(sorted(metrics)) or 'nothing'}"
            problems.add(str(folder), what, "compare runs that share a metric")
    problems.raise_if_any()


def _seen(folders: list[Path], results: list[dict[str, Any]]) -> list[str]:
    """What the methods looked at, where that is not the same."""
    told = [{key: one["data"][key] for key in _OWN if key in (one.get("data") or {})} for one in results]
    if all(one == told[0] for one in told):
        return []
    said = [", ".join(f"{key}: {what}" for key, what in one.items()) or "nothing" for one in told]
    return [f"{folder} saw: {what}." for folder, what in zip(folders, said, strict=True)]


Scores = dict[int, dict[str, Any]]


def _scores(folder: Path, seeds: list[int]) -> Scores:
    """What each seed counted, where the run kept it: metric -> method -> task -> [correct, total]."""
    found: Scores = {}
    for seed in seeds:
        try:
            kept = json.loads((folder / "checkpoints" / f"scores-seed-{seed}.json").read_text(encoding="utf-8"))
            found[seed] = kept["scores"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            continue
    return found


def _paired(first: Scores, other: Scores, metric: str, method: str, task: str) -> dict[str, Any] | None:
    pairs = []
    for seed in first.keys() & other.keys():
        a, b = (_percent(scores[seed].get(metric, {}).get(method), task) for scores in (first, other))
        if a is not None and b is not None:
            pairs.append((b, a))
    if not pairs:
        return None
    gap = paired([b for b, _ in pairs], [a for _, a in pairs])
    return {"mean": gap.mean, "low": gap.low, "high": gap.high, "seeds": len(pairs)}


def _percent(counts: dict[str, Any] | None, task: str) -> float | None:
    if not counts:
        return None
    shares = {name: 100 * correct / total for name, (correct, total) in counts.items()}
    return shares.get(task, fmean(shares.values()) if task == AVERAGE else None)
