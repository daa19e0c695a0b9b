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

import os
import re
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spolia.core import kept
from spolia.core.dist import anyone, told
from spolia.core.metrics import Metrics
from spolia.errors import SpoliaError

Progress = Callable[[str, int, int, Mapping[str, float]], None]
"""Told after every step: the phase, steps done, steps in all, the latest numbers logged."""

_SEEN_LATE = 60.0  # seconds until a file must have been seen
KEEP_LAST = 2  # checkpoints of a loop: should the newest be damaged, the one before it still stands


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop; the step at hand was finished and saved."""


class Journal:
    """Reports and resumes loops. `folder` is a run folder: checkpoints/loops/ and metrics.jsonl are written there.

    `save_every` is in seconds of wall time; 0 saves after every step. Of several processes that make the same steps one
    writes; the others `follow`: they resume from its checkpoints and leave no trace. `together`: all of them go through
    the same loops with this journal. Then they stop at the same step, and a kept loop that is not `shared` is the first's
    alone: the others take up what it kept at the end.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str] | None = None,
        *,
        progress: Progress | None = None,
        save_every: float = 10.0,
        follow: bool = False,
        together: bool = False,
    ):
        self.folder = None if folder is None else Path(folder)
        self.seconds: dict[str, float] = {}  # wall time of each phase in this process
        self.stop_requested = False
        self.most_steps: int | None = None  # after which it stops as if asked to
        self._progress = progress
        self._save_every = save_every
        self._phases: list[str] = []
        self._loops: dict[str, int] = {}  # loops begun under each phase
        self._label: str | None = None  # the running loop
        self._step: int | None = None
        self._numbers: dict[str, float] = {}
        self._follow, self._together = follow, together
        self._metrics = None if self.folder is None or follow else Metrics(self.folder / "metrics.jsonl")

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

    def steps(self, n: int, keep: Mapping[str, Any] | None = None, *, shared: bool = False) -> Iterator[int]:
        """Step numbers 0 … n-1, from where an earlier run left off.

        Every value of `keep` is restored in place: objects with state_dict(), torch and numpy generators, tensors,
        arrays, dicts, lists. Without `keep` nothing is saved and the loop always begins at 0; such a loop may stand
        inside another. `shared`: the processes of a group make every step together. Raises SpoliaError when the folder
        holds the loop with another n or other names.
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
        common = self._together and (shared or loop is None)
        self._end_if(self._stopping(self._together), label)
        if self._follow and self._together and loop is not None and not shared:
            self._taken_up(loop, label)
            return
        done = self._resumed(loop, shared)
        if self._metrics is not None:
            self._metrics.forget(label, done)
        if self._progress is not None and done:
            self._progress(label, done, n, {})
        saved_at, self._label = time.monotonic(), label
        try:
            for step in range(done, n):
                self._step = step
                yield step
                if self.most_steps is not None:
                    self.most_steps -= 1
                    if self.most_steps <= 0:
                        self.stop_requested = True
                if self._progress is not None:
                    self._progress(label, step + 1, n, self._numbers)
                stop = self._stopping(common)
                due = time.monotonic() - saved_at >= self._save_every
                if loop is not None and not self._follow and (due or stop or step + 1 == n):
                    loop.save(step + 1)
                    saved_at = time.monotonic()
                if stop and self._together and not common:
                    told("stopped")
                self._end_if(stop, label)
        finally:
            self._label = self._step = None
        if self._together and not common:
            told("done")

    def _next_label(self) -> str:
        phase = self.current or "loop"
        self._loops[phase] = count = self._loops.get(phase, 0) + 1
        return phase if count == 1 else f"{phase} ({count})"

    def _resumed(self, loop: _Loop | None, shared: bool) -> int:
        """Steps done before; of a shared loop those that the first process found, in all."""
        if loop is None:
            return 0
        if not (self._together and shared):
            return loop.resume(clean=not self._follow)
        done = told(None if self._follow else loop.resume())
        if self._follow and done:
            loop.await_(done)
        return done

    def _taken_up(self, loop: _Loop, label: str) -> None:
        """Wait for the first process to end its loop, and have what it kept."""
        if told() != "done":
            raise Interrupted(f"stopped in {label}")
        loop.await_(loop.n)

    def _stopping(self, common: bool) -> bool:
        """Whether to stop here. Of processes that make a step together all do what one was asked, at the same step."""
        return anyone(self.stop_requested) if common else self.stop_requested

    def _end_if(self, stop: bool, label: str) -> None:
        if stop:
            raise Interrupted(f"stopped in {label}")


class _Loop:
    """The checkpoints of one loop: `step-00000120.safetensors` says that 120 steps are done."""

    def __init__(self, folder: Path, label: str, n: int, keep: Mapping[str, Any]):
        slug = re.sub(r"[^a-z0-9]+", "-", label.lower()).strip("-")[:60]
        self.folder = folder / f"{slug}-{zlib.crc32(label.encode()):08x}"  # the number tells alike slugs apart
        self.label, self.n, self.keep = label, n, keep

    def _files(self) -> list[Path]:
        return sorted(self.folder.glob("step-*.safetensors"), reverse=True)

    def await_(self, done: int) -> None:
        """Restore what another process has kept after so many steps: over a network a file may be seen late."""
        if not self.n:
            return
        file, since = self.folder / f"step-{done:08d}.safetensors", time.monotonic()
        while not file.exists():
            if time.monotonic() - since > _SEEN_LATE:
                mend = "give all processes the same run folder, on a disk that all machines share"
                raise SpoliaError("does not see what the first process keeps", where=str(file), mend=mend)
            time.sleep(0.05)
        if self.resume(clean=False) != done:
            raise self._refusal("is not whole where another process reads it", file)

    def resume(self, clean: bool = True) -> int:
        """Restore the newest sound checkpoint; the number of steps done, 0 when there is none."""
        for part in self.folder.glob("*.part") if clean else ():
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
