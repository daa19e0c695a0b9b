"""What a person is told on stderr: warnings, and errors with the exit code that says whose fault they are."""

from __future__ import annotations

import errno
import sys
from typing import Any

from spolia.errors import SpoliaError, SpoliaWarning, ToldElsewhere

_THEIRS = (
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EACCES,
    errno.EROFS,
    errno.EPERM,
    errno.EFBIG,
)  # the system's refusals, not our mistakes


def show_warning(message: Warning | str, category: type[Warning], *_: Any) -> None:
    kind = "warning" if category is SpoliaWarning else category.__name__
    print(f"{kind}: {plain(str(message))}", file=sys.stderr)


def plain(text: str) -> str:
    """`text` without what would steer a terminal: names in it come from files that others made."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def explain(error: Exception) -> int:
    """Tells `error` on stderr; the exit code."""
    if isinstance(error, ToldElsewhere):
        return error.exit_code
    if isinstance(error, SpoliaError):
        count = len(error.problems)
        head = f"{count} problems, nothing was done\n" if count > 1 else ""
        print(head + plain(str(error)), file=sys.stderr)
        return error.exit_code
    if isinstance(error, OSError) and error.errno in _THEIRS:
        what = f"{error.filename or 'the system'}: {error.strerror}"
        print(f"{what}\n  mend: make room, or choose a place you may write to", file=sys.stderr)
        return SpoliaError.exit_code
    print(
        f"spolia stopped on a mistake of its own: {type(error).__name__}: {error}\n"
        "  mend: the same command with --debug shows the stack trace; please report it with the recipe",
        file=sys.stderr,
    )
    return 1
