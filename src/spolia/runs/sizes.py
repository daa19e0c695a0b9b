"""Sizes in words: `5GB` is 5e9 bytes, `1GiB` is 2**30. mergekit's K, M, B (thousand, million, billion) work too."""

from __future__ import annotations

import re

from spolia.errors import SpoliaError

_SIZE = re.compile(r"^\s*(\d{1,30}(?:\.\d{1,30})?)\s*([a-z]*)\s*$", re.IGNORECASE | re.ASCII)
_DECIMAL = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
_BINARY = {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
_UNITS = {
    "": 1,
    "b": 10**9,  # mergekit's billion, not a byte
    **{unit.lower(): scale for unit, scale in (_DECIMAL | _BINARY).items()},
    **{unit[0].lower(): scale for unit, scale in _DECIMAL.items()},
}


def parse_size(value: str | int | float) -> int:
    """Bytes in `value`: a number, or text such as `5GB`, `512MB`, `1GiB`, `5B`. Raises ValueError otherwise."""
    match = _SIZE.match(str(value)) if not isinstance(value, bool) else None
    scale = _UNITS.get(match[2].lower()) if match else None
    if match is None or scale is None:
        raise ValueError("not a size")
    whole, _, fraction = match[1].partition(".")
    size = int(whole) * scale + int(fraction or 0) * scale // 10 ** len(fraction)  # exact where a float is not
    if size < 1:
        raise ValueError("a size is at least one byte")
    return size


def size_option(option: str, text: str) -> int:
    """`parse_size` of what was typed for `option`. Raises SpoliaError."""
    try:
        return parse_size(text)
    except ValueError as error:
        raise SpoliaError(f"`{text}`: {error}", where=option, mend="write 512MB, 5GB, 1GiB or bytes") from None


def write_size(size: int) -> str | int:
    """The shortest exact spelling: `5GB`, `1GiB`, or plain bytes. `parse_size(write_size(n)) == n`."""
    for unit, scale in sorted((_DECIMAL | _BINARY).items(), key=lambda pair: -pair[1]):
        if size % scale == 0:
            return f"{size // scale}{unit}"
    return size


def show_size(size: float) -> str:
    """Three figures for people: `1.34 GB`."""
    for unit, scale in reversed(_DECIMAL.items()):
        if size >= scale:
            return f"{size / scale:.3g} {unit}" if size < 999.5 * scale else f"{size / scale:.0f} {unit}"
    return f"{size:.0f} bytes"
