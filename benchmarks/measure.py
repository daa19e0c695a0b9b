"""Whole processes, measured: wall seconds, CPU seconds and peak memory of one child, and the ledger they are kept in.

Standard library only. Between fork and exec a child counts its parent's resident pages as its own peak, so the
measuring process must stay small: whatever needs numpy or torch runs as a child too.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
_EARLIER = "commit of rows measured before"


@dataclass(frozen=True)
class Usage:
    """What one process took. `cpu` is user + system seconds, `peak` resident memory in bytes."""

    wall: float
    cpu: float
    peak: int


def process(command: list[str], log: Path) -> Usage:
    """Run `command` to its end, its output into `log`. A failing command ends the benchmark with the log's tail."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    os.sync()  # the previous run's pages must not be written back at this run's cost
    with log.open("wb") as sink:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=sink, stderr=subprocess.STDOUT, env=environment, cwd=log.parent)
        _, status, usage = os.wait4(child.pid, 0)
        wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)  # reaped above; Popen must not wait again
    if child.returncode:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise SystemExit(f"exit code {child.returncode}: {' '.join(command)}\n{tail}")
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss: bytes on macOS, KiB on Linux
    return Usage(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def ask(command: list[str]) -> str:
    """What a small helper process prints; its errors are shown as they are."""
    answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if answer.returncode:
        raise SystemExit(f"exit code {answer.returncode}: {' '.join(command)}")
    return answer.stdout


def versions(python: str, packages: list[str]) -> dict[str, str]:
    """Versions of the packages that are installed beside the interpreter `python`."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "found = {'python': platform.python_version()}\n"
        "for name in sys.argv[1:]:\n"
        "    try: found[name] = m.version(name)\n"
        "    except m.PackageNotFoundError: pass\n"
        "print(json.dumps(found))"
    )
    return json.loads(ask([python, "-c", code, *packages]))


def machine() -> dict[str, object]:
    """The machine in the words of the results ledger."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    return {
        "cpu": names[0] if names else platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "device": "cpu",
        "system": f"{platform.system()} {platform.release()}",
    }


def commit() -> str | None:
    """The commit measured, with `+` when the working tree differs from it; None outside a git checkout."""
    git = ["git", "-C", str(REPOSITORY)]
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    if head.returncode:
        return None
    dirty = subprocess.run([*git, "status", "--porcelain"], capture_output=True, text=True, check=False).stdout
    return head.stdout.strip() + ("+" if dirty.strip() else "")


def row(method: str, task: str, metric: str, unit: str, values: list[float], **more: object) -> dict[str, object]:
    """A row of the ledger over repeats: `mean` is the median, `low` and `high` the extremes."""
    numbers = {"mean": statistics.median(values), "low": min(values), "high": max(values)}
    rounded = {name: float(f"{value:.4g}") for name, value in numbers.items()}
    return {"method": method, "task": task, "metric": metric, "unit": unit, **rounded, "n": len(values), **more}


def in_turn(sides: dict[str, Callable[[], Usage]], repeats: int, slow: float = float("inf")) -> dict[str, list[Usage]]:
    """A B C, A B C, …: a slow minute of the machine falls on every side. One turn if a run takes over `slow` seconds."""
    runs: dict[str, list[Usage]] = {side: [] for side in sides}
    for _ in range(repeats):
        for side, run in sides.items():
            runs[side].append(run())
        if max(used[0].wall for used in runs.values()) > slow:
            break
    return runs


