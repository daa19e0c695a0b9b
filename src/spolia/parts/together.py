"""Work that several processes do together: units that all cut alike, each done by whoever claims it first."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from spolia.core.claims import Claims
from spolia.core.stream import in_parallel

UNITS = 512  # of a step; what a dead process had begun, one unit a thread, is done again
WAIT = 0.5  # seconds between looks at what the others do
T = TypeVar("T")


def units_of(items: Sequence[T], size: Callable[[T], int]) -> list[list[T]]:
    """The items in their order, in about UNITS runs of one item or more. The same in every process."""
    least = sum(map(size, items)) / UNITS
    units: list[list[T]] = []
    filled = least
    for item in items:
        if filled >= least:
            units.append([])
            filled = 0
        units[-1].append(item)
        filled += size(item)
    return units


def together(
    claims: Claims,
    step: str,
    units: Sequence[T],
    work: Callable[[T, threading.Event], Any],
    threads: int,
    told: Callable[[T, int], None] | None = None,
) -> None:
    """Do `work(unit, stop)` of every unit, among all processes; returns when all are done.

    What it returns is published: see `found`. `told(unit, other processes)` hears once of every unit, whoever did it.
    """
    names = [f"{step}-{i}" for i in range(len(units))]
    news, lock = set(range(len(units))), threading.Lock()

    def look() -> list[int]:
        left = claims.left(names)
        if told is not None:
            with lock:
                fresh, others = news.difference(left), claims.others()
                news.difference_update(fresh)
                for i in sorted(fresh):
                    told(units[i], others)
        return left

    def one(i: int, stop: threading.Event) -> None:
        if claims.claim(names[i]):
            claims.publish(names[i], work(units[i], stop))
            look()

    while left := look():
        in_parallel(left, one, min(threads, len(left)))
        if look():  # the rest is with others
            time.sleep(WAIT)


def found(claims: Claims, step: str, count: int) -> list[Any]:
    """What every process found in the units of a step that is done, in order."""
    return [claims.found(f"{step}-{i}") for i in range(count)]
