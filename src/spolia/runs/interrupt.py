"""Ctrl-C, and the signal of job systems: the first lets the loop finish its step, the second stops at once."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from spolia.core.dist import asked


@contextmanager
def gentle_stop(request_stop: Callable[[], None], *, say: bool = True) -> Iterator[None]:
    """Inside, the first SIGINT or SIGTERM calls `request_stop`; the next raises KeyboardInterrupt.

    Signals reach the main thread alone: elsewhere this does nothing. Of several processes the first says what happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    once, (rank, ranks) = False, asked()

    def on_signal(number: int, _frame: Any) -> None:
        nonlocal once
        if once:
            raise KeyboardInterrupt
        once = True
        request_stop()
        ending = (
            ranks > 1 and number == signal.SIGTERM
        )  # whoever started us ends us, because another process has failed
        if say and rank == 0 and not ending:
            print("\nfinishing this step, then saving; once more to stop at once", file=sys.stderr, flush=True)

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
