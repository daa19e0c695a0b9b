"""Runs of a sweep on other machines: as tasks of a Ray cluster, or as jobs of Slurm through submitit."""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.runs import yamlmarks
from spolia.runs.environment import installed
from spolia.runs.sweep_grid import as_yaml
from spolia.runs.sweep_local import Job, Outcome, run_one

RETRIES = 3  # of a run whose worker was killed
_RAY_OPTIONS = ("num_cpus", "num_gpus", "memory", "accelerator_type", "resources")
_MINUTES = 240  # of a Slurm job; one that needs longer is put in the queue again and goes on
_PATIENCE = 10.0  # seconds that a job has to leave once it is to stop at once
_EXTRAS = {"ray": ("ray", "ray"), "slurm": ("submitit", "slurm")}


def check_installed(on: str, problems: Problems) -> None:
    """A problem where the package that `on` needs is missing."""
    package, extra = _EXTRAS[on]
    if installed(package) is None:
        problems.add(f"--on {on}", f"{package} is not installed", f"pip install 'spolia[{extra}]'")


def options_of(given: Mapping[str, Any] | Sequence[str], on: str, problems: Problems) -> dict[str, Any]:
    """What a run gets: a mapping, or `--resources KEY=VALUE` texts with values in YAML."""
    found: dict[str, Any] = {}
    for text in [f"{key}={as_yaml(value)}" for key, value in given.items()] if isinstance(given, Mapping) else given:
        key, equals, value = text.partition("=")
        if equals and key.strip():
            found[key.strip()] = yamlmarks.load(value, f"--resources {key}").value
        else:
            mend = "write KEY=VALUE, such as slurm_partition=gpu or num_cpus=4"
            problems.add("--resources", f"`{text}` is not of the form KEY=VALUE", mend)
    if found and on == "local":
        problems.add("--resources", "a run on this machine takes what there is", "add --on ray or --on slurm")
    for name in found if on == "ray" else ():
        if name not in _RAY_OPTIONS:
            problems.add("--resources", f"Ray has no `{name}` for a run", did_you_mean(name, _RAY_OPTIONS))
    return found


# --- Ray -------------------------------------------------------------------------------------------------------------


@dataclass
class Task:
    job: Job
    ref: Any
    tries: int = 1


class Ray:
    """The cluster that RAY_ADDRESS names or that runs here, else a new one of this machine alone.

    A run whose worker was killed, with its node or without, is taken up again by another, RETRIES times.
    """

    pause = 0.2

    def __init__(self, options: Mapping[str, Any]):
        import ray  # type: ignore[import-not-found]

        self._ray, self._ours = ray, not ray.is_initialized()
        if self._ours:
            try:
                ray.init(log_to_driver=False, logging_level=logging.ERROR)
            except Exception as error:  # Ray's own kind for a node that is slow to start
                mend = "start a cluster first (ray start --head); the command finds it"
                raise SpoliaError(f"no cluster: {error}", where="--on ray", mend=mend) from None
        # A worker ends with its run; what is tried again is for `outcome` to say, which frees the folder first.
        self._run = ray.remote(max_calls=1, max_retries=0, **options)(run_one)

    def start(self, job: Job) -> Task:
        return Task(job, self._run.remote(job))

    def outcome(self, going: Task) -> Outcome | None:
        errors = self._ray.exceptions
        ready, _ = self._ray.wait([going.ref], timeout=0)
        if not ready:
            return None
        try:
            return Outcome.of(self._ray.get(going.ref))
        except errors.TaskCancelledError:
            return Outcome("unfinished")
        except errors.RayTaskError as error:
            return Outcome("failed", str(error).strip().rpartition("\n")[2])
        except errors.RayError as crash:  # the worker, its node or their memory
            if going.tries > RETRIES:
                return Outcome("failed", f"its worker was lost {going.tries} times: {type(crash).__name__}")
        _free(Path(going.job.folder))
        going.ref, going.tries = self._run.remote(going.job), going.tries + 1
        return None

    def stop(self, going: Task) -> None:
        self._ray.cancel(going.ref)

    def kill(self, going: Task) -> None:
        self._ray.wait([going.ref], timeout=_PATIENCE)
        self._ray.cancel(going.ref, force=True)

    def close(self) -> None:
        if self._ours:
            self._ray.shutdown()


def _free(folder: Path) -> None:
    """Takes away the lock of a process that Ray says is gone: of another machine nobody else could know."""
    (folder / ".lock").unlink(missing_ok=True)


# --- Slurm -----------------------------------------------------------------------------------------------------------


class Resumed:
    """What a Slurm job calls. Short of time, it is put in the queue again and goes on where it stopped."""

    def __call__(self, job: Job) -> str:
        return run_one(job)

    def checkpoint(self, job: Job) -> Any:
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(Resumed(), job)


class Slurm:
    """Jobs of submitit; `cluster: local` runs them as processes of this machine instead.

    Other `options` are those of its executor, such as slurm_partition, timeout_min, gpus_per_node, cpus_per_task, mem_gb.
    """

    pause = 0.2

    def __init__(self, folder: Path, options: Mapping[str, Any]):
        import submitit

        more = {"name": "spolia", "timeout_min": _MINUTES, **options}
        cluster = str(more.pop("cluster", "slurm"))
        try:
            self._executor = submitit.AutoExecutor(folder=folder / "slurm", cluster=cluster)
            self._executor.update_parameters(**more)
        except (RuntimeError, ValueError, TypeError, NameError) as error:
            mend = "start it where sbatch is, or try it on this machine: --resources cluster=local"
            raise SpoliaError(str(error).strip(), where="--on slurm", mend=mend) from None

    def start(self, job: Job) -> Any:
        return self._executor.submit(Resumed(), job)

    def outcome(self, going: Any) -> Outcome | None:
        if not going.done():
            return None
        failure = going.exception()
        if failure is None:
            return Outcome.of(going.result())
        last = str(failure).strip().rpartition("\n")[2]
        return Outcome("failed", f"{type(failure).__name__}: {last}\nlog: {going.paths.stderr}")

    def stop(self, going: Any) -> None:
        going.cancel(check=False)  # it may have ended meanwhile

    def kill(self, going: Any) -> None:
        end = time.monotonic() + _PATIENCE
        while not going.done() and time.monotonic() < end:
            time.sleep(self.pause)

    def close(self) -> None: ...
