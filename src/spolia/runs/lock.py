"""One writer a folder: a file naming host and process, under a lock of the system that ends with the process."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path
from typing import IO

from spolia.errors import SpoliaError

try:
    import fcntl
except ImportError:  # Windows: the file alone is the lock
    fcntl = None


class Lock:
    """Taken and released by its owner. A dead owner's file is taken over; one from another host is believed."""

    def __init__(self, file: Path):
        self.file = file
        self._stream: IO[str] | None = None

    def check(self) -> None:
        assert self._stream is not None, "write a run folder inside `with RunFolder(...)`"

    def take(self) -> None:
        """Raises SpoliaError, naming the owner, when another process holds it."""
        while self._stream is None:
            existed = self.file.exists()
            stream = self.file.open("a+", encoding="utf-8")
            try:
                self._claim(stream, existed)
            except BaseException:
                stream.close()
                raise
            if not self._still_there(stream):  # the owner left, and took the file along, between opening and claiming
                stream.close()
                continue
            stream.seek(0)
            stream.truncate()
            json.dump({"host": socket.gethostname(), "pid": os.getpid()}, stream)
            stream.flush()
            self._stream = stream

    def release(self) -> None:
        if self._stream is not None:
            self.file.unlink(missing_ok=True)
            self._stream.close()
            self._stream = None

    def _claim(self, stream: IO[str], existed: bool) -> None:
        stream.seek(0)
        owner = _parse(stream.read())
        if fcntl is None:
            held = existed
        else:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                held = (
                    owner.get("host", socket.gethostname()) != socket.gethostname()
                )  # its death cannot be seen from here
            except BlockingIOError:
                held = True
        if held:
            who = f"process {owner.get('pid', '?')} on {owner.get('host', 'this machine')}"
            mend = f"wait for it, or choose another folder with -o; if it is gone, delete {self.file}"
            raise SpoliaError(f"{who} is writing this folder", where=str(self.file.parent), mend=mend)

    def _still_there(self, stream: IO[str]) -> bool:
        try:
            return os.path.samestat(self.file.stat(), os.fstat(stream.fileno()))
        except FileNotFoundError:
            return False


def _parse(text: str) -> dict[str, object]:
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}
