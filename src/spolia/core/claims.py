"""Claims: how several processes, on one machine or on machines that share a folder, divide work among themselves.

Nobody leads. All cut the work into the same units. A process takes a unit by making a file that did not exist, touches it
while it lives, and leaves another when the unit is done:

    work-DIGEST.json    what is being made; the mark of another work beside it is an error
    TOKEN.process       host and number of a process; its claims are hard links to it
    UNIT.claim          who works on it
    UNIT.done           empty, or what was found

A claim whose owner is dead, or whose file nobody has touched for STALE seconds, is free again. Two owners of one unit
write the same bytes, so a wrong guess costs time and nothing else. Times are compared with themselves only: clocks of
different machines need not agree.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import socket
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

BEAT = 10.0  # seconds between touches
STALE = 120.0  # a network folder may show a touch a minute late
_SHOWN = 40  # characters of a value that an error repeats


class Gone(SpoliaError):
    """The folder of the claims is gone: the others have finished, or somebody removed it."""


class Claims:
    """The claims in `folder`. Use inside `with`: leaving gives back what was claimed and not done."""

    def __init__(self, folder: Path, beat: float = BEAT, stale: float = STALE):
        self.folder, self._beat, self._stale = folder, beat, stale
        self._me = {"place": _place(), "pid": os.getpid(), "token": os.urandom(8).hex()}
        self._card = folder / f"{self._me['token']}.process"
        self._held: set[Path] = set()
        self._seen: dict[str, tuple[int, float]] = {}  # by claim: its last touch, and when we first saw that
        self._lock, self._ended = threading.Lock(), threading.Event()
        self._pulse = threading.Thread(target=self._touch, name="spolia-claims", daemon=True)

    def __enter__(self) -> Claims:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._put(self._card, json.dumps(self._me).encode())
        self._pulse.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._pulse.join()
        for file in list(self._held):
            self._drop(file)
        self._card.unlink(missing_ok=True)

    def agree(self, work: Mapping[str, str]) -> None:
        """State what this process is making. SpoliaError, naming what differs, when others make something else."""
        text = json.dumps(dict(work), indent=1)
        mine = self.folder / f"work-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        first = not mine.exists()
        self._put(mine, text.encode())
        for file in sorted(self.folder.glob("work-*.json")):
            if file != mine:
                theirs = json.loads(file.read_text(encoding="utf-8"))
                if first:
                    mine.unlink(missing_ok=True)
                mend = f"give every process the same command; if none is left that works on it, delete {self.folder.parent}"
                raise SpoliaError(_difference(work, theirs), where=str(self.folder.parent), mend=mend)

    def claim(self, unit: str) -> bool:
        """Whether the unit is ours now."""
        file = self.folder / f"{unit}.claim"
        if self._done(unit):
            return False
        try:
            taken = self._make(file)
            if not taken and self._abandoned(file):
                file.unlink(missing_ok=True)
                taken = self._make(file)
        except FileNotFoundError:
            raise self._gone() from None
        if taken and self._done(unit):  # between our two looks
            self._drop(file)
            return False
        return taken

    def publish(self, unit: str, found: Any = None) -> None:
        """The unit is done; `found` (numbers, tensors, lists and tuples of them) is there for everybody."""
        data = b""
        if found is not None:
            stream = io.BytesIO()
            torch.save(found, stream)
            data = stream.getvalue()
        self._put(self.folder / f"{unit}.done", data)
        self._drop(self.folder / f"{unit}.claim")

    def found(self, unit: str) -> Any:
        """What was published with a unit that is done."""
        try:
            data = (self.folder / f"{unit}.done").read_bytes()
        except FileNotFoundError:
            raise self._gone() from None
        return torch.load(io.BytesIO(data), weights_only=True) if data else None

    def left(self, units: Sequence[str]) -> list[int]:
        """Numbers of the units that are not done."""
        names = self._names()
        return [i for i, unit in enumerate(units) if f"{unit}.done" not in names]

    def others(self) -> int:
        """How many other processes hold a claim."""
        owners = (self._owner(self.folder / name).get("token") for name in self._names() if name.endswith(".claim"))
        return len({token for token in owners if token} - {self._me["token"]})

    def _names(self) -> set[str]:
        try:
            return {file.name for file in self.folder.iterdir()}
        except FileNotFoundError:
            raise self._gone() from None

    def _done(self, unit: str) -> bool:
        return (self.folder / f"{unit}.done").exists()

    def _make(self, file: Path) -> bool:
        """Make a claim that was not there, whole at once: a hard link to our card. False where there is one."""
        try:
            os.link(self._card, file)
        except FileExistsError:
            # A network may repeat a link that was made, and then say that it was there.
            if file in self._held or self._owner(file).get("token") != self._me["token"]:
                return False
        except FileNotFoundError:
            raise
        except OSError:  # no hard links here
            try:
                fd = os.open(file, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
            except FileExistsError:
                return False
            with open(fd, "wb") as stream:
                stream.write(self._card.read_bytes())
        with self._lock:
            self._held.add(file)
        return True

    def _drop(self, file: Path) -> None:
        with self._lock:
            self._held.discard(file)
        if self._owner(file).get("token") == self._me["token"]:  # else somebody thought us dead
            file.unlink(missing_ok=True)

    def _abandoned(self, file: Path) -> bool:
        """Its owner is dead as far as we can see, or has not touched it for long."""
        try:
            touched = file.stat().st_mtime_ns
        except FileNotFoundError:
            return True
        owner, now = self._owner(file), time.monotonic()
        if owner.get("place") == self._me["place"] and not _lives(owner["pid"]):
            return True
        before, since = self._seen.get(file.name, (-1, now))
        if touched != before:
            self._seen[file.name] = (touched, now)
            return False
        return now - since > self._stale

    def _owner(self, file: Path) -> dict[str, Any]:
        """What the claim says; nothing while it is being written or once it is gone."""
        try:
            return json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return {}

    def _put(self, file: Path, data: bytes) -> None:
        """The whole file or none of it."""
        part = file.with_name(f"{file.name}.{self._me['token']}.{threading.get_ident()}")
        try:
            with part.open("wb") as stream:
                stream.write(data)
                stream.flush()
                os.fsync(stream.fileno())
            part.replace(file)
        except FileNotFoundError:
            raise self._gone() from None

    def _touch(self) -> None:
        while not self._ended.wait(self._beat):
            with self._lock:
                held = list(self._held)
            for file in held:
                try:
                    os.utime(file)
                except OSError:  # taken from us, or the work is over
                    continue

    def _gone(self) -> Gone:
        return Gone(
            "was removed while it was written", where=str(self.folder.parent), mend="run the same command again"
        )


def _place() -> str:
    """Where process numbers mean the same: the machine since it started, and its process namespace."""
    parts = [socket.gethostname()]
    for read in (
        lambda: Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
        lambda: str(Path("/proc/self/ns/pid").readlink()),
    ):
        try:
            parts.append(read())
        except OSError:
            continue
    return " ".join(parts)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _difference(work: Mapping[str, str], theirs: Mapping[str, str]) -> str:
    told = []
    for key in dict.fromkeys([*work, *theirs]):
        here, there = work.get(key, "nothing"), theirs.get(key, "nothing")
        if here != there:
            short = max(len(here), len(there)) <= _SHOWN
            told.append(f"{key} (`{there}` there, `{here}` here)" if short else key)
    return f"another merge was begun here; these differ: {', '.join(told)}"
