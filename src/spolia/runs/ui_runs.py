"""Runs under a folder, read lightly for `spolia ui`.

No link is followed, no pipe waited for, no large file read, nothing written. What is missing or odd is empty.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from spolia.runs.compared_runs import RunComparison, compare_runs

MARKS = ("status.json", "results.json", "plan.json")  # a run has one of them; a merged model has spolia.json as well
DEEPEST = 3  # folders below the top: a sweep holds runs of its own
MOST_FOLDERS = 5000  # looked into
MOST_RUNS = 1000  # listed
SMALL = 2_000_000  # bytes of a file that is read whole
TAIL = 100_000  # bytes of metrics.jsonl, from its end
LARGEST_REPORT = 10_000_000  # bytes; a report is smaller than 3 MB


@dataclass(frozen=True)
class Run:
    """One run. `id` is its path below the top, with `/`; the top itself is `.`."""

    id: str
    path: Path
    status: dict[str, Any]
    plan: dict[str, Any]
    results: dict[str, Any]
    gone: bool  # it says that it runs, and its process is no longer there
    has_report: bool


def runs_under(top: Path) -> list[Run]:
    """Every run at most DEEPEST folders below `top`, or `top` itself; the latest first."""
    found = [_opened(id, path) for id, path in _folders(top)]
    return sorted(found, key=lambda run: str(run.status.get("started") or ""), reverse=True)


def run_at(top: Path, id: str) -> Run | None:
    """The run called `id`, None where there is none. Only plain names lead down from `top`, and no link."""
    parts = [] if id == "." else id.split("/")
    if len(parts) > DEEPEST or any(not p or p.startswith(".") or "\\" in p or "\0" in p for p in parts):
        return None
    path = top
    for part in parts:
        path /= part
        if not _is(path, stat.S_ISDIR):
            return None
    return _opened(id, path) if any(_is(path / mark, stat.S_ISREG) for mark in MARKS) else None


def text(run: Run, name: str) -> str:
    """A small text file of the run."""
    return read(run.path / name).decode("utf-8", "replace")


def read(file: Path, most: int = SMALL) -> bytes:
    """A regular file of at most `most` bytes; empty for anything else."""
    return _end(file, most, whole=True)


def last_lines(run: Run) -> list[dict[str, Any]]:
    """What stands at the end of metrics.jsonl. A line that is still being written is left out."""
    raw = _end(run.path / "metrics.jsonl", TAIL)
    lines = raw.split(b"\n")[:-1]
    if len(raw) == TAIL:
        lines = lines[1:]  # cut
    return [value for line in lines if isinstance(value := _value(line), dict)]


def compared(runs: list[Run], top: Path) -> RunComparison:
    """The runs side by side, called by their ids. SpoliaError where they do not compare; ValueError where a file that
    the comparison reads is no small regular file of theirs.
    """
    for run in runs:
        kept = run.path / "checkpoints"
        files = [run.path / "recipe.yaml", run.path / "results.json"]
        if os.path.lexists(kept):
            if not _is(kept, stat.S_ISDIR):
                raise ValueError(f"{run.id}/checkpoints is no folder")
            files += [Path(entry.path) for entry in os.scandir(kept) if entry.name.startswith("scores-")]
        for file in files:
            if os.path.lexists(file) and not read(file):
                raise ValueError(f"{file.relative_to(top)} is a link, empty or too large")
        seeds = run.results.get("seeds") or []
        if not isinstance(seeds, list) or not all(type(seed) is int for seed in seeds):
            raise ValueError(f"the seeds in {run.id}/results.json are no numbers")
    found = compare_runs([run.path for run in runs])
    found.runs = [run.id for run in runs]
    return found


# --- reading ---------------------------------------------------------------------------------------------------------


def _folders(top: Path) -> Iterator[tuple[str, Path]]:
    """(id, path) of every run. Within a run no other is looked for."""
    looked, listed, waiting = 0, 0, [("", top, 0)]
    while waiting and looked < MOST_FOLDERS and listed < MOST_RUNS:
        id, path, depth = waiting.pop()
        looked += 1
        try:
            with os.scandir(path) as entries:
                inside = list(entries)
        except OSError:
            continue
        if any(entry.name in MARKS and entry.is_file(follow_symlinks=False) for entry in inside):
            listed += 1
            yield id or ".", path
        elif depth < DEEPEST:
            names = sorted(e.name for e in inside if e.is_dir(follow_symlinks=False) and not e.name.startswith("."))
            waiting += [(f"{id}/{name}" if id else name, path / name, depth + 1) for name in reversed(names)]


def _opened(id: str, path: Path) -> Run:
    status, plan, results = (_mapping(path / name) for name in ("status.json", "plan.json", "results.json"))
    gone = status.get("state") == "running" and _left(path / ".lock")
    return Run(id, path, status, plan, results, gone, _is(path / "report.html", stat.S_ISREG))


def _mapping(file: Path) -> dict[str, Any]:
    try:
        seen = file.lstat()
    except (OSError, ValueError):
        return {}
    return _parsed(file, seen.st_mtime_ns, seen.st_size, seen.st_ino) if stat.S_ISREG(seen.st_mode) else {}


@lru_cache(maxsize=4 * MOST_RUNS)
def _parsed(file: Path, *_seen: int) -> dict[str, Any]:
    """The JSON mapping in `file`; read again when time, size or inode are others."""
    value = _value(read(file))
    return value if isinstance(value, dict) else {}


def _value(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except (ValueError, RecursionError):
        return None


def _end(file: Path, most: int, whole: bool = False) -> bytes:
    """The last `most` bytes of a regular file; empty for anything else, and where `whole` for a larger one."""
    if not _is(file, stat.S_ISREG):  # first: to open a device may act on it
        return b""
    try:
        with open(os.open(file, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC), "rb") as stream:
            seen = os.fstat(stream.fileno())
            if not stat.S_ISREG(seen.st_mode) or (whole and seen.st_size > most):
                return b""
            stream.seek(max(0, seen.st_size - most))
            return stream.read(most)
    except OSError:
        return b""


def _is(path: Path, kind: Any) -> bool:
    """Whether `path` itself, no link to it, is of the kind."""
    try:
        return kind(path.lstat().st_mode)
    except (OSError, ValueError):
        return False


def _left(lock: Path) -> bool:
    """Whether who held `lock` is gone, as far as this machine can tell. The file is read, never locked."""
    owner = _value(read(lock))
    if not isinstance(owner, dict):
        return not os.path.lexists(lock)
    number = owner.get("pid")
    if owner.get("host") != socket.gethostname() or type(number) is not int or number < 1:
        return False
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except (OSError, OverflowError):
        pass
    return False
