"""Figures as inline SVG: text stays text, ink follows the page's colour, equal input gives equal bytes.

Colours are Okabe and Ito's (2008), apart for colour-blind readers too; markers, dashes and hatching say the same.
Nothing global is touched: no pyplot, settings only inside a context.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from html import escape
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

from spolia.reports import words
from spolia.reports.figures import Figure, Series, describe, is_grouped
from spolia.reports.plot_texts import draw_texts
from spolia.reports.sheets import draw_sheet

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure as Canvas

INK = "#010101"  # stands for the page's text colour until the SVG is written
PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", INK)
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
DASHES = ("-", "--", "-.", ":")
HATCHES = ("", "///", "...", "\\\\\\", "xxx", "---", "|||")
FULL, HALF = 9.2, 4.4  # inches
SCALE = 1.56  # pixels on the page for a point: text of 7.5 points is read at 11.7
MOST_POINTS = 600
MOST_DRAWN = 1e30  # beyond this, axis limits overflow
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "spolia",
    "text.parse_math": False,
    "axes.unicode_minus": True,
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "hatch.linewidth": 0.6,
    "legend.frameon": False,
    "legend.fontsize": 7.5,
    "lines.linewidth": 1.4,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "axes.linewidth": 0.6,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}


def draw(figure: Figure, name: str) -> str:
    """`figure` as an `<svg>` element whose every id starts with `name`, so that many may stand on one page."""
    import matplotlib
    from matplotlib.figure import Figure as Canvas

    drawers = {"lines": _lines, "points": _points, "bars": _bars, "matrix": _matrix, "texts": draw_texts}
    drawers["images"] = draw_sheet
    out = io.StringIO()
    # Names in other scripts are no cause for alarm: the reader's own font draws them, only the layout is a guess.
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        canvas = Canvas(figsize=(FULL if is_wide(figure) else HALF, 3), layout="constrained")
        drawers[figure.kind](canvas, figure)
        canvas.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return _inline(out.getvalue(), figure, name)


def is_wide(figure: Figure) -> bool:
    """Whether the figure needs the page's whole width, or stands beside another."""
    if figure.kind in ("matrix", "images"):
        return len(figure.columns) > 6
    if figure.kind == "texts":
        return True
    return len(figure.series) > (4 if figure.kind == "bars" else 8) or len(figure.groups) > 6


def standalone(svg: str) -> str:
    """The same drawing as a file of its own."""
    return svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ', 1)


def _inline(svg: str, figure: Figure, name: str) -> str:
    body = re.search(r"<svg\b([^>]*)>(.*)</svg>", svg, re.DOTALL)
    assert body is not None
    box = re.search(r'viewBox="([^"]+)"', body[1])
    assert box is not None
    inside = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", body[2], flags=re.DOTALL)
    inside = re.sub(r"<[^>]+>", lambda tag: _own(tag[0], name), inside)  # tags only: text may contain anything
    inside = re.sub(r">\s+<", "><", inside)
    title = f'<title id="{name}-title">{escape(figure.title)}</title>'
    desc = f'<desc id="{name}-desc">{escape(describe(figure))}</desc>'
    width = float(box[1].split()[2]) * SCALE
    look = f"stroke-linejoin: round; font-family: system-ui, sans-serif; max-width: {width:.0f}px"
    start = f'<svg role="img" aria-labelledby="{name}-title {name}-desc" viewBox="{box[1]}" style="{look}">'
    return f"{start}{title}{desc}{inside.strip()}</svg>"


def _own(tag: str, name: str) -> str:
    """`tag` with its ids made this figure's own, its ink the page's, and no font of ours."""
    tag = re.sub(r'^<g id="[^"]*"', "<g", tag)  # nothing refers to groups
    tag = tag.replace("xlink:href", "href").replace(INK, "currentColor")
    tag = re.sub(r'\b(id="|href="#|url\(#)', rf"\g<1>{name}-", tag)
    tag = re.sub(r"font-family: [^;\"]*;? ?", "", tag)
    tag = re.sub(r' transform="rotate\(-?0 [^"]*"', "", tag)
    return re.sub(r"(\d+\.\d\d)\d+", r"\1", tag) if not tag.startswith("<image") else tag


def _short(text: str, limit: int = 40) -> str:
    shown = text if len(text) <= limit else text[: limit - 1] + "…"
    return "\u200b" + shown if shown.startswith("_") else shown  # a legend leaves out labels that start with _


def _clip(values: tuple[float, ...]) -> list[float]:
    return [v if math.isfinite(v) and abs(v) < MOST_DRAWN else math.nan for v in values]


def _frame(axes: Axes, grid: Literal["x", "y", "both"]) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, color=INK, alpha=0.14, linewidth=0.6)
    axes.set_axisbelow(True)


