"""What an API has answered and what it has cost, in one SQLite file that survives a kill and serves several processes.

    answers   key of endpoint and input -> row          a question is the same if its bytes are
    meter     calls and items of each API               counted before a request leaves
    facts     what was promised, the first answer       to notice a change

Without a path nothing but the meter is held, in memory.
"""

from __future__ import annotations

import hashlib
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from spolia.core.lazy import np
from spolia.errors import SpoliaError
from spolia.parts.api_budget import Budget, BudgetSpent, Price, Spent, beyond

if TYPE_CHECKING:
    from sqlite3 import Connection

_SIZE = 16  # bytes of a key: among 10^9 questions two are alike by chance 10^-21
_MOST = 500  # keys of one query; SQLite takes 999 everywhere
_WAIT = 60.0  # seconds for another process to finish writing
_TABLES = """
CREATE TABLE IF NOT EXISTS answers (key BLOB PRIMARY KEY, row BLOB NOT NULL) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS meter (api TEXT PRIMARY KEY, calls INTEGER NOT NULL DEFAULT 0, items INTEGER NOT NULL DEFAULT 0,
    answered INTEGER NOT NULL DEFAULT 0, failed INTEGER NOT NULL DEFAULT 0, kept INTEGER NOT NULL DEFAULT 0);
CREATE TABLE IF NOT EXISTS facts (api TEXT, name TEXT, value TEXT NOT NULL, PRIMARY KEY (api, name));
"""


class Store:
    """One connection, used under a lock by all threads of this process."""

    def __init__(self, path: str | os.PathLike[str] | None = None):
        self.path = None if path is None else Path(path)
        self.keeps = path is not None
        self._lock = threading.Lock()
        self._open: Connection | None = None
        with self._using() as base:
            base.execute("PRAGMA user_version")

    # --- answers -----------------------------------------------------------------------------------------------------

    def find(self, keys: Sequence[bytes]) -> dict[bytes, bytes]:
        """The rows that are kept."""
        found: dict[bytes, bytes] = {}
        if not self.keeps:
            return found
        with self._using() as base:
            for start in range(0, len(keys), _MOST):
                part = keys[start : start + _MOST]
                marks = ",".join("?" * len(part))
                found.update(base.execute(f"SELECT key, row FROM answers WHERE key IN ({marks})", part).fetchall())
        return found

    # --- the meter ---------------------------------------------------------------------------------------------------

    def reserve(self, api: str, items: int, budget: Budget, price: Price) -> None:
        """Count one call of so many items, before it leaves. BudgetSpent, and nothing counted, where it is too much."""
        with self._using(write=True) as base:
            calls, held = base.execute("SELECT calls, items FROM meter WHERE api = ?", (api,)).fetchone() or (0, 0)
            if bound := beyond(budget, price, calls + 1, held + items):
                raise spent_error(api, bound, items)
            self._count(base, api, calls=1, items=items)

    def settle(
        self, api: str, keys: Sequence[bytes] = (), rows: np.ndarray | None = None, *, back: int = 0, failed: int = 0
    ) -> None:
        """How that call ended: with rows, or without; `back` items do not count after all."""
        with self._using(write=True) as base:
            if rows is not None and self.keeps and keys:
                pairs = [(key, row.tobytes()) for key, row in zip(keys, rows, strict=True)]
                base.executemany("INSERT OR IGNORE INTO answers VALUES (?, ?)", pairs)
            self._count(base, api, items=-back, answered=0 if rows is None else len(rows), failed=failed)

    def reused(self, api: str, kept: int) -> None:
        """So many answers were here already."""
        with self._using(write=True) as base:
            self._count(base, api, kept=kept)

    def spent(self, api: str, price: Price) -> Spent:
        with self._using() as base:
            row = base.execute(
                "SELECT calls, items, answered, failed, kept FROM meter WHERE api = ?", (api,)
            ).fetchone()
        row = row or (0, 0, 0, 0, 0)
        return Spent(*row, money=price.of(row[0], row[1]))

    # --- facts -------------------------------------------------------------------------------------------------------

    def fact(self, api: str, name: str, value: str | None = None) -> str | None:
        """What was noted under this name; `value` is noted where nothing was."""
        with self._using(write=value is not None) as base:
            if value is not None:
                base.execute("INSERT OR IGNORE INTO facts VALUES (?, ?, ?)", (api, name, value))
            row = base.execute("SELECT value FROM facts WHERE api = ? AND name = ?", (api, name)).fetchone()
        return row and row[0]

    def close(self) -> None:
        with self._lock:
            if self._open is not None:
                self._open.close()
                self._open = None

    # --- the file ----------------------------------------------------------------------------------------------------

    def _count(self, base: Connection, api: str, **more: int) -> None:
        base.execute("INSERT OR IGNORE INTO meter (api) VALUES (?)", (api,))
        sums = ", ".join(f"{name} = {name} + ?" for name in more)
        base.execute(f"UPDATE meter SET {sums} WHERE api = ?", (*more.values(), api))

    @contextmanager
    def _using(self, *, write: bool = False) -> Iterator[Connection]:
        """The connection, inside a transaction where something is written: whole or not at all."""
        with self._lock:
            try:
                base = self._opened()
                if not write:
                    yield base
                    return
                base.execute("BEGIN IMMEDIATE")
                try:
                    yield base
                except BaseException:
                    base.execute("ROLLBACK")
                    raise
                base.execute("COMMIT")
            except sqlite3.Error as error:
                mend = "check the disk, or name another file; a damaged one has to be deleted"
                raise SpoliaError(
                    f"the answers kept cannot be used: {error}", where=str(self.path), mend=mend
                ) from None

    def _opened(self) -> Connection:
        if self._open is None:
            if self.path is not None:
                try:
                    self.path.parent.mkdir(parents=True, exist_ok=True)
                except OSError as error:
                    raise SpoliaError(f"cannot be made: {error.strerror}", where=str(self.path.parent)) from None
            base = sqlite3.connect(
                ":memory:" if self.path is None else self.path,
                timeout=_WAIT,
                isolation_level=None,
                check_same_thread=False,
            )
            base.execute("PRAGMA journal_mode = WAL")  # a reader waits for no writer; a kill leaves the file whole
            base.execute("PRAGMA synchronous = NORMAL")
            base.executescript(_TABLES)
            self._open = base
        return self._open


def keys_of(identity: str, items: np.ndarray) -> list[bytes]:
    """A key for each of the items [n, ...] of one endpoint: of its bytes, type and shape."""
    head = hashlib.blake2b(f"{identity}\0{items.dtype.str}\0{items.shape[1:]}".encode(), digest_size=_SIZE)
    keys, flat = [], items.reshape(len(items), -1)
    for item in flat:
        digest = head.copy()
        digest.update(item.data)
        keys.append(digest.digest())
    return keys


def spent_error(api: str, bound: str, items: int) -> BudgetSpent:
    mend = "raise the budget and run the same command again: it goes on, and nothing is paid twice"
    return BudgetSpent(f"{items} more items would exceed the budget of {bound}", where=api, mend=mend)
