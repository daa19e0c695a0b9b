"""How a run begins and ends: its status, its report, its progress, and the first Ctrl-C."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

from spolia.core.journal import Journal
from spolia.runs.interrupt import gentle_stop
from spolia.runs.ranks import message_of
from spolia.runs.store import RunFolder


@contextmanager
def recorded(run: RunFolder, journal: Journal, progress: Any, total: int = 0, *, gentle: bool = True) -> Iterator[None]:
    """Status and report of a run, however it ends; if `gentle`, the first Ctrl-C lets the step at hand finish."""
    from spolia.runs.verbs import report

    before = run.read_json("status.json") or {}

    def end(state: Literal["done", "interrupted", "failed"], message: str = "") -> None:
        if progress is not None:
            progress.finish()
        seconds = Counter(before.get("seconds", {}))
        seconds.update(phase_seconds(journal))  # adds: a run may take several sittings
        memory = max(peak_memory() or 0, before.get("peak_memory_bytes") or 0) or None
        run.set_status(state, message=message, seconds=dict(seconds), peak_memory_bytes=memory)
        if run.leads and run.most_steps is None:
            report(run.path)

    if progress is not None and total:
        progress.start("train and merge", total)
    with gentle_stop(journal.request_stop) if gentle else nullcontext():  # a signal spares what is told at the end
        try:
            yield
        except KeyboardInterrupt as stop:
            end("interrupted", str(stop))
            raise
        except BaseException as error:
            end("failed", message_of(error))
            raise
        end("done")


def phase_seconds(journal: Journal) -> dict[str, float]:
    """The journal's times by what was done: `seed 3 fine-tune upright` counts as `fine-tune`, as in the plan.

    What lies within a phase counts as that phase.
    """
    total: dict[str, float] = {}
    for name, seconds in journal.seconds.items():
        outer, _, inner = name.partition(" / ")
        if not inner:
            kind = outer.split()[2] if outer.startswith("seed ") else outer
            total[kind] = round(total.get(kind, 0.0) + seconds, 3)
    return total


def peak_memory() -> int | None:
    """Most memory this process has held, in bytes; None where the system does not say."""
    try:
        import resource
    except ImportError:
        return None
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else held * 1024


def follow(progress: Any, total: int) -> Callable[[str, int, int, Mapping[str, float]], None] | None:
    """A journal's `progress=` that moves one bar through all its loops; nothing where nothing is left to do."""
    if progress is None or total == 0:
        return None
    counted: dict[str, int] = {}

    def told(phase: str, done: int, _total: int, numbers: Mapping[str, float]) -> None:
        progress.advance(done - counted.get(phase, 0), **numbers)
        counted[phase] = done

    return told
