"""An inspection as the same self-contained page as a run's report. It reads the inspection's JSON form, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spolia.reports.folder import RunRecord
from spolia.reports.html import page


def render(seen: dict[str, Any], env: dict[str, Any]) -> str:
    """The page. `seen` is Inspection.to_dict(), `env` what env.json holds."""
    run = RunRecord(Path(), recipe=seen["recipe"], summary=seen["verdict"], env=env, figures=figures(seen))
    models = [seen["base"] | {"role": "base"}, *(expert | {"role": "expert"} for expert in seen["experts"])]
    count = len(seen["experts"])
    run.status = {"state": "done"}
    run.results = {
        "name": f"{count} expert{'s' * (count != 1)} of {seen['base']['name']}",
        "notes": " ".join(_notes(seen)),
    }
    run.plan = {
        "phases": [
            {
                "name": "inspect",
                "does": f"measures {seen['tensors']} tensors, {seen['elements']:,} elements of each model",
                "data": "weights only: no training data, no inputs, no labels",
            }
        ],
        "inputs": [model | {"tensors": seen["tensors"]} for model in models],
        "warnings": [*(finding["text"] for finding in seen["findings"]), *seen["warnings"]],
    }
    return page(run)


def _notes(seen: dict[str, Any]) -> list[str]:
    lines = [*seen["notes"], f"{seen['left_aside']} tensors were not measured." if seen["left_aside"] else ""]
    for item in seen["vocabularies"]:
        if item["against_base"] not in ("", "same", "no tokenizer"):
            lines.append(f"Tokenizer of {item['model']} against the base: {item['against_base']}.")
    keys = [item["key"] for item in seen["config_differences"]]
    lines.append(f"The configs differ in {', '.join(keys)}." if keys else "")
    return [line for line in lines if line]


def figures(seen: dict[str, Any]) -> list[dict[str, Any]]:
    """Bars an expert, matrices of pairs, lines over the layers; in the form of figures.json."""
    experts = [expert["name"] for expert in seen["experts"]]
    drawn: list[dict[str, Any]] = []
    for key, title, label, factor, unit in (
        ("relative", "How far each expert moved", "task vector over base", 100, "%"),
        ("untouched", "Elements left as they are in the base", "share of elements", 100, "%"),
        ("effective_rank", "Mean effective rank of the changes", "effective rank", 1, ""),
    ):
        values = [_times(expert[key], factor) for expert in seen["experts"]]
        if any(value is not None for value in values):
            series = [{"name": "expert", "values": values}]
            drawn.append(
                {"kind": "bars", "title": title, "y_label": label, "unit": unit, "groups": experts, "series": series}
            )
    if len(experts) > 1:
        for key, title, caption in (
            ("cosines", "Cosines between task vectors", "Near 0: unrelated changes. Near 1: the same."),
            ("conflict", "Share of signs in conflict", "Of elements that both changed; unrelated changes give 0.5."),
        ):
            matrix = {"kind": "matrix", "title": title, "caption": caption, "rows": experts, "columns": experts}
            drawn.append(matrix | {"values": seen[key]})
    return drawn + _over_layers(seen, experts)


def _over_layers(seen: dict[str, Any], experts: list[str]) -> list[dict[str, Any]]:
    layers = [item for item in seen["layers"] if item["layer"].startswith("layer ")]
    if len(layers) < 2:
        return []
    x = [int(item["layer"].split()[1]) for item in layers]
    drawn = []
    for key, title, factor, unit in (
        ("relative", "How far each expert moved, by layer", 100, "%"),
        ("effective_rank", "Mean effective rank, by layer", 1, ""),
    ):
        lines = [(name, [_times(item[key][i], factor) for item in layers]) for i, name in enumerate(experts)]
        drawn.append(_lines(title, x, lines, unit))
    if len(experts) > 1:
        pairs = [
            (name, [item[key] for item in layers]) for name, key in (("cosine", "cosine"), ("conflict", "conflict"))
        ]
        drawn.append(_lines("Mean over pairs of experts, by layer", x, pairs, ""))
    return drawn


def _lines(title: str, x: list[int], lines: list[tuple[str, list[float | None]]], unit: str) -> dict[str, Any]:
    series = [{"name": name, "x": x, "y": y} for name, y in lines]
    return {"kind": "lines", "title": title, "x_label": "layer", "unit": unit, "series": series}


def _times(value: float | None, factor: float) -> float | None:
    return None if value is None else value * factor
