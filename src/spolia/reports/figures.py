"""Figures as data: checked, described in words, written as CSV. Drawing them is the work of plots.

A figure is one of figures.json: kind lines, points, bars, matrix, images (see sheets) or texts. `bars` may mark a series
with `"baseline": true`; `lines` with `"log": true` have a logarithmic scale; `texts` has a text for each of its `rows`.
"""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass, replace
from typing import Any

from spolia.reports import sheets, words
from spolia.reports.ledger import AVERAGE, Table

NOT_A_CURVE = frozenset({"time", "phase", "step", "epoch", "seed", "total"})
MOST_CURVES = 12
MOST_SERIES = 40
MOST_GROUPS = 30
LONGEST_TEXT = 600  # characters


@dataclass(frozen=True)
class Series:
    """One line or one set of bars. `x` is empty for bars; nan stands for a value that is missing."""

    name: str
    x: tuple[float, ...]
    y: tuple[float, ...]
    low: tuple[float, ...] = ()
    high: tuple[float, ...] = ()
    baseline: bool = False


@dataclass(frozen=True)
class Figure:
    """A figure that can be drawn. `rows` × `columns` name the entries of a matrix, or images; texts are named by `rows`."""

    kind: str  # lines | points | bars | matrix | images | texts
    title: str
    caption: str = ""
    x_label: str = ""
    y_label: str = ""
    series: tuple[Series, ...] = ()
    groups: tuple[str, ...] = ()
    rows: tuple[str, ...] = ()
    columns: tuple[str, ...] = ()
    values: tuple[tuple[float, ...], ...] = ()
    shape: tuple[int, ...] = ()
    pixels: bytes = b""
    texts: tuple[str, ...] = ()
    log: bool = False


def read_figure(data: Any) -> Figure:
    """The figure that an entry of figures.json describes. What cannot be drawn is a ValueError that says why."""
    if not isinstance(data, dict):
        raise ValueError("it is not a mapping")
    kind, unit = data.get("kind"), words.name(data.get("unit"))
    title = words.name(data.get("title"), 160) or "untitled"
    y_label = words.name(data.get("y_label"))
    if unit and f"({unit})" not in y_label:
        y_label = f"{y_label} ({unit})" if y_label else unit
    figure = Figure(str(kind), title, words.text(data.get("caption"), 2000), words.name(data.get("x_label")), y_label)
    if kind in ("lines", "points"):
        series = tuple(_series(item, "y", with_x=True) for item in _list(data, "series"))
        return replace(figure, series=_needed(series, "series"), log=kind == "lines" and bool(data.get("log")))
    if kind == "texts":
        return _texts(data, figure)
    if kind == "bars":
        groups = tuple(words.name(group) for group in _list(data, "groups"))
        series = tuple(_series(item, "values", length=len(groups)) for item in _list(data, "series"))
        return replace(figure, series=_needed(series, "series"), groups=_needed(groups, "groups"))
    if kind == "matrix":
        rows, columns = (tuple(words.name(v) for v in _list(data, key)) for key in ("rows", "columns"))
        values = tuple(_numbers(row, len(_needed(columns, "columns"))) for row in _list(data, "values"))
        if len(values) != len(_needed(rows, "rows")):
            raise ValueError(f"it names {len(rows)} rows and holds {len(values)}")
        return replace(figure, rows=rows, columns=columns, values=values)
    if kind == "images":
        rows, columns = (tuple(words.name(v) for v in _list(data, key)) for key in ("rows", "columns"))
        counts = len(_needed(rows, "rows")), len(_needed(columns, "columns"))
        shape, pixels = sheets.read_pixels(data, *counts)
        return replace(figure, rows=rows, columns=columns, shape=shape, pixels=pixels)
    raise ValueError(f"no figure is of kind `{words.name(kind)}`; known: lines, points, bars, matrix, images, texts")


def _texts(data: dict[str, Any], figure: Figure) -> Figure:
    rows = tuple(words.name(value) for value in _list(data, "rows"))
    texts = tuple(words.name(value, LONGEST_TEXT) for value in _list(data, "texts"))
    if len(texts) != len(_needed(rows, "rows")):
        raise ValueError(f"it names {len(rows)} rows and holds {len(texts)} texts")
    return replace(figure, rows=rows, texts=texts)


def _needed(items: tuple, what: str) -> tuple:
    if not items:
        raise ValueError(f"it has no {what}")
    return items


def _list(data: dict[str, Any], key: str) -> list[Any]:
    if not isinstance(data.get(key), list):
        raise ValueError(f"`{key}` is not a list")
    return data[key]


def _numbers(values: Any, length: int | None = None) -> tuple[float, ...]:
    if not isinstance(values, list):
        raise ValueError("its numbers are not in a list")
    if length is not None and len(values) != length:
        raise ValueError(f"{len(values)} numbers for {length} places")
    return tuple(float("nan") if (v := words.number(value)) is None else v for value in values)


def _series(item: Any, key: str, with_x: bool = False, length: int | None = None) -> Series:
    if not isinstance(item, dict):
        raise ValueError("a series is not a mapping")
    y = _numbers(item.get(key), length)
    x = _numbers(item.get("x"), len(y)) if with_x else ()
    low, high = (_numbers(item[k], len(y)) if item.get(k) else () for k in ("low", "high"))
    return Series(words.name(item.get("name")), x, y, low, high, bool(item.get("baseline")))