def _thin(series: Series) -> list[int]:
    """Which points to draw: all, or the lowest and highest of each stretch, so that no spike is lost."""
    count = len(series.y)
    if count <= MOST_POINTS:
        return list(range(count))
    kept = {0, count - 1}
    bounds = [round(i * count / (MOST_POINTS // 2)) for i in range(MOST_POINTS // 2 + 1)]
    for start, stop in pairwise(bounds):
        known = [i for i in range(start, stop) if words.finite(series.y[i])]
        if known:
            kept |= {min(known, key=series.y.__getitem__), max(known, key=series.y.__getitem__)}
    return sorted(kept)


def _legend(canvas: Canvas, handles: list, names: list[str]) -> float:
    """A legend above the axes, as many names a line as fit; the inches it takes."""
    room = int(17 * canvas.get_figwidth() / (max(map(len, names)) + 8.5))  # 17 letters an inch, 8.5 for a mark and gaps
    lines = math.ceil(len(names) / max(1, room))
    columns = math.ceil(len(names) / lines)
    canvas.legend(handles, names, loc="outside upper left", ncols=columns, handlelength=2.2, columnspacing=1.6)
    return 0.16 * lines


def _lines(canvas: Canvas, figure: Figure) -> None:
    from matplotlib.ticker import MaxNLocator

    axes = canvas.add_subplot()
    handles = []
    for i, series in enumerate(figure.series):
        kept = _thin(series)
        pick = lambda values: _clip(tuple(values[k] for k in kept))  # noqa: B023, E731
        x, colour = pick(series.x), PALETTE[i % len(PALETTE)]
        style = {"linestyle": DASHES[(i // len(PALETTE)) % len(DASHES)], "marker": MARKERS[i % len(MARKERS)]}
        # a marker about every eighth of the way, shifted so that those of other lines do not fall on it
        every = (i * max(1, len(x) // 40), max(1, len(x) // 8)) if len(x) > 12 else None
        handles += axes.plot(x, pick(series.y), color=colour, markersize=3.6, markevery=every, **style)
        if series.low and series.high:
            axes.fill_between(x, pick(series.low), pick(series.high), color=colour, alpha=0.16, linewidth=0)
    if figure.log and any(value > 0 for series in figure.series for value in series.y):
        axes.set_yscale("log", nonpositive="mask")
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")  # its own labels are formulas
        axes.yaxis.set_minor_formatter("")
    _frame(axes, "both")
    axes.margins(x=0.015)
    if all(float(x).is_integer() for series in figure.series for x in series.x):
        axes.xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 5, 10], integer=True))
    axes.set_xlabel(_short(figure.x_label, 60))
    axes.set_ylabel(_short(figure.y_label, 40))
    names = [_short(s.name) for s in figure.series]
    canvas.set_figheight(2.1 + (_legend(canvas, handles, names) if len(names) > 1 or names[0] else 0))


def _points(canvas: Canvas, figure: Figure) -> None:
    axes = canvas.add_subplot()
    handles = []
    for i, series in enumerate(figure.series):
        kept = range(0, len(series.y), math.ceil(len(series.y) / MOST_POINTS) or 1)
        x, y = (_clip(tuple(values[k] for k in kept)) for values in (series.x, series.y))
        look = {"color": PALETTE[i % len(PALETTE)], "marker": MARKERS[i % len(MARKERS)], "alpha": 0.7}
        size = 3 if len(series.y) > 20 else 6
        handles += axes.plot(x, y, linestyle="none", markersize=size, markeredgewidth=0, **look)
    _frame(axes, "both")
    axes.set_xlabel(_short(figure.x_label, 60))
    axes.set_ylabel(_short(figure.y_label, 40))
    names = [_short(s.name) for s in figure.series]
    canvas.set_figheight(2.6 + (_legend(canvas, handles, names) if len(names) > 1 or names[0] else 0))


def _errors(series: Series) -> list[list[float]] | None:
    if not (series.low and series.high):
        return None
    y = _clip(series.y)
    below = [max(0.0, a - b) if b == b else math.nan for a, b in zip(y, _clip(series.low), strict=True)]
    above = [max(0.0, b - a) if b == b else math.nan for a, b in zip(y, _clip(series.high), strict=True)]
    return [below, above]


def _bars(canvas: Canvas, figure: Figure) -> None:
    (_grouped if is_grouped(figure) else _panels)(canvas, figure)


_WHISKER = {"ecolor": INK, "elinewidth": 0.8, "capsize": 1.6, "capthick": 0.8}


def _grouped(canvas: Canvas, figure: Figure) -> None:
    """Few series: they stand side by side in each group, with a legend."""
    axes = canvas.add_subplot()
    width = 0.8 / len(figure.series)
    handles = []
    for i, series in enumerate(figure.series):
        places = [k + (i - (len(figure.series) - 1) / 2) * width for k in range(len(figure.groups))]
        look = {"color": PALETTE[i], "edgecolor": "white", "hatch": HATCHES[i], "linewidth": 0}
        handles.append(
            axes.bar(places, _clip(series.y), width * 0.92, yerr=_errors(series), error_kw=dict(_WHISKER), **look)
        )
    _frame(axes, "y")
    axes.set_xticks(
        range(len(figure.groups)),
        [_short(g, max(6, int(12 * canvas.get_figwidth()) // len(figure.groups))) for g in figure.groups],
    )
    axes.tick_params(axis="x", length=0)
    heights = [value for series in figure.series for value in _clip(series.y) if value == value]
    if heights and not any(heights):
        axes.set_ylim(0, 1)  # else bars of height 0 hover over a scale that goes below it
    axes.set_ylabel(_short(figure.y_label, 40))
    names = [_short(s.name) for s in figure.series]
    canvas.set_figheight(2.1 + (_legend(canvas, handles, names) if len(names) > 1 or names[0] else 0))


def _panels(canvas: Canvas, figure: Figure) -> None:
    """Many series: a row for each, a panel for each group, five panels abreast."""
    count, across = len(figure.groups), min(5, len(figure.groups))
    down = math.ceil(count / across)
    rows = range(len(figure.series))
    looks: dict[bool, dict] = {
        True: {"color": "none", "edgecolor": INK, "hatch": "/////", "alpha": 0.55, "linewidth": 0.6},
        False: {"color": PALETTE[0], "linewidth": 0},
    }
    values = [_clip(series.y) for series in figure.series]
    errors = [_errors(series) or [[math.nan] * count] * 2 for series in figure.series]
    panels = canvas.subplots(down, across, sharex=True, sharey=True, squeeze=False)
    for k in range(down * across):
        axes = panels[k // across][k % across]
        if k >= count:
            axes.set_visible(False)
            continue
        for marked, look in looks.items():
            chosen = [i for i in rows if figure.series[i].baseline is marked]
            axes.barh(chosen, [values[i][k] for i in chosen], height=0.6, **look)
        widths = [[e[side][k] for e in errors] for side in (0, 1)]
        axes.errorbar([v[k] for v in values], rows, xerr=widths, fmt="none", **_WHISKER)
        _frame(axes, "x")
        axes.spines["left"].set_visible(False)
        axes.axvline(0, color=INK, linewidth=0.6)
        axes.tick_params(axis="y", length=0)
        axes.set_title(_short(figure.groups[k], 22), loc="left")
    panels[0][0].set_yticks(rows, [_short(s.name) for s in figure.series])
    panels[0][0].set_ylim(len(figure.series) - 0.4, -0.6)
    canvas.supxlabel(_short(figure.y_label, 60), fontsize=7.5)
    canvas.set_figheight(0.35 + down * (0.35 + 0.155 * len(figure.series)))


def _matrix(canvas: Canvas, figure: Figure) -> None:
    from matplotlib import colormaps

    axes = canvas.add_subplot()
    values = [_clip(row) for row in figure.values]
    known = [v for row in values for v in row if v == v] or [0.0]
    low, high = min(known), max(known)
    if low < 0 < high:  # two directions from zero
        low, high, colours = -max(-low, high), max(-low, high), colormaps["PuOr"]
    else:
        colours = colormaps["cividis"]
    drawn = axes.imshow(
        values, cmap=colours, vmin=low, vmax=high if high > low else low + 1, aspect="auto", interpolation="none"
    )
    down, across = len(figure.rows), len(figure.columns)
    if down * across <= 200 and across <= 14:
        for i, row in enumerate(values):
            for k, value in enumerate(row):
                shade = colours((value - low) / (high - low)) if value == value and high > low else (0, 0, 0, 0)
                light = 0.299 * shade[0] + 0.587 * shade[1] + 0.114 * shade[2]
                ink = INK if not shade[3] else "#000000" if light > 0.5 else "#ffffff"
                axes.text(
                    k, i, words.MISSING if value != value else f"{value:.3g}", ha="center", va="center", color=ink
                )
    else:
        canvas.colorbar(drawn, ax=axes, shrink=0.9, pad=0.01).outline.set_visible(False)
    room = int(11 * canvas.get_figwidth())  # characters that the column names may take together
    for count, names, axis, most in ((down, figure.rows, axes.yaxis, 40), (across, figure.columns, axes.xaxis, 14)):
        step = math.ceil(count / most)
        limit = 20 if axis is axes.yaxis else max(6, room // min(most, count))
        axis.set_ticks(range(0, count, step), [_short(n, limit) for n in names[::step]])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_xlabel(_short(figure.x_label, 60))
    axes.set_ylabel(_short(figure.y_label, 40))
    canvas.set_figheight(min(7.0, 0.7 + 0.27 * down))
