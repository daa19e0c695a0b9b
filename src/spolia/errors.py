"""The one error type a user meets: where it happened, what is wrong, how to mend it.

`SpoliaError` is for the user's input and ends the command with exit code 2. What else escapes is our fault (1).
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

_MOST = 40  # problems whose text is shown; `problems` holds all


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong. `where` is a place the user can open (`recipe.yaml:4 method.density`)."""

    where: str
    what: str
    mend: str = ""

    def __str__(self) -> str:
        where, what, mend = _printable(self.where, ""), _printable(self.what), _printable(self.mend)
        lines = [f"{where}: {what}" if where else what]
        if mend:
            lines.append(f"  mend: {mend}")
        return "\n".join(lines)


def _printable(text: str, kept: str = "\n") -> str:
    """Names come from files: what would steer a terminal, or cannot be encoded, is spelt out."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in kept else ascii(c)[1:-1] for c in text)


class SpoliaError(Exception):
    """The user's input cannot be used. Carries every problem found, not only the first."""

    exit_code = 2

    def __init__(self, what: str = "", *, where: str = "", mend: str = "", problems: Iterable[Problem] = ()):
        self.problems = list(problems) or [Problem(where, what, mend)]
        more = len(self.problems) - _MOST
        told = [str(problem) for problem in self.problems[:_MOST]]
        super().__init__("\n".join([*told, f"and {more} more"] if more > 0 else told))


class ToldElsewhere(SpoliaError):
    """Another process of the same run met this error first, and tells it."""


class SpoliaWarning(UserWarning):
    """Something odd that does not stop the work."""


class Problems:
    """Collects problems and warnings while checking, so that all of them are told at once."""

    def __init__(self) -> None:
        self.errors: list[Problem] = []
        self.warnings: list[Problem] = []

    def add(self, where: str, what: str, mend: str = "") -> None:
        problem = Problem(where, what, mend)
        if problem not in self.errors:
            self.errors.append(problem)

    def warn(self, where: str, what: str, mend: str = "") -> None:
        problem = Problem(where, what, mend)
        if problem not in self.warnings:
            self.warnings.append(problem)

    def raise_if_any(self) -> None:
        if self.errors:
            raise SpoliaError(problems=self.errors)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """ "did you mean `density`?", or the known words when none is near."""
    known = [str(k) for k in known]
    folded = {k.lower().replace("-", "_"): k for k in known}
    key = str(word).lower().replace("-", "_")
    near = [folded[key]] if key in folded else [folded[m] for m in difflib.get_close_matches(key, folded, 1, 0.6)]
    if near:
        return f"did you mean `{near[0]}`?"
    return f"known: {', '.join(known)}" if known else ""
