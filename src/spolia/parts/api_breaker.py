"""A circuit breaker: after many failures in a row nobody asks for a while; then one does, and all wait for how that ends."""

from __future__ import annotations

import threading
import time

from spolia.errors import SpoliaError

_LOOK = 0.05  # seconds between looks whether the work was stopped


class Breaker:
    """Opens after `most` failures in a row for `rest` seconds, and at once for as long as the other side asks for."""

    def __init__(self, most: int, rest: float):
        self.most, self.rest = most, rest
        self._change = threading.Condition()
        self._failures = 0
        self._until = 0.0  # closed from then on, but for one
        self._probing = False

    def enter(self, stop: threading.Event) -> bool:
        """Wait until it may be asked. True for the one who asks first after a pause. SpoliaError when stopped meanwhile."""
        with self._change:
            while True:
                now = time.monotonic()
                if now >= self._until and not self._probing:
                    self._probing = self._failures >= self.most
                    return self._probing
                if stop.is_set():
                    raise SpoliaError("stopped while it waited")
                self._change.wait(min(_LOOK, max(self._until - now, 0.001)) if now < self._until else _LOOK)

    def failed(self, wait: float | None) -> None:
        with self._change:
            self._failures += 1
            self._probing = False
            pause = max(wait or 0.0, self.rest if self._failures >= self.most else 0.0)
            self._until = max(self._until, time.monotonic() + pause) if pause else self._until
            self._change.notify_all()

    def succeeded(self) -> None:
        with self._change:
            self._failures, self._probing, self._until = 0, False, 0.0
            self._change.notify_all()

    @property
    def open(self) -> bool:
        with self._change:
            return self._failures >= self.most
