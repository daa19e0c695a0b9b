"""A run folder, read as it is found: finished, interrupted or still being written.

What is missing is empty; what cannot be read is empty and named in `gaps`. Nothing in it is executed or changed.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from spolia.errors import SpoliaError
from spolia.reports import words

PARTS = ("recipe.yaml", "plan.json", "env.json", "status.json", "metrics.jsonl", "results.json", "figures.json")
_STATES = {"done": "finished", "running": "running", "interrupted": "interrupted", "failed": "failed"}


@dataclass
class RunRecord:
    """What a run folder says. `files` are (path inside the folder, bytes), without the report itself."""

    path: Path
    recipe: str = ""
    summary: str = ""
    plan: dict[str, Any] = field(default_factory=dict)
    env: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    results: dict[str, Any] = field(default_factory=dict)
    metrics: list[dict[str, Any]] = field(default_factory=list)
    figures: list[Any] = field(default_factory=list)
    files: list[tuple[str, int]] = field(default_factory=list)
    gaps: list[str] = field(default_factory=list)

    @property
    def state(self) -> str:
        """finished, running, interrupted, failed, or unknown."""
        return _STATES.get(str(self.status.get("state")), "unknown")


def read_run(folder: Path | str) -> RunRecord:
    """Everything a report needs from `folder`. A path that is no run folder is a SpoliaError."""
    path = Path(folder)
    if not path.is_dir():
        raise SpoliaError(
            "there is no such folder", where=str(path), mend="name a folder that `spolia run` has written"
        )
    if (path / "spolia.json").is_file() and not any((path / part).is_file() for part in PARTS if part != "recipe.yaml"):
        card = path / "README.md"
        mend = f"its card is {card}" if card.is_file() else "a card is written when `spolia merge` makes the folder"
        raise SpoliaError("is a merged model, no run: there are no results in it", where=str(path), mend=mend)
    if not any((path / part).is_file() for part in PARTS):
        mend = f"a run folder holds at least one of {', '.join(PARTS)}"
        raise SpoliaError("this is not a run folder", where=str(path), mend=mend)
    run = RunRecord(path)
    run.recipe = _text(run, "recipe.yaml")
    run.summary = words.name(_text(run, "summary.txt"), 600)
    run.plan = _json(run, "plan.json", dict)
    run.env = _json(run, "env.json", dict)
    run.status = _json(run, "status.json", dict)
    run.results = _json(run, "results.json", dict)
    run.figures = _json(run, "figures.json", list)
    run.metrics = _lines(run, "metrics.jsonl")
    run.files = _files(path)
    return run


def rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """The ledger's rows that name a method, a task and a metric."""
    found = results.get("rows") if isinstance(results, dict) else None
    keys = ("method", "task", "metric")
    return [r for r in found if isinstance(r, dict) and all(r.get(k) for k in keys)] if isinstance(found, list) else []


def _text(run: RunRecord, part: str) -> str:
    try:
        return (run.path / part).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""
    except OSError as error:
        run.gaps.append(f"{part} cannot be read: {error.strerror or error}")
        return ""


def _json(run: RunRecord, part: str, kind: type) -> Any:
    source = _text(run, part)
    if not source.strip():
        return kind()
    try:
        value = json.loads(source)
    except (ValueError, RecursionError):
        run.gaps.append(f"{part} is not valid JSON, perhaps half-written; it was left out")
        return kind()
    if not isinstance(value, kind):
        run.gaps.append(f"{part} does not hold {'a list' if kind is list else 'a mapping'}; it was left out")
        return kind()
    return value


def _lines(run: RunRecord, part: str) -> list[dict[str, Any]]:
    lines, bad = _text(run, part).split("\n"), []
    found = []
    for i, line in enumerate(lines):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if isinstance(value, dict):
            found.append(value)
        else:
            bad.append(i)
    if bad == [len(lines) - 1]:  # no newline after it: the writer was stopped in the middle
        run.gaps.append(f"the last line of {part} is half-written; it was left out")
    elif bad:
        run.gaps.append(f"{len(bad)} of the lines of {part} cannot be read; they were left out")
    return found


def _files(path: Path) -> list[tuple[str, int]]:
    found = []
    for here, folders, names in os.walk(path):
        folders.sort()
        for file in names:
            full = Path(here) / file
            relative = full.relative_to(path).as_posix()
            if relative == "report.html" or file.endswith(".tmp"):
                continue
            try:
                found.append((words.name(relative, 300), full.lstat().st_size))
            except OSError:  # gone between listing and looking: the run may still be writing
                continue
    return sorted(found)
