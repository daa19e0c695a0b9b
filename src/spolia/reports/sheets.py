"""Contact sheets: small images in rows, one row a class, as data in figures.json and as a drawing.

    {"kind": "images", "rows": [names], "columns": [names], "shape": [channels, height, width], "pixels": base64 of uint8}

Pixels stand row by row, image by image, in the order of `shape`.
"""

from __future__ import annotations

import base64
import binascii
from typing import TYPE_CHECKING, Any

from spolia.reports import words

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure as Canvas

MOST_BYTES = 1_500_000  # of pixels: the page must stay small
_GAP = 1  # pixel between images


def read_pixels(data: dict[str, Any], rows: int, columns: int) -> tuple[tuple[int, ...], bytes]:
    """Shape and pixels of an entry. A ValueError says what cannot be drawn."""
    shape = data.get("shape")
    if not isinstance(shape, list) or len(shape) != 3 or not all(isinstance(n, int) and 0 < n < 1000 for n in shape):
        raise ValueError("`shape` is not [channels, height, width]")
    if shape[0] not in (1, 3):
        raise ValueError(f"{shape[0]} channels are neither grey nor colour")
    try:
        raw = base64.b64decode(data.get("pixels", ""), validate=True)
    except (binascii.Error, TypeError, ValueError):
        raise ValueError("`pixels` is not base64") from None
    wanted = rows * columns * shape[0] * shape[1] * shape[2]
    if len(raw) != wanted or wanted > MOST_BYTES:
        raise ValueError(f"it holds {len(raw)} pixels, {wanted} are named, at most {MOST_BYTES} are drawn")
    return tuple(shape), raw


def tiled(rows: int, columns: int, shape: tuple[int, ...], pixels: bytes) -> np.ndarray:
    """One image of all, with gaps in mid grey: uint8 [height, width, 3]."""
    import numpy as np

    channels, height, width = shape
    held = np.frombuffer(pixels, dtype=np.uint8).reshape(rows, columns, channels, height, width)
    held = np.broadcast_to(held, (rows, columns, 3, height, width)).transpose(0, 3, 1, 4, 2)
    whole = np.full((rows, height + _GAP, columns, width + _GAP, 3), 128, dtype=np.uint8)
    whole[:, :height, :, :width] = held
    return whole.reshape(rows * (height + _GAP), columns * (width + _GAP), 3)[: -_GAP or None, : -_GAP or None]


def draw_sheet(canvas: Canvas, figure: Any) -> None:
    """The sheet with the name of every row beside it."""
    axes = canvas.add_subplot()
    rows, (_, height, _) = len(figure.rows), figure.shape
    whole = tiled(rows, len(figure.columns), figure.shape, figure.pixels)
    axes.imshow(whole, interpolation="nearest")
    places = [row * (height + _GAP) + (height - 1) / 2 for row in range(rows)]
    axes.set_yticks(places, [words.name(name, 28) for name in figure.rows])
    axes.set_xticks([])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    share = whole.shape[0] / max(1, whole.shape[1])
    canvas.set_figheight(max(0.6, min(9.0, 0.2 + 0.78 * canvas.get_figwidth() * share)))


def sheet_lines(figure: Any) -> list[list[Any]]:
    """Row, column, mean and deviation of every image, in 0 … 1."""
    import numpy as np

    rows, columns = len(figure.rows), len(figure.columns)
    held = np.frombuffer(figure.pixels, dtype=np.uint8).reshape(rows, columns, -1) / 255
    return [
        [row, column, round(float(held[i, k].mean()), 4), round(float(held[i, k].std()), 4)]
        for i, row in enumerate(figure.rows)
        for k, column in enumerate(figure.columns)
    ]