def task_bars(table: Table) -> Figure:
    """A bar for each method and task of a table, with the intervals it states."""
    nan = float("nan")
    series = []
    for line in table.lines:
        numbers = [
            [nan if c is None or (v := getattr(c, key)) is None else v for c in line.cells]
            for key in ("mean", "low", "high")
        ]
        series.append(Series(line.method, (), *(tuple(n) for n in numbers), baseline=line.baseline))
    groups = tuple(c.capitalize() if c == AVERAGE else c for c in table.columns)
    title = f"{table.metric[:1].upper()}{table.metric[1:]} by task"
    figure = Figure("bars", title, y_label=table.heading, series=tuple(series), groups=groups)
    hatched = not is_grouped(figure) and any(line.baseline for line in table.lines)
    said = [("Whiskers are the intervals of the table.", table.has_interval), ("Hatched bars are baselines.", hatched)]
    return replace(figure, caption=" ".join(text for text, holds in said if holds))


def is_grouped(figure: Figure) -> bool:
    """Whether the bars of a group stand beside each other, in colours; else every group has a panel."""
    return len(figure.series) <= 4 and len(figure.groups) <= 12


def learning_curves(metrics: list[dict[str, Any]]) -> list[Figure]:
    """A figure for each number in metrics.jsonl, a line for each phase. Of a step logged twice the last counts."""
    curves: dict[str, dict[str, dict[float, float]]] = {}
    for entry in metrics:
        step, at = words.number(entry.get("step")), words.number(entry.get("time"))
        x = step if words.finite(step) else at
        if not words.finite(x):
            continue
        for key, value in entry.items():
            y = words.number(value)
            if y is not None and key not in NOT_A_CURVE:
                curves.setdefault(words.name(key), {}).setdefault(words.name(entry.get("phase")), {})[x] = y
    figures = []
    for key, phases in curves.items():
        series = tuple(
            Series(phase or key, tuple(sorted(points)), tuple(points[x] for x in sorted(points)))
            for phase, points in phases.items()
            if len(points) > 1
        )
        if series:
            figures.append(Figure("lines", key.replace("_", " ").capitalize(), "", "step", key, series))
    return figures[:MOST_CURVES]


def drawable(figure: Figure) -> tuple[Figure, str]:
    """The part of a figure that a page can hold, and a sentence on what is not drawn (empty where all is)."""
    if figure.kind in ("matrix", "images", "texts"):
        return figure, ""
    series, groups = figure.series[:MOST_SERIES], figure.groups[:MOST_GROUPS]
    cut = replace(figure, groups=groups, series=series)
    if figure.kind == "bars" and len(groups) < len(figure.groups):
        keep = len(groups)
        cut = replace(cut, series=tuple(replace(s, y=s.y[:keep], low=s.low[:keep], high=s.high[:keep]) for s in series))
    told = [(len(series), len(figure.series), "series"), (len(groups), len(figure.groups), "groups")]
    missing = [f"the first {some} of {every} {what}" for some, every, what in told if some < every]
    return cut, f"Drawn are {' and '.join(missing)}; the numbers hold all." if missing else ""


def to_csv(figure: Figure) -> str:
    """The figure's numbers in full, one line a value."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    if figure.kind == "matrix":
        writer.writerow(["row", "column", "value"])
        for row, values in zip(figure.rows, figure.values, strict=True):
            writer.writerows([row, column, value] for column, value in zip(figure.columns, values, strict=True))
        return out.getvalue()
    if figure.kind == "texts":
        writer.writerow(["row", "text"])
        writer.writerows(zip(figure.rows, figure.texts, strict=True))
        return out.getvalue()
    if figure.kind == "images":
        writer.writerow(["row", "column", "mean", "deviation"])
        writer.writerows(sheets.sheet_lines(figure))
        return out.getvalue()
    writer.writerow(["series", "group" if figure.kind == "bars" else "x", "value", "low", "high"])
    for series in figure.series:
        places = figure.groups if figure.kind == "bars" else series.x
        blank = ("",) * len(series.y)
        lines = zip(places, series.y, series.low or blank, series.high or blank, strict=True)
        writer.writerows([series.name, *values] for values in lines)
    return out.getvalue()


def describe(figure: Figure) -> str:
    """What the figure shows, for a reader who cannot see it."""
    if figure.kind == "matrix":
        values = [v for row in figure.values for v in row if words.finite(v)]
        span = f" Values run from {min(values):.4g} to {max(values):.4g}." if values else ""
        return f"Matrix of {_some(figure.rows, 'rows')} by {_some(figure.columns, 'columns')}.{span}"
    if figure.kind == "texts":
        return " ".join(f"{row}: {text}." for row, text in zip(figure.rows[:4], figure.texts, strict=False))
    if figure.kind == "images":
        return f"{len(figure.columns)} images each of {_some(figure.rows, 'rows')}."
    names = _some(tuple(s.name for s in figure.series), "series")
    if figure.kind == "points":
        counts = "; ".join(f"{s.name}: {len(s.y)}" for s in figure.series[:8])
        return f"Points of {figure.y_label or 'y'} against {figure.x_label or 'x'} for {names}. {counts}."
    if figure.kind == "lines":
        ends = [f"{s.name} ends at {s.y[-1]:.4g}" for s in figure.series if s.y and words.finite(s.y[-1])]
        return f"{figure.y_label or 'Value'} against {figure.x_label or 'x'} for {names}. {'; '.join(ends[:8])}."
    last = [(s.y[-1], s.name) for s in figure.series if words.finite(s.y[-1])]
    span = (
        f" {figure.groups[-1]}: from {min(last)[0]:.4g} ({min(last)[1]}) to {max(last)[0]:.4g} ({max(last)[1]})."
        if last
        else ""
    )
    return f"{figure.y_label or 'Value'} of {names} for {_some(figure.groups, 'groups')}.{span}"


def _some(names: tuple[str, ...], what: str) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{len(names)} {what}"
