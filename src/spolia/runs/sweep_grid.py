"""What a sweep goes over: keys with their values or ranges, the product of these with the seeds, a name for each run."""

from __future__ import annotations

import itertools
import json
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from spolia.errors import Problems, SpoliaError
from spolia.runs import yamlmarks
from spolia.runs.overrides import parse_path

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_RANGE = re.compile(rf"({_NUMBER})\.\.({_NUMBER})(:log)?")
_WHOLE = re.compile(r"[-+]?\d+")
_TOKENS = re.compile(r""""(?:[^"\\]|\\.)*"|'[^']*'|.""", re.DOTALL)  # quoted texts whole, else a character
_OPEN, _CLOSE = "[{", "]}"
_UNSAFE = re.compile(r"[^A-Za-z0-9._+-]+")
_LONGEST = 40, 200  # characters of a value and of a whole name; file systems take 255 bytes
_FORM = "write --over method.scale=0.1,0.3, or with --search --over method.scale=0.1..0.9"

Over = Mapping[str, Sequence[Any] | str] | Sequence[str]


@dataclass(frozen=True)
class Axis:
    """A key of the recipe and what it takes: the values in turn, as YAML; or a range, from which a search draws."""

    key: str
    values: tuple[str, ...] = ()
    low: float = 0.0
    high: float = 0.0
    whole: bool = False  # whole numbers only
    log: bool = False  # drawn evenly in the logarithm

    @property
    def is_range(self) -> bool:
        return not self.values

    @property
    def ends(self) -> tuple[str, ...]:
        """What is checked before anything runs: every value, or both ends."""
        return self.values or (self.text(self.low), self.text(self.high))

    def text(self, value: float) -> str:
        """A number of the range as an override holds it, to the last bit."""
        return str(int(value)) if self.whole else repr(float(value))


@dataclass(frozen=True)
class Point:
    """One combination: (key, value as YAML) in the order of the axes."""

    values: tuple[tuple[str, str], ...]

    @property
    def overrides(self) -> list[str]:
        return [f"{key}={value}" for key, value in self.values]


def axes_of(over: Over, problems: Problems) -> list[Axis]:
    """The axes of `--over KEY=VALUES` texts, or of a mapping from key to values (or to such a text)."""
    if isinstance(over, Mapping):
        pairs = [(key, value) for key, value in over.items()]
    else:
        pairs = [_halves(text, problems) for text in over]
    return [axis for key, given in pairs if key and (axis := _axis(key, given, problems)) is not None]


def _halves(text: str, problems: Problems) -> tuple[str, str]:
    key, equals, right = text.partition("=")
    if not equals:
        problems.add(f"--over {text}", "not of the form KEY=VALUES", _FORM)
        return "", ""
    return key.strip(), right


def _axis(key: str, given: Sequence[Any] | str, problems: Problems) -> Axis | None:
    where = f"--over {key}"
    if parse_path(key) is None:
        problems.add(where, "not a key of a recipe", _FORM)
        return None
    if isinstance(given, str) and (found := _RANGE.fullmatch(given.strip())):
        return _range(key, found, where, problems)
    values = split(given) if isinstance(given, str) else [as_yaml(value) for value in given]
    if not values or not all(values):
        problems.add(where, "a value is missing", _FORM)
        return None
    twice = sorted({value for value in values if values.count(value) > 1})
    if twice:
        problems.add(where, f"`{twice[0]}` stands twice", "give each value once; --seeds repeats")
        return None
    return Axis(key, tuple(values))


def _range(key: str, found: re.Match[str], where: str, problems: Problems) -> Axis | None:
    low, high = float(found[1]), float(found[2])
    if low >= high:
        problems.add(where, f"{found[1]} is not below {found[2]}", "write the lower end first")
        return None
    if found[3] and low <= 0:
        problems.add(where, f"{found[1]} has no logarithm", "begin above 0, or leave :log away")
        return None
    whole = all(_WHOLE.fullmatch(end) for end in (found[1], found[2]))
    return Axis(key, low=low, high=high, whole=whole, log=bool(found[3]))