def usage_rows(task: str, runs: dict[str, list[Usage]], ours: str, peer: str) -> list[dict[str, object]]:
    """Rows for each side's seconds and memory, and for the ratios peer / ours: of medians, extremes of single turns."""
    rows = []
    for side, used in runs.items():
        mark = {} if side == ours else {"baseline": True}
        rows.append(row(side, task, "wall time", "s", [u.wall for u in used], **mark))
        rows.append(row(side, task, "CPU time", "s", [u.cpu for u in used], **mark))
        rows.append(row(side, task, "peak memory", "MB", [u.peak / 1e6 for u in used], **mark))
    if {ours, peer} <= set(runs):
        turns = list(zip(runs[peer], runs[ours], strict=True))
        for metric, field in (("times faster", "wall"), ("times less CPU", "cpu"), ("times less memory", "peak")):
            ratios = [getattr(a, field) / getattr(b, field) for a, b in turns]
            of_medians = median(runs, peer, field) / median(runs, ours, field)
            rows.append({**row(ours, task, metric, "1", ratios), "mean": float(f"{of_medians:.4g}")})
    return rows


def median(runs: dict[str, list[Usage]], side: str, field: str) -> float:
    """Median of one field over a side's runs; nan for a side that was not run, so that what follows from it is nan."""
    return statistics.median(getattr(u, field) for u in runs[side]) if side in runs else float("nan")


def cell(runs: dict[str, list[Usage]], side: str) -> str:
    """A side's medians: wall seconds (CPU seconds), peak."""
    if side not in runs:
        return "–"
    wall, cpu, peak = (median(runs, side, field) for field in ("wall", "cpu", "peak"))
    return f"{wall:.2f} s ({cpu:.1f}), {peak / 1e6:.0f} MB"


def print_table(table: list[list[str]]) -> None:
    """Columns of equal width; the first line is the heading."""
    widths = [max(len(line[i]) for line in table) for i in range(len(table[0]))]
    print()
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


@dataclass(frozen=True)
class Ledger:
    """A file of docs/results that is written after each task, so that a run of some tasks keeps the others' rows.

    Rows that an earlier commit or day has left are named under `versions`. Rows of another machine, or beside other
    versions, are dropped; `require_one_machine` ends a run that would do so without measuring them again.
    """

    path: Path
    command: str
    tasks: list[str]  # every task of the file, in order
    versions: dict[str, dict[str, str]]
    data: dict[str, str]
    seeds: list[int]
    notes: str

    def require_one_machine(self, asked: list[str]) -> None:
        old = self._read()
        left = {row["task"] for row in old.get("rows", [])} & set(self.tasks) - set(asked)
        if left and not self._comparable(old):
            what = f"{self.path} comes from another machine or other versions: measure all its rows, or give --json"
            raise SystemExit(what)

    def add(self, rows: list[dict[str, object]]) -> None:
        """Put `rows` in the place of those of the same tasks."""
        old, measured = self._read(), {row["task"] for row in rows}
        old = old if self._comparable(old) else {}
        kept = [row for row in old.get("rows", []) if row["task"] in self.tasks and row["task"] not in measured]
        now = {"commit": commit(), "date": datetime.date.today().isoformat()}
        before = old.get("versions", {}).get(_EARLIER, {})
        if old and any(old[key] != value for key, value in now.items()):
            before = {row["task"]: f"{old['commit']}, {old['date']}" for row in kept} | before
        earlier = {row["task"]: before[row["task"]] for row in kept if row["task"] in before}
        ledger = {
            "name": self.path.stem,
            "average": False,
            "command": self.command,
            **now,
            "machine": machine(),
            "versions": self.versions | ({_EARLIER: earlier} if earlier else {}),
            "data": self.data,
            "seeds": self.seeds,
            "notes": self.notes,
            "rows": sorted([*kept, *rows], key=lambda row: self.tasks.index(row["task"])),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(ledger, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def _comparable(self, old: dict[str, Any]) -> bool:
        """Whether its rows may stand beside new ones; spolia's own version may differ, as its commit may."""

        def others(versions: dict[str, dict[str, str]]) -> dict[str, dict[str, str]]:
            return {
                side: {name: version for name, version in used.items() if name != "spolia"}
                for side, used in versions.items()
                if side != _EARLIER
            }

        return bool(old) and old["machine"] == machine() and others(old["versions"]) == others(self.versions)
