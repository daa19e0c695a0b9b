"""`key=value` on the command line: dotted paths into a recipe (`pool.experts[1]=./code`), values in YAML."""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from typing import Any

from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.runs import yamlmarks
from spolia.runs.yamlmarks import Path, dotted

_PART = re.compile(r"([^.\[\]]+)|\[(\d{1,6})\]")


def apply_overrides(value: Any, overrides: Sequence[str], problems: Problems) -> tuple[Any, dict[Path, str]]:
    """A copy of `value` with `overrides` laid over it, and the path of each with how it is named in errors.

    Whether a path is known is for the schema to say: a missing mapping is made on the way. What cannot be followed at
    all (an index out of range, a path through a number) goes to `problems`.
    """
    value = copy.deepcopy(value)
    touched: dict[Path, str] = {}
    for text in overrides:
        key, equals, right = text.partition("=")
        where = f"override {key.strip() or text}"
        path = parse_path(key.strip())
        if not equals or path is None:
            mend = "write key=value, such as method.density=0.3 (options start with --)"
            problems.add(f"override {text}", "not of the form key=value", mend)
            continue
        try:
            new = yamlmarks.load(right, where).value
        except SpoliaError as error:
            problems.add(where, error.problems[0].what, "quote the whole override for the shell: 'key=[a, b]'")
            continue
        mistake = _put(value, path, new)
        if mistake:
            problems.add(where, *mistake)
        else:
            touched[path] = f"override {dotted(path)}"
    return value, touched


def parse_path(key: str) -> Path | None:
    """`pool.experts[0].path` (or `pool.experts.0.path`) as a path; None where it is not one."""
    if not re.fullmatch(r"[^.\[\]]+(\.[^.\[\]]+|\[\d{1,6}\])*", key):
        return None
    found = _PART.finditer(key)
    return tuple(int(m[2] or m[1]) if m[2] or re.fullmatch(r"\d{1,6}", m[1]) else m[1] for m in found)


def _put(value: Any, path: Path, new: Any) -> tuple[str, str] | None:
    """Sets `path` in `value`; where it cannot, says what is wrong and how to mend it."""
    here = value
    for depth, part in enumerate(path):
        at = dotted(path[:depth])
        if isinstance(here, list):
            if not isinstance(part, int):
                return f"`{at}` is a list; `{part}` is not an index", f"write {at}[0] to {at}[{len(here) - 1}]"
            if part >= len(here):
                return f"`{at}` has {len(here)} items; {part} is out of range", f"give the whole list: '{at}=[…]'"
        elif isinstance(here, dict):
            if isinstance(part, int):
                known = did_you_mean(str(part), [dotted((*path[:depth], k)) for k in here])
                return f"`{at}` is not a list", known or f"replace it whole: '{at}=…'"
            if depth < len(path) - 1 and here.get(part) is None:
                here[part] = {}
        else:
            return f"`{at}` is `{here}`; nothing can stand below it", f"replace it whole: '{at}=…'"
        if depth == len(path) - 1:
            here[part] = new
        else:
            here = here[part]
    return None
