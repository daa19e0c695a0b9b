"""Sweeps as processes: killed, interrupted, as jobs of submitit, as tasks of Ray. What stands is kept, and the rest follows."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.errors import SpoliaError
from spolia.runs.sweep import listed

pytestmark = pytest.mark.slow

# A run of the folder that DIE ends with is killed at its n-th file, as the kernel would kill it.
DIES = """
import os, signal, sys
end, _, number = os.environ.get("DIE", "").partition(" ")
if end and end in sys.argv[-1]:
    true, calls = os.fsync, []
    def fsync(stream):
        calls.append(stream)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
        true(stream)
    os.fsync = fsync
"""
COMMAND = "import sys; from spolia.cli import main; sys.argv[0] = 'spolia'; main()"


@pytest.fixture
def merge(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_model: Callable[..., Path]) -> Path:
    """A recipe that adds a change of ones to a base of zeros, in a moment."""
    monkeypatch.chdir(tmp_path)
    for name, value in (("base", 0.0), ("one", 1.0)):
        write_model(tmp_path / name, {"w": torch.full((4,), value)}, {"model_type": "x"})
    file = tmp_path / "mine.yaml"
    file.write_text("spolia: 1\npool: {base: base, experts: [one]}\nmethod: {name: task_arithmetic}\n")
    return file


def merged(swept: Any) -> list[float]:
    """The scales that were used, as the merged weights show them."""
    return [round(float(read_tensors(swept.folder / run.name / "result")["w"][0]), 4) for run in swept.runs]


def test_a_killed_run_is_kept_and_taken_up_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(DIES)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("spolia: 1\npool: {source: digits, domains: [upright]}\nmethod: {name: task_arithmetic}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "site"))
    monkeypatch.setenv("DIE", "scale=0.5 8")  # recipe, plan, environment, status, and some files of the training
    over, told = {"method.scale": [0.2, 0.5]}, list[str]()
    swept = spolia.sweep(recipe, over, jobs=2, tell=told.append)
    assert [run.state for run in swept.runs] == ["done", "failed"]
    assert "ended by signal 9" in swept.runs[1].error and "signal 9" in told[-1] + told[-2]
    assert (swept.folder / "scale=0.5" / "checkpoints").is_dir()
    assert not (swept.folder / "scale=0.5" / "results.json").exists()
    monkeypatch.delenv("DIE")
    done = (swept.folder / "scale=0.2" / "status.json").stat().st_mtime_ns
    again = spolia.sweep(recipe, over)
    assert [run.state for run in again.runs] == ["done", "done"] and not again.failed
    assert (swept.folder / "scale=0.2" / "status.json").stat().st_mtime_ns == done
    alone = spolia.run(recipe, tmp_path / "alone", overrides=["method.scale=0.5"])
    assert isinstance(alone, Path)
    ours, theirs = (
        json.loads((folder / "results.json").read_text())["rows"] for folder in (swept.folder / "scale=0.5", alone)
    )
    assert ours == theirs
    assert "method.scale=0.5" in json.loads((swept.folder / "scale=0.5" / "env.json").read_text())["command"]


def test_ctrl_c_keeps_everything_and_says_how_to_go_on(merge, tmp_path):
    words = ["sweep", "mine.yaml", "--over", "method.scale=0.1,0.2"]
    begun = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert begun.stdout is not None
    for line in begun.stdout:
        if line.startswith("[1/2]"):
            break
    begun.send_signal(signal.SIGINT)
    _, err = begun.communicate(timeout=120)
    assert begun.returncode == 130
    assert err.rstrip().endswith("spolia sweep mine.yaml --over method.scale=0.1,0.2")
    first, second = (run.state for run in listed("runs/mine-sweep").runs)
    assert first == "done" and second in ("waiting", "unfinished")
    assert merged(spolia.sweep(merge, {"method.scale": [0.1, 0.2]})) == [0.1, 0.2]


def test_runs_end_with_the_process_of_the_sweep(merge, tmp_path):
    """Nobody is left behind who would hold the folder of a run: the command can be given again at once."""
    words = [sys.executable, "-c", COMMAND, "sweep", "mine.yaml", "--over", "method.scale=0.1,0.2"]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as begun:
        while not (tmp_path / "runs" / "mine-sweep" / "logs" / "scale=0.1.txt").exists():
            time.sleep(0.01)
        begun.kill()
    assert merged(_patiently(lambda: spolia.sweep(merge, {"method.scale": [0.1, 0.2]}))) == [0.1, 0.2]


def _patiently(call: Callable[[], Any], seconds: float = 60) -> Any:
    """Again and again until no run is refused because the one before it is still saving."""
    end = time.monotonic() + seconds
    while (found := call()).failed and time.monotonic() < end:
        assert all("writing this folder" in run.error for run in found.failed)
        time.sleep(0.2)
    return found


def test_a_run_that_fails_says_why_and_where_its_log_is(merge, tmp_path):
    def in_the_way(_: str) -> None:  # once everything is checked
        (tmp_path / "out" / "scale=0.2").mkdir(parents=True, exist_ok=True)
        (tmp_path / "out" / "scale=0.2" / "thesis.tex").touch()

    swept = spolia.sweep(merge, {"method.scale": [0.2]}, folder="out", tell=in_the_way)
    (failed,) = swept.failed
    assert "thesis.tex" in failed.error and "thesis.tex" in swept.to_text()
    assert "Traceback" in Path(failed.error.rpartition("log: ")[2]).read_text()


def test_submitit_runs_them_as_jobs(merge):
    pytest.importorskip("submitit")
    with pytest.raises(SpoliaError, match="--on slurm"):
        spolia.sweep(merge, {"method.scale": [0.1]}, on="slurm", resources={"cluster": "local", "mem_gigabytes": 3})
    local = {"cluster": "local", "timeout_min": 10}
    swept = spolia.sweep(merge, {"method.scale": [0.1, 0.2]}, on="slurm", resources=local)
    assert merged(swept) == [0.1, 0.2] and not swept.failed
    assert list((swept.folder / "slurm").glob("*_log.out"))


@pytest.mark.skipif(os.environ.get("SPOLIA_RAY") != "1", reason="starts a Ray cluster: SPOLIA_RAY=1")
def test_ray_takes_up_a_run_whose_worker_was_killed(tmp_path, monkeypatch):
    """Every worker is killed once, in the middle of its run."""
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "mine.yaml"
    recipe.write_text("spolia: 1\npool: {source: digits, domains: [upright]}\nmethod: {name: task_arithmetic}\n")
    killed, ended = dict[str, int](), threading.Event()

    def kill() -> None:
        while not ended.is_set():
            for lock in tmp_path.glob("runs/mine-sweep/*/.lock"):
                if lock.parent.name not in killed and (lock.parent / "checkpoints").is_dir():
                    try:
                        killed[lock.parent.name] = pid = json.loads(lock.read_text())["pid"]
                        os.kill(pid, signal.SIGKILL)
                    except (OSError, ValueError):
                        continue
            time.sleep(0.02)

    threading.Thread(target=kill, daemon=True).start()
    try:
        swept = spolia.sweep(recipe, {"method.scale": [0.2, 0.5]}, on="ray", jobs=1)
    finally:
        ended.set()
    assert killed.keys() == {"scale=0.2", "scale=0.5"}
    assert [run.state for run in swept.runs] == ["done", "done"]
    assert all(run.number is not None for run in swept.runs)
