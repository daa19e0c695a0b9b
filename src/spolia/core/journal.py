"""The journal of a run: where a loop reports its steps and numbers, and from which it resumes.

    journal = Journal(folder)
    with journal.phase("fine-tune upright"):
        for step in journal.steps(300, keep={"model": model, "optimizer": optimizer, "draws": generator}):
            ...
            journal.log(loss=loss)

Without a folder the loop is a plain counter. With one, what `keep` names is saved every `save_every` seconds and at the
end; run again, the loop goes on after the newest sound checkpoint, and a finished loop only restores what it kept. The
bits are those of an uninterrupted run as long as everything that changes across steps is kept, random generators
included. A loop left by `break` or an exception goes on from its last checkpoint.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spolia.core import kept
from spolia.core.files import unreadable
from spolia.core.staging import disk_error
from spolia.errors import SpoliaError

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Told after every step: the phase, steps done, steps in all, the latest numbers logged."""

KEEP_LAST = 2  # checkpoints of a loop: should the newest be damaged, the one before it still stands


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; the step at hand was finished and saved."""


class Journal:
    """Reports and resumes loops. `folder` is a run folder: checkpoints/loops/ and metrics.jsonl are written there.

    `save_every` is in seconds of wall time; 0 saves after every step. Of several processes that make the same steps one
    writes; the others `follow`: they resume from its checkpoints and leave no trace.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: Progress | None = None,
        save_every: float = 10.0,
        follow: bool = False,
    ):
        self.folder = None if folder is None else Path(folder)
        self.seconds: dict[str, float] = {}  # wall time of each phase in this process
        self.stop_requested = False
        self._progress = progress
        self._save_every = save_every
        self._phases: list[str] = []
        self._loops: dict[str, int] = {}  # loops begun under each phase
        self._label: str | None = None  # the running loop
        self._step: int | None = None
        self._numbers: dict[str, float] = {}
        self._follow = follow
        self._metrics = None if self.folder is None or follow else _Metrics(self.folder / "metrics.jsonl")

    def request_stop(self) -> None:
        """Ask the running loop to finish its step, save, and raise Interrupted. Safe to call from a signal handler."""
        self.stop_requested = True

    @property
    def current(self) -> str:
        """The phase at hand; nested phases are joined by ` / `."""
        return " / ".join(self._phases)

    @contextmanager
    def phase(self, name: str) -> Iterator[Journal]:
        """Name what happens inside. Loops are found again by their phase and their order within it."""
        self._phases.append(name)
        label, start = self.current, time.perf_counter()
        if self._metrics is not None and label not in self.seconds:
            self._metrics.forget(label, None)
        try:
            yield self
        finally:
            self.seconds[label] = self.seconds.get(label, 0.0) + time.perf_counter() - start
            self._phases.pop()
            self._label = self._step = None  # a loop left by an exception is over

    def log(self, **numbers: Any) -> None:
        """Append numbers (or one-element tensors) to metrics.jsonl with phase, step and seconds since the run began."""
        self._numbers = {name: float(v.item() if hasattr(v, "item") else v) for name, v in numbers.items()}
        if self._metrics is not None:
            self._metrics.append(self._label or self.current, self._step, self._numbers)

    def steps(self, n: int, keep: Mapping[str, Any] | None = None) -> Iterator[int]:
        """Step numbers 0 … n-1, from where an earlier run left off.

        Every value of `keep` is restored in place: objects with state_dict(), torch and numpy generators, tensors,
        arrays, dicts, lists. Without `keep` nothing is saved and the loop always begins at 0; such a loop may stand
        inside another. Raises SpoliaError when the folder holds the loop with another n or other names.
        """
        if self._label is not None:
            if keep and self.folder is not None:  # its order within the phase would change on resume
                raise SpoliaError("a kept loop inside another", where=self._label, mend="keep the outer loop only")
            yield from range(n)
            return
        label, self._numbers = self._next_label(), {}
        loop = None
        for name, value in (keep or {}).items():
            kept.kind(name, value)  # refuse before the work, not at the first save
        if self.folder is not None and keep:
            loop = _Loop(self.folder / "checkpoints" / "loops", label, n, keep)
        self._raise_if_stopped(label)
        done = loop.resume() if loop is not None else 0
        if self._metrics is not None:
            self._metrics.forget(label, done)
        if self._progress is not None and done:
            self._progress(label, done, n, {})
        saved_at, self._label = time.monotonic(), label
        try:
            for step in range(done, n):
                self._step = step
                yield step
                if self._progress is not None:
                    self._progress(label, step + 1, n, self._numbers)
                due = time.monotonic() - saved_at >= self._save_every
                if loop is not None and not self._follow and (due or self.stop_requested or step + 1 == n):
                    loop.save(step + 1)
                    saved_at = time.monotonic()
                self._raise_if_stopped(label)
        finally:
            self._label = self._step = None

    def _next_label(self) -> str:
        phase = self.current or "loop"
        self._loops[phase] = count = self._loops.get(phase, 0) + 1
        return phase if count == 1 else f"{phase} ({count})"

    def _raise_if_stopped(self, label: str) -> None:
        if self.stop_requested:
            raise Interrupted(f"stopped in {label}")


class _Loop:
    """The checkpoints of one loop: `step-00000120.safetensors` says that 120 steps are done."""

    def __init__(self, folder: Path, label: str, n: int, keep: Mapping[str, Any]):
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60]
        self.folder = folder / f"{slug}-{zlib.crc32(label.encode()):08x}"  # the number tells alike slugs apart
        self.label, self.n, self.keep = label, n, keep

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def resume(self) -> int:
        """Restore the newest sound checkpoint; the number of steps done, 0 when there is none."""
        for part in self.folder.glob("*.part"):
            part.unlink(missing_ok=True)
        for file in self._files():
            try:
                state = kept.load(file)
            except kept.Damaged:
                continue
            if not isinstance(state, dict) or not {"n", "kinds", "done", "keep"} <= state.keys():
                continue  # kept by something else
            self._check(state, file)
            for name, value in self.keep.items():
                try:
                    kept.restore(name, value, state["keep"][name])
                except (RuntimeError, ValueError, KeyError, TypeError) as error:
                    raise self._refusal(f"`{name}` no longer fits what was kept: {error}", file) from error
            return state["done"]
        return 0

    def save(self, done: int) -> None:
        state = {name: kept.capture(name, value) for name, value in self.keep.items()}
        kept.save(self.folder / f"step-{done:08d}.safetensors", {**self._identity(), "done": done, "keep": state})
        for old in self._files()[KEEP_LAST:]:
            old.unlink(missing_ok=True)

    def _identity(self) -> dict[str, Any]:
        kinds = {name: kept.kind(name, value) for name, value in self.keep.items()}
        return {"label": self.label, "n": self.n, "kinds": kinds}

    def _check(self, state: dict[str, Any], file: Path) -> None:
        if state["n"] != self.n:
            raise self._refusal(f"kept as a loop of {state['n']} steps, now asked for {self.n}", file)
        then, now = state["kinds"], self._identity()["kinds"]
        if then != now:
            kept_then, kept_now = (", ".join(f"{name} ({kind})" for name, kind in d.items()) for d in (then, now))
            raise self._refusal(f"kept {kept_then}; now asked to keep {kept_now}", file)

    def _refusal(self, what: str, file: Path) -> SpoliaError:
        mend = f"use a new run folder, or delete {file.parent} to begin this loop again"
        return SpoliaError(what, where=f"{file} ({self.label})", mend=mend)


class _Metrics:
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
