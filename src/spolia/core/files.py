"""Reading what others wrote. Regular files only: a pipe would wait for ever, and a device need not end."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from spolia.errors import SpoliaError

LARGEST_TEXT = 100_000_000  # bytes of a JSON file read whole; the index of a million tensors is smaller


def open_regular(file: Path) -> int:
    """A descriptor of `file` for reading. SpoliaError when it is no regular file or cannot be opened."""
    fd = -1
    try:
        regular = stat.S_ISREG(file.stat().st_mode)  # first: to open a device may act on it
        if regular:
            fd = os.open(file, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
            regular = stat.S_ISREG(os.fstat(fd).st_mode)
    except (OSError, ValueError) as error:
        raise unreadable(error, file) from None
    if not regular:
        if fd >= 0:
            os.close(fd)
        raise SpoliaError("is no regular file", where=str(file), mend="put a file with its content in this place")
    return fd


def read_whole(file: Path) -> bytes:
    """A small regular file. SpoliaError when it cannot be read or is no small file."""
    fd = open_regular(file)
    try:
        with open(fd, "rb") as stream:
            raw = stream.read(LARGEST_TEXT + 1)
    except OSError as error:
        raise unreadable(error, file) from None
    if len(raw) > LARGEST_TEXT:
        what = f"holds more than {LARGEST_TEXT} bytes, which no such file needs"
        raise SpoliaError(what, where=str(file), mend="download or save it again")
    return raw


def read_json(file: Path, mend: str) -> Any:
    """The value in a JSON file. SpoliaError with `mend` where it is damaged."""
    try:
        return json.loads(read_whole(file))
    except (ValueError, RecursionError) as error:
        raise SpoliaError(f"is not valid JSON: {error}", where=str(file), mend=mend) from None


def unreadable(error: OSError | ValueError, file: Path, part: str = "") -> SpoliaError:
    """Says why `file`, or `part` of it, cannot be read: an error of the system, or a name that it cannot hold."""
    why = (error.strerror or str(error)) if isinstance(error, OSError) else "no name that this system can hold"
    what = f"{part + ' ' if part else ''}cannot be read: {why}"
    return SpoliaError(what, where=shown(file), mend="check path, permissions and disk")


def shown(path: str | os.PathLike[str]) -> str:
    """A path for a message, short enough to be read."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:150]} ... {text[-100:]}"


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder, links followed. A name too long for the system is none."""
    try:
        return path.is_dir()
    except OSError:
        return False
