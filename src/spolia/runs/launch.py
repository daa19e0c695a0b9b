"""`--nproc`: one run by several processes of this machine, started and watched by torch's own launcher."""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

from spolia.core.dist import error_in
from spolia.core.lazy import torch
from spolia.core.stream import cores
from spolia.errors import SpoliaError
from spolia.runs.engine import plan_recipe
from spolia.runs.interrupt import gentle_stop
from spolia.runs.progress import JsonProgress
from spolia.runs.ranks import check_shares, unpacked
from spolia.runs.recipe import Recipe
from spolia.runs.store import RunFolder
from spolia.runs.studies import StudyRecipe

_HANDLED = tuple(getattr(signal, n) for n in ("SIGINT", "SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, n))


def launched(
    nproc: int,
    recipe: Recipe | StudyRecipe,
    folder: RunFolder,
    given: Any,
    overrides: Sequence[str],
    fresh: bool,
    progress: Any,
) -> None:
    """The run by `nproc` processes, each of which reads `given`, the recipe's name or file, after the checks that need none."""
    if not isinstance(given, str | os.PathLike):
        mend = "give its name or file, and what differs as `overrides`"
        raise SpoliaError("other processes read the recipe themselves", where="nproc", mend=mend)
    check_shares(recipe, nproc)
    plan_recipe(recipe, folder)
    shown = None if progress is None else "json" if isinstance(progress, JsonProgress) else "lines"
    job = {"recipe": str(given), "folder": str(folder.path), "overrides": list(overrides), "fresh": fresh}
    launch(nproc, job | {"progress": shown})


def launch(nproc: int, job: Mapping[str, Any]) -> None:
    """Runs `job` (see worker.py) in `nproc` processes; when one ends in an error all do, and the error is raised here.

    The first Ctrl-C lets them finish their step and save, the second stops them at once.
    """
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, start_processes

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says is said below
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    more = {"command": sys.argv, "parent": os.getpid()}  # the run says by which command it was made
    arguments = ("-m", "spolia.runs.worker", json.dumps({**job, **more}))
    with TemporaryDirectory(prefix="spolia-") as place, _handlers_kept():
        context = start_processes(
            "spolia",
            sys.executable,
            dict.fromkeys(range(nproc), arguments),
            {rank: _place(rank, nproc, store.port) for rank in range(nproc)},
            DefaultLogsSpecs(log_dir=place),
        )

        def interrupt() -> None:
            for pid in context.pids().values():
                try:
                    os.kill(pid, signal.SIGINT)  # they have sessions of their own: the terminal's does not reach them
                except ProcessLookupError:
                    continue

        try:
            with gentle_stop(interrupt, say=False):
                ended = None
                while ended is None:
                    ended = context.wait(timeout=3600, period=0.1)
        finally:
            context.close(signal.SIGKILL)
        if ended.failures:
            raise _error(ended.failures, error_in(store), nproc)


def _place(rank: int, nproc: int, port: int) -> dict[str, str]:
    """What torchrun would set."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": nproc, "LOCAL_WORLD_SIZE": nproc}
    found = {name: str(number) for name, number in place.items()}
    found |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    if "OMP_NUM_THREADS" not in os.environ:
        found["OMP_NUM_THREADS"] = str(max(1, cores() // nproc))
    return found


def _error(failures: dict[int, Any], told: str, nproc: int) -> BaseException:
    """What is raised for processes that ended so. Who ended first counts: the launcher ends the others."""
    start = min(failure.timestamp for failure in failures.values())
    first = {rank: failure.exitcode for rank, failure in failures.items() if failure.timestamp == start}
    for rank, code in first.items():
        if code < 0 and -code not in (signal.SIGTERM, signal.SIGINT):
            mend = "if memory ran out, take fewer processes or smaller batches; the same command goes on"
            return SpoliaError(f"process {rank} of {nproc} was ended by signal {-code}", where="--nproc", mend=mend)
    if told:
        return unpacked(told)
    if {130, -signal.SIGINT} & set(first.values()):
        return KeyboardInterrupt()
    rank, code = min(first.items())
    return RuntimeError(f"process {rank} of {nproc} ended with code {code}; what it said stands above")


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """The launcher sets handlers of its own, which would outlive it."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _HANDLED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
