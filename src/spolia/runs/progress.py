"""How far a run is: a bar on a terminal, a line every ten seconds elsewhere, JSON lines for programs. All on stderr."""

from __future__ import annotations

import json
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, Protocol

EVERY = 10.0  # seconds between plain lines


class Progress(Protocol):
    """What verbs report to: phases one after another, each with a known total."""

    def start(self, phase: str, total: float, unit: str = "steps") -> None: ...

    def advance(self, n: float = 1, **numbers: float) -> None: ...

    def finish(self) -> None: ...


class RichProgress:
    """One bar a phase, with the numbers that matter and the time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        self._bars = Bars(
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=Console(stderr=True),
        )
        self._task: Any = None

    def start(self, phase: str, total: float, unit: str = "steps") -> None:
        self.finish()
        self._bars.start()
        self._task = self._bars.add_task(phase, total=total, numbers="")

    def advance(self, n: float = 1, **numbers: float) -> None:
        if self._task is not None:
            more: dict[str, Any] = {"numbers": _numbers(numbers)} if numbers else {}
            self._bars.update(self._task, advance=n, **more)

    def finish(self) -> None:
        if self._task is not None:
            self._bars.stop()
            self._task = None


class _Counting(ABC):
    """Counts, and says so now and then: at most every `every` seconds, and at the end of each phase."""

    every = EVERY

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._phase = ""

    def start(self, phase: str, total: float, unit: str = "steps") -> None:
        self.finish()
        self._phase, self._total, self._unit, self._done = phase, total, unit, 0.0
        self._numbers: dict[str, float] = {}
        self._started = self._said = self._clock()
        self.say(0.0)

    def advance(self, n: float = 1, **numbers: float) -> None:
        self._done += n
        self._numbers = numbers or self._numbers
        now = self._clock()
        if now - self._said >= self.every:
            self._said = now
            self.say(now - self._started)

    def finish(self) -> None:
        if self._phase:
            self.say(self._clock() - self._started, ended=True)
            self._phase = ""

    @abstractmethod
    def say(self, seconds: float, ended: bool = False) -> None:
        """Tell where the phase stands after `seconds`."""


class PlainProgress(_Counting):
    """`merge: 40 % of 1.2 GB, 12 s, 18 s left, loss 0.31`, every ten seconds."""

    def say(self, seconds: float, ended: bool = False) -> None:
        share = self._done / self._total if self._total else 1.0
        parts = [f"{self._phase}: {share:.0%} of {_amount(self._total, self._unit)}", f"{seconds:.0f} s"]
        if 0 < share < 1 and not ended:
            parts.append(f"{seconds / share - seconds:.0f} s left")
        if self._numbers:
            parts.append(_numbers(self._numbers))
        print(", ".join(parts), file=sys.stderr, flush=True)


class JsonProgress(_Counting):
    """One JSON object a second at most: phase, done, total, unit, seconds, numbers."""

    every = 1.0

    def say(self, seconds: float, ended: bool = False) -> None:
        row = {"phase": self._phase, "done": self._done, "total": self._total, "unit": self._unit}
        row |= {"seconds": round(seconds, 3), "numbers": self._numbers, "ended": ended}
        print(json.dumps(row), file=sys.stderr, flush=True)


def choose(quiet: bool = False, json: bool = False) -> Progress | None:
    """The one that fits: None when quiet, else by what stderr is."""
    if quiet:
        return None
    if json:
        return JsonProgress()
    return RichProgress() if sys.stderr.isatty() else PlainProgress()


def _amount(total: float, unit: str) -> str:
    if unit in ("B", "bytes"):
        from spolia.runs.sizes import show_size

        return show_size(total)
    return f"{total:.0f} {unit}"


def _numbers(numbers: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {value:.4g}" for name, value in numbers.items())
