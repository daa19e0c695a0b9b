"""A small run folder with everything in it, as `spolia run` leaves it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TASKS = ("upright", "turned")
MEANS = {
    "base": (40.0, 20.0),
    "expert upright": (97.0, 15.0),
    "average": (60.0, 50.0),
    "ties": (80.0, 70.0),
    "dare": (75.0, 72.0),
}
BASELINES = ("base", "expert upright")


def _row(method: str, task: str, mean: float) -> dict[str, Any]:
    row = {
        "method": method,
        "task": task,
        "metric": "accuracy",
        "unit": "%",
        "mean": mean,
        "low": mean - 1,
        "high": mean + 2,
        "n": 3,
    }
    if method in BASELINES:
        row["baseline"] = True
    if method in ("ties", "dare"):
        row["paired_difference"] = {"against": "average", "mean": mean - 55, "low": mean - 56, "high": mean - 54}
    return row


def whole_ledger() -> dict[str, Any]:
    """Methods before baselines on purpose: the table has to order them."""
    order = ("ties", "base", "average", "dare", "expert upright")
    rows = [_row(m, t, MEANS[m][i]) for m in order for i, t in enumerate(TASKS)]
    rows += [_row(m, "average", sum(MEANS[m]) / 2) for m in order]
    return {
        "name": "Two experts",
        "command": "spolia run merge/ties-tiny",
        "commit": "abc",
        "date": "2026-11-21",
        "data": {"train experts": "1,078 labelled digits", "merge": "no data; weights only"},
        "seeds": [0, 1, 2],
        "rows": rows,
        "notes": "One small network.",
    }


@pytest.fixture
def ledger() -> dict[str, Any]:
    return whole_ledger()


FIGURES = [
    {"kind": "matrix", "title": "Cosines", "rows": ["a", "b"], "columns": ["a", "b"], "values": [[1, -0.2], [-0.2, 1]]},
    {
        "kind": "lines",
        "title": "Against density",
        "caption": "Band: interval.",
        "x_label": "density",
        "y_label": "accuracy",
        "unit": "%",
        "series": [
            {"name": "ties", "x": [0.1, 0.2, 0.4], "y": [60, 70, 65], "low": [59, 69, 64], "high": [61, 71, 66]}
        ],
    },
    {"kind": "bars", "title": "Signs", "groups": ["l1", "l2"], "series": [{"name": "kept", "values": [1, 2]}]},
]


def write_run(folder: Path, ledger: dict[str, Any], parts: dict[str, Any]) -> Path:
    (folder / "result").mkdir(parents=True, exist_ok=True)
    (folder / "result" / "model.safetensors").write_bytes(b"0" * 2048)
    steps = [{"time": s / 10, "phase": "train", "step": s, "loss": 1 / (s + 1)} for s in range(20)]
    contents: dict[str, Any] = {
        "recipe.yaml": "spolia: 1\nmethod: {name: ties}\n",
        "summary.txt": "Ties keeps most of both experts.\n",
        "plan.json": {
            "title": "ties merge of 2 experts",
            "method": "ties",
            "phases": [
                {"name": "merge", "does": "elects signs", "data": "none", "trained": "nothing", "frozen": "all"}
            ],
            "inputs": [{"name": "math", "path": "math", "role": "expert", "tensors": 6, "bytes": 4096, "dtypes": {}}],
            "dtypes": {"bfloat16": 6},
            "peak_memory_bytes": 3 * 2**20,
            "warnings": ["two tensors differ little"],
        },
        "env.json": {
            "versions": {"python": "3.11.9", "torch": "2.13.0"},
            "machine": {"cpu": "some cpu", "cores": 2},
            "git": {"commit": "0123456789abcdef", "dirty": False},
            "seeds": [0, 1, 2],
            "command": "spolia run merge/ties-tiny --seeds 3",
        },
        "status.json": {
            "state": "done",
            "phase": "evaluate",
            "started": "2026-11-21T10:00:00",
            "finished": "2026-11-21T10:01:00",
            "seconds": {"train experts": 30.0, "merge": 10.0},
            "peak_memory_bytes": 5 * 2**20,
        },
        "metrics.jsonl": "".join(json.dumps(step) + "\n" for step in steps),
        "results.json": ledger,
        "figures.json": FIGURES,
    }
    for key, value in parts.items():
        contents[
            {"metrics": "metrics.jsonl", "recipe": "recipe.yaml", "summary": "summary.txt"}.get(key, key + ".json")
        ] = value
    for name, content in contents.items():
        if content is not None:
            (folder / name).write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


@pytest.fixture
def make_run(tmp_path: Path, ledger: dict[str, Any]) -> Callable[..., Path]:
    """make_run(part=content, ...) writes a run folder; a part given as None is missing, text is written as it is."""
    return lambda **parts: write_run(tmp_path / "run", ledger, parts)


@pytest.fixture(scope="session")
def sound_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with every part. Not to be changed."""
    return write_run(tmp_path_factory.mktemp("sound") / "run", whole_ledger(), {})
