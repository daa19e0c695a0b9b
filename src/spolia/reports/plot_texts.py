"""The figure that is text: rows with their names, what each says beside it."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from spolia.reports import words

if TYPE_CHECKING:
    from matplotlib.figure import Figure as Canvas

    from spolia.reports.figures import Figure

NAMES, LETTERS = 36, 112  # of a line
_LINE, _GAP, _TEXTS_AT = 0.15, 0.5, 0.26  # inches; lines between rows; where texts begin, of the width


def draw_texts(canvas: Canvas, figure: Figure) -> None:
    """Names on the left, texts wrapped on the right."""
    names = [textwrap.wrap(row, NAMES) or [""] for row in figure.rows]
    texts = [textwrap.wrap(text, LETTERS) or [words.MISSING] for text in figure.texts]
    heights = [max(len(name), len(text)) for name, text in zip(names, texts, strict=True)]
    total = sum(heights) + _GAP * len(heights)
    canvas.set_figheight(_LINE * total + 0.1)
    axes = canvas.add_subplot()
    axes.set_axis_off()
    axes.set_xlim(0, 1)
    axes.set_ylim(total, 0)
    place = _GAP / 2
    for name, text, height in zip(names, texts, heights, strict=True):
        for at, lines in ((0.0, name), (_TEXTS_AT, text)):
            for i, line in enumerate(lines):
                axes.text(at, place + i, line, va="top", ha="left")
        place += height + _GAP
