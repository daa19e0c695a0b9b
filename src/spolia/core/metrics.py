"""metrics.jsonl: what loops report, a line each, so that a killed run loses one line at most and a resumed one repeats none."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spolia.core.files import unreadable
from spolia.core.staging import disk_error


class Metrics:
    """metrics.jsonl: appended line by line; lines of steps that will be done again are dropped on resume."""

    def __init__(self, file: Path):
        self.file = file
        try:
            lines = file.read_bytes().split(b"\n") if file.exists() else []
        except OSError as error:
            raise unreadable(error, file) from None
        self._old = [entry for entry in map(_parse, lines) if entry is not None]  # what an earlier process left
        self._opened = False
        last = max((entry["time"] for entry in self._old if isinstance(entry.get("time"), int | float)), default=0.0)
        self._zero = time.monotonic() - last

    def append(self, phase: str, step: int | None, numbers: Mapping[str, float]) -> None:
        if not self._opened:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.forget("", None)
            self._end_the_last_line()
            self._opened = True
        entry: dict[str, Any] = {"time": round(time.monotonic() - self._zero, 3), "phase": phase, "step": step}
        entry |= {name: value if math.isfinite(value) else None for name, value in numbers.items()}  # strict JSON
        try:
            with self.file.open("a", encoding="utf-8") as stream:
                stream.write(json.dumps(entry, allow_nan=False) + "\n")
        except OSError as error:
            raise disk_error(error, self.file) from None

    def forget(self, phase: str, first_step: int | None) -> None:
        """Drop an earlier process's lines of `phase` from `first_step` on; None drops those outside a loop."""

        def again(entry: dict[str, Any]) -> bool:
            if entry.get("phase") != phase:
                return False
            step = entry.get("step")
            return step is None if first_step is None else isinstance(step, int) and step >= first_step

        if not any(again(entry) for entry in self._old):
            return
        self._old = [entry for entry in self._old if not again(entry)]
        lines = self.file.read_bytes().split(b"\n")
        stay = [line for line in lines if (entry := _parse(line)) is not None and not again(entry)]
        part = self.file.with_name(self.file.name + ".part")
        part.write_bytes(b"".join(line + b"\n" for line in stay))
        part.replace(self.file)

    def _end_the_last_line(self) -> None:
        """Cut a line that an earlier process left half-written."""
        if self.file.exists():
            raw = self.file.read_bytes()
            if raw and not raw.endswith(b"\n"):
                os.truncate(self.file, raw.rfind(b"\n") + 1)


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) else None
