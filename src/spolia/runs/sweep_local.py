"""Runs of a sweep, some at a time: the loop over a place where they are run, the place that is this machine, and what any
place calls for one run.

A process runs one run and ends with it. On this machine it also ends, after saving, when the process of the sweep is gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from spolia.errors import SpoliaError
from spolia.runs.environment import cores
from spolia.runs.interrupt import gentle_stop

LOGS = "logs"
_FAILED = "\nfailed: "  # in a log, before the reason
_PATIENCE = 10.0  # seconds that a run has to leave once it is to stop at once


@dataclass(frozen=True)
class Job:
    """One run, as any process can start it in the folder `cwd`."""

    recipe: str
    folder: str
    overrides: tuple[str, ...]
    cwd: str

    @property
    def name(self) -> str:
        return Path(self.folder).name


@dataclass(frozen=True)
class Outcome:
    """How a run ended: an unfinished one was interrupted and goes on next time."""

    state: Literal["done", "failed", "unfinished"]
    error: str = ""

    @classmethod
    def of(cls, error: str) -> Outcome:
        return cls("failed", error) if error else cls("done")


class Place(Protocol):
    """Where runs are run. What `start` returns is handed back to the other three."""

    pause: float  # seconds between two looks

    def start(self, job: Job) -> Any: ...

    def outcome(self, going: Any) -> Outcome | None: ...

    def stop(self, going: Any) -> None: ...  # it saves first; asked twice, it stops at once

    def kill(self, going: Any) -> None: ...  # after a stop: waits a little, then ends it

    def close(self) -> None: ...


def run_one(job: Job) -> str:
    """Runs `job` in this process as `spolia run` does; why it failed, or nothing."""
    from spolia.runs import progress, verbs

    os.chdir(job.cwd)
    sys.argv[:] = ["spolia", "run", job.recipe, *job.overrides, "-o", job.folder]  # the command that env.json tells
    try:
        verbs.run(job.recipe, job.folder, overrides=job.overrides, progress=progress.choose())
    except Exception as error:  # of whatever kind: the other runs go on
        traceback.print_exc()
        return str(error) if isinstance(error, SpoliaError) else f"{type(error).__name__}: {error}"
    return ""


def run_all(place: Place, jobs: Sequence[Job], at_once: int, ended: Callable[[Job, Outcome], None]) -> bool:
    """Every job, `at_once` at a time; `ended` hears of each. False where Ctrl-C came: those begun have saved, as runs do."""
    waiting, going = deque(jobs), dict[Job, Any]()
    stopping = asked = False

    def stop() -> None:
        nonlocal stopping
        stopping = True

    try:
        with gentle_stop(stop):
            while going or (waiting and not stopping):
                while waiting and not stopping and len(going) < at_once:
                    job = waiting.popleft()
                    going[job] = place.start(job)
                if stopping and not asked:
                    asked = True
                    for one in going.values():
                        place.stop(one)
                time.sleep(place.pause)
                for job, one in list(going.items()):
                    if (outcome := place.outcome(one)) is not None:
                        del going[job]
                        ended(job, Outcome("unfinished") if stopping and outcome.state == "failed" else outcome)
    finally:  # nobody is left behind where this ends early
        for one in going.values():
            place.stop(one)
        for one in going.values():
            place.kill(one)
    return not stopping


# --- this machine ----------------------------------------------------------------------------------------------------


@dataclass
class Going:
    process: subprocess.Popen[bytes]
    log: Path


class Local:
    """Processes of this machine. What they print goes to logs/NAME.txt beside the runs."""

    pause = 0.05

    def __init__(self, at_once: int):
        self._environment = dict(os.environ)
        if at_once > 1:  # threads of several runs would only wait for each other
            self._environment.setdefault("OMP_NUM_THREADS", str(max(1, cores() // at_once)))

    def start(self, job: Job) -> Going:
        log = Path(job.folder).parent / LOGS / f"{job.name}.txt"
        log.parent.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-P", "-m", "spolia.runs.sweep_local", json.dumps(asdict(job))]
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,  # never written to: it ends with us
                stdout=stream,
                stderr=subprocess.STDOUT,
                cwd=job.cwd,
                env=self._environment,
                start_new_session=True,  # Ctrl-C reaches the sweep alone, which passes it on
            )
        return Going(process, log)

    def outcome(self, going: Going) -> Outcome | None:
        code = going.process.poll()
        if code is None:
            return None
        assert going.process.stdin is not None
        going.process.stdin.close()
        if code == 0:
            return Outcome("done")
        if code == 130:
            return Outcome("unfinished")
        told = going.log.read_text(encoding="utf-8", errors="replace").rpartition(_FAILED)
        reason = told[2].strip() if told[1] else f"ended by signal {-code}" if code < 0 else f"ended with code {code}"
        return Outcome("failed", f"{reason}\nlog: {going.log}")

    def stop(self, going: Going) -> None:
        going.process.send_signal(signal.SIGINT)

    def kill(self, going: Going) -> None:
        try:
            going.process.wait(_PATIENCE)
        except subprocess.TimeoutExpired:
            going.process.kill()
            going.process.wait()

    def close(self) -> None: ...


def main() -> None:
    """One run in this process, of the job in the first argument."""
    job = Job(**json.loads(sys.argv[1]))
    threading.Thread(target=_leave_with_the_sweep, daemon=True).start()
    try:
        error = run_one(Job(job.recipe, job.folder, tuple(job.overrides), job.cwd))
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    if error:
        print(_FAILED + error, flush=True)
        raise SystemExit(1)


def _leave_with_the_sweep() -> None:
    """Waits for the end of stdin, whose other end the sweep holds; then stops the run as Ctrl-C does."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    main()
