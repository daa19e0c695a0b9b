"""Module names by pattern, as PEFT's `rank_pattern` and `alpha_pattern` spell them: a whole name, its end, or a regular
expression for either.

Whose adapter it is writes the expression, and Python's `re` can take for ever on one made for it. So its plain part alone
is read (characters, classes, `* + ?`, groups with `|`), by following all ways at once: the time grows with length of
pattern times length of name.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping
from typing import Any

Step = Callable[[str, set[int]], set[int]]
"""Places in a name at which a part of a pattern may begin -> places after it."""

_MOST = 20_000_000  # steps; under ten seconds
_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_ATOM = re.compile(r"\\[.dDwWsS\-_/]|\[\^?(?:[^\]\[\\]|\\.)+\]|[^\\\[\]()|*+?{}^$]")
_TIMES = re.compile(r"([*+?])\??(?![*+?{])|(?![*+?{])")


class BadPattern(ValueError):
    """Not a regular expression, or one that is not read here; says what."""


def compile_patterns(patterns: Mapping[str, Any], modules: Collection[str]) -> list[tuple[Step, Any]]:
    """Every pattern ready for `first_fit` on each of `modules`, with its value. Raises BadPattern."""
    plain = sum(1 for key in patterns if _PLAIN.fullmatch(key))
    other = sum(len(key) for key in patterns if not _PLAIN.fullmatch(key))
    if plain * len(modules) + other * sum(map(len, modules)) > _MOST:
        raise BadPattern(f"{len(patterns)} patterns for {len(modules)} modules are too many to try")
    return [(_pattern(key), value) for key, value in patterns.items()]


def first_fit(patterns: Collection[tuple[Step, Any]], module: str, default: Any) -> Any:
    """The value of the first pattern that fits the whole name or what follows one of its dots; else `default`."""
    begins = {0, *(place + 1 for place, letter in enumerate(module) if letter == ".")}
    return next((value for step, value in patterns if len(module) in step(module, begins)), default)


def _pattern(key: str) -> Step:
    if _PLAIN.fullmatch(key):  # the usual one; its dots stand for any character, as PEFT has it
        whole = re.compile(key)
        return lambda name, begins: (
            {len(name)} if len(name) - len(key) in begins and whole.match(name, len(name) - len(key)) else set()
        )
    step, rest = _choice(key, 0)
    if rest:
        raise _bad(rest)
    return step


def _choice(text: str, depth: int) -> tuple[Step, str]:
    """One way or another, up to the bracket that closes it; and the text from there on."""
    ways = list[Step]()
    while True:
        steps = list[Step]()
        while text and text[0] not in "|)":
            step, text = _part(text, depth)
            steps.append(step)
        ways.append(_sequence(steps))
        if not text.startswith("|"):
            return lambda name, begins: set().union(*(way(name, begins) for way in ways)), text
        text = text[1:]


def _sequence(steps: list[Step]) -> Step:
    def run(name: str, begins: set[int]) -> set[int]:
        for step in steps:
            begins = step(name, begins)
        return begins

    return run


def _part(text: str, depth: int) -> tuple[Step, str]:
    """A character, class or group, with what says how often; an end of the name; and the text after it."""
    if text[0] in "^$":
        return lambda name, begins: begins & {len(name) if text[0] == "$" else 0}, text[1:]
    if text[0] == "(":
        if depth > 20 or (text.startswith("(?") and not text.startswith("(?:")):
            raise _bad(text)
        group, rest = _choice(text[3:] if text.startswith("(?:") else text[1:], depth + 1)
        if not rest.startswith(")") or rest[1:2] in ("*", "+", "{"):
            raise _bad(text)
        if rest[1:2] == "?":
            return lambda name, begins: begins | group(name, begins), rest[2:].removeprefix("?")
        return group, rest[1:]
    atom = _ATOM.match(text)
    times = _TIMES.match(text, atom.end()) if atom else None
    if atom is None or times is None:
        raise _bad(text)
    try:
        return _repeat(re.compile(atom[0]), times[1]), text[times.end() :]
    except re.error:
        raise _bad(text) from None


def _bad(text: str) -> BadPattern:
    return BadPattern(f"{text[:60]!r} is not read: repeated groups, counts in braces, looking around, or a slip")


def _repeat(atom: re.Pattern[str], times: str | None) -> Step:
    def run(name: str, begins: set[int]) -> set[int]:
        ends, seen = set[int](), set[int]()
        for begin in sorted(begins):
            if times in ("*", "?"):
                ends.add(begin)
            while begin < len(name) and begin not in seen and atom.match(name, begin):
                seen.add(begin)
                begin += 1
                ends.add(begin)
                if times in (None, "?"):
                    break
        return ends

    return run
