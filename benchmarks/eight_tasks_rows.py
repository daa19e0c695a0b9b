"""The rows of eight_tasks.py: which merges and repairs there are, what they gave, and the ledger's form of that."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from eight_tasks_pool import TASKS, Recipe

from spolia.bench.multitask import AVERAGE, Share, ledger_rows, t_interval

BASE, INDIVIDUAL = "base", "experts, each on its own"
SCALES = (0.1, 0.2, 0.3, 0.4, 0.5, 0.7, 1.0, 1.5)
HELD, TEST = "unlabelled", "test"  # what a method adapts on
TA, TIES, ADAMERGING = "task_arithmetic, scale chosen", "ties, scale chosen", "adamerging, layer-wise"
BY_EXPERTS, NO_GUARD = f"{ADAMERGING}, KL to the experts", f"{ADAMERGING}, no guard"
REPAIRED = (AVERAGE, TA, TIES, ADAMERGING, BY_EXPERTS)
IN_REGIMES = (
    AVERAGE, "task_arithmetic", TA, "ties", TIES, "awd, scale chosen", "iso_c, scale chosen", ADAMERGING, NO_GUARD, BY_EXPERTS,
)  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """One merge of the table. `seen`: the inputs it looks at, empty for none."""

    label: str
    method: str
    settings: dict[str, Any] = field(default_factory=dict)
    chosen: bool = False
    seen: str = ""
    preprocess: tuple[dict[str, Any], ...] = ()


@dataclass
class Judged:
    """What one seed has given so far, by label: [right, all] of each task, % on validation, scales."""

    test: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)

    def add(self, label: str, found: Mapping[str, Share]) -> None:
        self.test[label] = {task: [share.correct, share.total] for task, share in found.items()}

    def shares(self, label: str) -> dict[str, Share]:
        return {task: Share(*pair) for task, pair in self.test[label].items()}

    def save(self, file: Path) -> None:
        staging = file.with_suffix(".new")
        staging.write_text(json.dumps(asdict(self), indent=1))
        staging.replace(file)

    @classmethod
    def load(cls, file: Path) -> Judged:
        return cls(**json.loads(file.read_text())) if file.is_file() else cls()


def entries(recipe: Recipe) -> Iterator[Entry]:
    """Every merge of the table, in its order."""
    yield Entry(AVERAGE, AVERAGE)
    for method in ("task_arithmetic", "ties", "dare", "consensus_ta", "tsv", "iso_c", "wudi", "awd"):
        settings = {"steps": recipe.awd_steps} if method == "awd" else {}
        yield Entry(method, method, settings)
        yield Entry(f"{method}, scale chosen", method, settings, chosen=True)
    first = ({"name": "awd", "steps": recipe.awd_steps},)
    yield Entry("awd + ties", "ties", preprocess=first)
    yield Entry("awd + ties, scale chosen", "ties", chosen=True, preprocess=first)
    if recipe.net == "vit":  # SqueezeNet has no linear layers to solve for
        yield Entry("regmean", "regmean", seen=HELD)
        yield Entry("regmean_plus", "regmean_plus", seen=HELD)
    steps = {"steps": recipe.adapt_steps, "lr": recipe.adapt_lr}
    for method, preprocess in (("adamerging", "none"), ("adamerging++", "ties"), ("awd + adamerging", "awd")):
        for way, granularity in (("task-wise", "task"), ("layer-wise", "tensor")):
            asked = steps | {"granularity": granularity, "preprocess": preprocess}
            yield Entry(f"{method}, {way}", "adamerging", asked, seen=HELD)
            if way == "layer-wise" and preprocess == "none":
                yield Entry(NO_GUARD, "adamerging", asked | {"guard": "none"}, seen=HELD)
                yield Entry(BY_EXPERTS, "adamerging", asked | {"objective": "expert"}, seen=HELD)
            if way == "layer-wise" and preprocess != "awd":
                papers = asked | {"guard": "none", "held_out": 0.0}
                yield Entry(f"{method}, {way}, on test inputs", "adamerging", papers, seen=TEST)


def repairs(recipe: Recipe, merge: str) -> Iterator[tuple[str, str, dict[str, Any], str]]:
    """Label, method, settings and the inputs seen of every repair of a merge."""
    adam = {"steps": recipe.repair_steps}
    for method in ("surgery", "deep"):
        yield method, method, adam, HELD
        yield f"{method}, closed form", method, {"solver": "closed_form"}, HELD
        if merge == TA:
            yield f"{method}, on test inputs", method, adam | {"protocol": "transductive"}, TEST


def table_rows(found: list[Judged], labels: tuple[str, ...]) -> list[dict[str, Any]]:
    scores = {label: [one.shares(label) for one in found] for label in labels}
    return ledger_rows(scores, baselines={BASE, INDIVIDUAL}, against=AVERAGE)


def surgery_rows(found: list[Judged]) -> list[dict[str, Any]]:
    """Each repair beside the merge it repairs."""
    rows = ledger_rows({n: [one.shares(n) for one in found] for n in (BASE, INDIVIDUAL)}, baselines={BASE, INDIVIDUAL})
    for merge in REPAIRED:
        labels = [label for label in found[0].test if label == merge or label.startswith(f"{merge} + ")]
        scores = {label: [one.shares(label) for one in found] for label in labels}
        rows += ledger_rows(scores, baselines={merge}, against=merge)
    return rows


def regime_rows(
    strength: str,
    found: list[Judged],
    geometry: Sequence[Mapping[str, tuple[float, float]]],
    curves: Sequence[Mapping[float, tuple[float, float]]],
    elsewhere: Sequence[Mapping[str, tuple[float, float]]],
) -> list[dict[str, Any]]:
    """One strength: accuracies, the scales chosen, how far the experts went, and task arithmetic over its scale.

    `geometry`, `curves` and `elsewhere` as pools give them.
    """
    rows = table_rows(found, (BASE, INDIVIDUAL, *IN_REGIMES))
    for label in IN_REGIMES:
        if label in found[0].chosen:
            rows.append(number_row(label, AVERAGE, "scale", "1", [one.chosen[label] for one in found]))
    for task in TASKS:
        lengths, cosines = zip(*(of[task] for of in geometry), strict=True)
        rows.append(number_row("experts", task, "length of the change", "%", lengths))
        rows.append(number_row("experts", task, "cosine with the others", "1", cosines))
        for method, values in zip(
            (BASE, "experts of the other tasks"), zip(*(of[task] for of in elsewhere), strict=True), strict=True
        ):
            rows.append(number_row(method, task, "validation accuracy", "%", values))
    for scale in curves[0]:
        for place, (metric, unit) in enumerate((("validation accuracy", "%"), ("entropy", "nats"))):
            rows.append(
                number_row("task_arithmetic", f"scale {scale:g}", metric, unit, [one[scale][place] for one in curves])
            )
    for row in rows:
        row["method"] = f"{strength}: {row['method']}"
        if "paired_difference" in row:
            row["paired_difference"]["against"] = f"{strength}: {AVERAGE}"
    return rows


def number_row(method: str, task: str, metric: str, unit: str, values: Sequence[float]) -> dict[str, Any]:
    one = t_interval(values)
    row = {"method": method, "task": task, "metric": metric, "unit": unit}
    return row | {"mean": one.mean, "low": one.low, "high": one.high, "n": len(values)}
