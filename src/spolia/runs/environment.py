"""The machine, the versions and the git state of a run. Nothing here imports torch or touches the network."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import spolia

PACKAGES = ("torch", "numpy", "safetensors", "pydantic", "transformers", "scikit-learn")


def environment(*, seed: int, seeds: list[int], command: str = "", device: str = "cpu") -> dict[str, Any]:
    """What env.json holds."""
    return {
        "versions": versions(),
        "machine": machine(device),
        "git": git_state(),
        "seed": seed,
        "seeds": seeds,
        "command": command or command_line(),
    }


def versions() -> dict[str, str]:
    """Versions of Python, spolia and the packages that can change a number; those not installed are left out."""
    found = {name: installed(name) for name in PACKAGES}
    return {"python": platform.python_version(), "spolia": spolia.__version__} | {k: v for k, v in found.items() if v}


def installed(package: str) -> str | None:
    """The version of an installed package, with its local part (`2.13.0+cpu`), else None."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def machine(device: str = "cpu") -> dict[str, Any]:
    memory = memory_bytes()
    return {
        "cpu": _cpu_name(),
        "cores": cores(),
        "memory_gib": round(memory / 2**30, 1) if memory else None,
        "device": device,
        "system": platform.platform(),
    }


def cores() -> int:
    """Cores this process may use, which in a container or a job is less than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Memory this process may use: the machine's, or its control group's limit where that is less."""
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
    for limit in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            total = min(total, int(Path(limit).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return total


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it, of the repository around the current folder; None outside one."""
    commit = _git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": bool(_git("status", "--porcelain"))} if commit else None


def command_line() -> str:
    """The command to type again: `spolia run …`, or `python …` for a script."""
    program = Path(sys.argv[0]).name
    if program in ("spolia", "spolia.exe") or Path(sys.argv[0]).parts[-2:] == ("spolia", "__main__.py"):
        return shlex.join(["spolia", *sys.argv[1:]])
    return shlex.join(["python", *sys.argv]) if program not in ("", "-c") else "python"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=5, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return named or platform.processor() or platform.machine()
