"""Stages of a long benchmark in a work folder: made once, by one process, and kept whole."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spolia.errors import SpoliaError
from spolia.runs.lock import Lock


@contextmanager
def held_alone(folder: Path, what: str) -> Iterator[bool]:
    """Whether the folder is ours for now; another process may be at it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = Lock(folder / ".lock")
    try:
        lock.take()
    except SpoliaError as error:
        print(f"{what}: left to another process ({error})", flush=True)
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def keep(file: Path, value: Any) -> None:
    """Writes JSON that is whole or not there."""
    part = file.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(file)