def split(text: str) -> list[str]:
    """`text` at its commas, but for those in brackets and quotes."""
    parts = [""]
    for token in _TOKENS.findall(text):
        if token == "," and not _depth(parts[-1]):
            parts.append("")
        else:
            parts[-1] += token
    return [part.strip() for part in parts]


def _depth(text: str) -> int:
    """Brackets that are open at the end of `text`, quoted ones aside."""
    tokens = _TOKENS.findall(text)
    return sum((token in _OPEN) - (token in _CLOSE) for token in tokens)


def as_yaml(value: Any) -> str:
    """A value as YAML on one line; words that read back as themselves stay bare."""
    if isinstance(value, str):
        try:
            if value == value.strip() and yamlmarks.load(value).value == value:
                return value
        except SpoliaError:  # no YAML by itself: it needs its quotes
            pass
    return json.dumps(value, ensure_ascii=False)


def check_axes(
    axes: Sequence[Axis], fixed: Sequence[str], seeds: int | None, search: int | None, problems: Problems
) -> None:
    """What axes, other overrides, seeds and a search ask of each other."""
    taken = [parse_path(text.partition("=")[0].strip()) for text in fixed]
    for place, axis in enumerate(axes):
        where, path = f"--over {axis.key}", parse_path(axis.key)
        if path in taken:
            problems.add(where, f"`{axis.key}` is set by an override too", "leave one of the two away")
        if path in [parse_path(other.key) for other in axes[:place]]:
            problems.add(where, "the key is given twice", "give all its values at once")
        if path == ("seed",) or (path == ("seeds",) and seeds is not None):
            problems.add(where, "seeds are no point of a grid", "write --seeds N: points are compared seed by seed")
        if axis.is_range and search is None:
            problems.add(where, "a range is searched, not gone over", "add --search N, or give values: 0.1,0.3,0.5")
    if seeds is not None and seeds < 1:
        problems.add("--seeds", f"{seeds} is too small", "give 1 or more")
    if search is not None and search < 1:
        problems.add("--search", f"{search} is too small", "give the number of points to try")
    if search is not None and not axes:
        problems.add("--search", "there is nothing to search", "add --over KEY=LOW..HIGH")
    if not axes and seeds is None:
        problems.add("sweep", "there is nothing to go over", "add --over KEY=A,B, or --seeds N")


def grid(axes: Sequence[Axis]) -> list[Point]:
    """The product; the last axis turns fastest. Without axes one point with no values."""
    every = itertools.product(*(axis.values for axis in axes))
    return [Point(tuple(zip((axis.key for axis in axes), values, strict=True))) for values in every]


def corners(axes: Sequence[Axis]) -> list[Point]:
    """Of a search: every value and both ends of every range, each at least once."""
    most = max(len(axis.ends) for axis in axes)
    return [Point(tuple((axis.key, axis.ends[i % len(axis.ends)]) for axis in axes)) for i in range(most)]


def run_name(values: Sequence[tuple[str, str]], seed: int | None) -> str:
    """`scale=0.3,seed=1`: the last part of each key, the whole key where two end alike. More values change no name."""
    lasts = [_last(key) for key, _ in values]
    parts = [
        f"{_slug(last if lasts.count(last) == 1 else key)}={_slug(value)}"
        for last, (key, value) in zip(lasts, values, strict=True)
    ]
    name = ",".join(parts + ([f"seed={seed}"] if seed is not None else []))
    return name if len(name) <= _LONGEST[1] else f"{name[: _LONGEST[1] - 9]}-{zlib.crc32(name.encode()):08x}"


def _last(key: str) -> str:
    path = parse_path(key)
    assert path is not None  # checked with the axes
    return str(path[-1])


def _slug(text: str) -> str:
    """`text` as part of a file's name. What had to change is told apart by a number."""
    safe = _UNSAFE.sub("-", text)[: _LONGEST[0]]
    return safe if safe == text else f"{safe.strip('-')}-{zlib.crc32(text.encode()):08x}"
