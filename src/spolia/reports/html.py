"""The report of a run: one self-contained page that needs no network and no script.

Made from the run folder alone, so it can be written while the run goes on, after an interruption, or years later.
"""

from __future__ import annotations

import base64
import os
import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from spolia.reports import figures, plots, words
from spolia.reports.facts import bounded, gather, verdict
from spolia.reports.folder import RunRecord, read_run
from spolia.reports.ledger import Table, all_tables
from spolia.reports.tables import show_value, to_csv

MOST_BYTES = 3_000_000
FEW = 3  # points that make no curve
FIGURE_BYTES = 2_200_000  # for all drawings and their downloads together; the rest of the page is bounded below


@dataclass(frozen=True)
class Drawing:
    """A figure on the page. `svg` is empty where it did not fit; `picture` and `numbers` are data: addresses."""

    id: str
    title: str
    caption: str
    svg: str
    wide: bool
    file: str
    picture: str
    numbers: str


def write_report(folder: Path | str) -> Path:
    """Write `report.html` into a run folder, finished or not, replacing an older one in one step. Returns its path."""
    run = read_run(folder)
    target = run.path / "report.html"
    draft = run.path / f".report.{os.getpid()}.tmp"
    draft.write_bytes(page(run).encode("utf-8", "replace"))
    draft.replace(target)
    return target


def page(run: RunRecord) -> str:
    """The whole page. Drawings are left out in the end rather than let it grow past MOST_BYTES."""
    tables = all_tables(run.results)
    drawings, gaps = _drawings(run, tables)
    facts = gather(run, tables) | {"gaps": run.gaps + gaps}
    facts["tables_csv"] = _address("text/csv", to_csv(*tables)) if tables else ""
    template = environment().get_template("report.html.j2")
    whole = template.render(facts, drawings=drawings)
    if len(whole.encode("utf-8", "replace")) < MOST_BYTES:
        return whole
    facts["gaps"].append("the page grew too large and has no figures; their numbers are in the run folder")
    return template.render(facts, drawings={})


def _minus(shown: str) -> str:
    return re.sub(r"-(?=[\d.i])", "\N{MINUS SIGN}", shown)


def _coded(said: str) -> Any:
    """Text in which `words` stand as code."""
    from markupsafe import Markup, escape

    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(said))))


@cache
def environment() -> Any:
    """Jinja for the templates of this room; what goes into them is escaped."""
    from jinja2 import Environment, FunctionLoader, StrictUndefined

    here = FunctionLoader(lambda file: files("spolia.reports").joinpath(file).read_text(encoding="utf-8"))
    room = Environment(loader=here, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    room.filters |= {"minus": _minus, "coded": _coded}
    tools: dict[str, Any] = {"show_value": show_value, "verdict": verdict}
    room.globals |= tools | {"size": words.size, "name": words.name, "fixed": words.fixed}
    return room


def _address(kind: str, content: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(content.encode('utf-8', 'replace')).decode()}"


def _drawings(run: RunRecord, tables: list[Table]) -> tuple[dict[str, list[Drawing]], list[str]]:
    """Every figure of the page by section, and a sentence for each that could not be drawn."""
    gaps: list[str] = []
    wanted = [("bars", figures.task_bars(bounded(table))) for table in tables[:1]]
    for i, data in enumerate(run.figures, 1):
        try:
            wanted.append(("own", figures.read_figure(data)))
        except ValueError as error:
            gaps.append(f"figure {i} of figures.json could not be drawn: {error}")
    curves = figures.learning_curves(run.metrics)
    wanted += [("curves", figure) for figure in curves if any(len(series.x) > FEW for series in figure.series)]
    drawn: dict[str, list[Drawing]] = {"bars": [], "own": [], "curves": []}
    left = FIGURE_BYTES
    for i, (section, figure) in enumerate(wanted, 1):
        drawing = _drawing(figure, f"figure-{i}")
        cost = len(drawing.svg) + len(drawing.picture) + len(drawing.numbers)
        if cost > left:
            gaps.append(
                f"the figure “{figure.title}” was left out to keep the page small; its numbers are in the run folder"
            )
            continue
        left -= cost
        drawn[section].append(drawing)
    return drawn, gaps


def _drawing(figure: figures.Figure, place: str) -> Drawing:
    from markupsafe import Markup

    figure_drawn, cut = figures.drawable(figure)
    svg = plots.draw(figure_drawn, place)
    file = re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")[:60] or place
    caption = f"{figure.caption} {cut}".strip()
    picture, numbers = _address("image/svg+xml", plots.standalone(svg)), _address("text/csv", figures.to_csv(figure))
    return Drawing(place, figure.title, caption, Markup(svg), plots.is_wide(figure_drawn), file, picture, numbers)
