"""Names and numbers as a person reads them. Nothing here fails on odd input: run folders are read as they are found."""

from __future__ import annotations

import math
import re
from typing import Any, TypeGuard

MISSING = "–"
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def text(value: Any, limit: int = 20_000) -> str:
    """`value` as text that is safe in XML and on a terminal: no control or direction marks, no lone surrogates."""
    plain = "" if value is None else str(value)
    plain = _CONTROL.sub("�", plain.replace("\r\n", "\n").replace("\r", "\n"))
    return plain if len(plain) <= limit else plain[:limit] + " …"


def name(value: Any, limit: int = 80) -> str:
    """One line of text, for names of methods, tasks and files."""
    return text(" ".join(text(value).split()), limit)


def number(value: Any) -> float | None:
    """`value` as a float (nan and inf stay), or None where it is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def finite(value: float | None) -> TypeGuard[float]:
    return value is not None and math.isfinite(value)


def fixed(value: float | None, digits: int, sign: bool = False) -> str:
    """`value` with `digits` decimals; missing values are a dash, a rounded zero has no sign."""
    if value is None:
        return MISSING
    if math.isfinite(value) and abs(value) >= 1e12:
        return f"{value:+.3g}" if sign else f"{value:.3g}"
    shown = f"{value:+.{digits}f}" if sign else f"{value:.{digits}f}"
    return shown.lstrip("+-") if math.isfinite(value) and not float(shown) else shown


def duration(seconds: Any) -> str:
    """`0.42 s`, `12.3 s`, `4 min 05 s`, `2 h 03 min`."""
    value = number(seconds)
    if value is None or not math.isfinite(value) or value < 0:
        return MISSING
    if value < 1:
        return f"{value:.2f} s"
    if value < 59.95:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def size(count: Any) -> str:
    """A number of bytes in binary units: `512 B`, `1.5 KiB`, `3.0 GiB`."""
    value = number(count)
    if value is None or not math.isfinite(value) or value < 0:
        return MISSING
    for unit in ("B", "KiB", "MiB", "GiB"):
        if value < 1024:
            return f"{value:.0f} B" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1024
    return f"{value:.1f} TiB"


def pairs(value: Any) -> list[tuple[str, str]]:
    """A mapping as (name, text) lines; nested values are written out on one line, empty ones left out."""
    if not isinstance(value, dict):
        return []
    return [
        (name(key).replace("_", " "), inline(item)) for key, item in value.items() if item not in (None, "", [], {})
    ]


def inline(value: Any, deep: int = 4) -> str:
    """`value` on one line, without the punctuation of code; what is nested more than `deep` levels is left out."""
    if isinstance(value, dict | list | tuple) and deep == 0:
        return "…"
    if isinstance(value, dict):
        return ", ".join(f"{name(key)} {inline(item, deep - 1)}" for key, item in value.items() if item is not None)
    if isinstance(value, list | tuple):
        return ", ".join(inline(item, deep - 1) for item in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float) and math.isfinite(value):
        return f"{value:.6g}"
    return name(value, 400) if value is not None else MISSING
