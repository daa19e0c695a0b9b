"""The main table for a terminal, Markdown, LaTeX and CSV. A mark, not colour alone, shows the best method."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from spolia.errors import SpoliaError, did_you_mean
from spolia.reports import words
from spolia.reports.folder import read_run
from spolia.reports.ledger import AVERAGE, Cell, Difference, Table, all_tables, main_table

if TYPE_CHECKING:
    from rich.table import Table as RichTable

__all__ = [
    "Table",
    "all_tables",
    "escape_markdown",
    "main_table",
    "render",
    "to_csv",
    "to_latex",
    "to_markdown",
    "to_rich",
    "to_text",
    "written",
]


def show_value(cell: Cell | Difference | None, digits: int, style: str = "interval") -> str:
    """`93.2 [91.0, 95.1]`, `93.2 ±2.1` (style half) or `93.2` (style mean); a difference carries its sign."""
    if cell is None:
        return words.MISSING
    sign = isinstance(cell, Difference)
    mean = words.fixed(cell.mean, digits, sign)
    if style == "mean" or cell.mean is None or cell.low is None or cell.high is None:
        return mean
    if style == "half":
        return f"{mean} ±{words.fixed((cell.high - cell.low) / 2, digits)}"
    return f"{mean} [{words.fixed(cell.low, digits, sign)}, {words.fixed(cell.high, digits, sign)}]"


Finish = Callable[[str], str]
STYLES = {  # widest first: the form of the task columns, that of the last ones (average, difference), its name
    "interval": ("interval", "interval", "mean [low, high]"),
    "half": ("half", "half", "mean ± half the interval"),
    "average": ("mean", "half", "mean, and ± half the interval where it fits"),
    "mean": ("mean", "mean", "mean"),
}


def _grid(table: Table, style: str, best: Finish, plain: Finish, baseline: str) -> list[list[str]]:
    """Header and lines as text; `best` and `plain` finish a value. The last column is the paired difference, if any."""
    against = table.against
    inner, outer, _ = STYLES[style]
    header = ["method", *(c.capitalize() if c == AVERAGE else c for c in table.columns)]
    several = len({line.difference.against for line in table.lines if line.difference}) > 1
    grid = [header + (["difference" if several else f"vs {against}"] if against else [])]
    for line in table.lines:
        styles = [outer if column == AVERAGE else inner for column in table.columns]
        shown = zip(line.cells, styles, strict=True)
        values = [(best if c and c.best else plain)(show_value(c, table.digits, s)) for c, s in shown]
        last = [plain(show_value(line.difference, table.digits, outer))] if against else []
        if several and line.difference:
            last = [f"{last[0].rstrip()} vs {line.difference.against}"]
        grid.append([line.method + (baseline if line.baseline else ""), *values, *last])
    return grid


def _fitting(table: Table, width: int | None) -> tuple[list[list[str]], str]:
    """The grid in the fullest style that `width` columns hold, and the caption that goes with it."""
    style, grid = "", []
    for style in STYLES:
        grid = _grid(table, style, lambda value: value + "*", lambda value: value + " ", " (b)")
        if width is None or sum(max(map(len, column)) + 2 for column in zip(*grid, strict=True)) <= width:
            break
    marks = ["* best method"] if table.marks_best else []
    marks += ["(b) baseline"] if any(line.baseline for line in table.lines) else []
    return grid, "; ".join([table.caption.replace(STYLES["interval"][2], STYLES[style][2]), *marks])


def to_text(table: Table, width: int | None = None) -> str:
    """Plain columns for a terminal `width` characters wide; a star marks the best method."""
    grid, caption = _fitting(table, width)
    widths = [max(map(len, column)) for column in zip(*grid, strict=True)]
    written = [
        "  ".join(
            v.ljust(w) if i == 0 else v.rjust(w) for i, (v, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in grid
    ]
    rule = "-" * (sum(widths) + 2 * (len(widths) - 1))
    split = 1 + sum(line.baseline for line in table.lines)
    body = [written[0], rule, *written[1:split], *([rule] if 1 < split < len(written) else []), *written[split:]]
    return "\n".join([caption, "", *body]) + "\n"


def to_rich(table: Table, width: int | None = None) -> RichTable:
    """The same table for a rich console; bold and a star mark the best method."""
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    grid, caption = _fitting(table, width)
    drawn = RichTable(title=Text(caption), box=box.SIMPLE_HEAD, title_justify="left", padding=(0, 1, 0, 0))
    for i, heading in enumerate(grid[0]):
        drawn.add_column(Text(heading), justify="left" if i == 0 else "right", no_wrap=i > 0)
    for i, (line, values) in enumerate(zip(table.lines, grid[1:], strict=True)):
        last = line.baseline and i + 1 < len(table.lines) and not table.lines[i + 1].baseline
        shown = [Text(v, style="bold" if v.endswith("*") and k else "") for k, v in enumerate(values)]
        drawn.add_row(*shown, style="dim" if line.baseline else "", end_section=last)
    return drawn


def escape_markdown(value: str) -> str:
    """`value` with every character that Markdown would act on escaped."""
    return re.sub(r"([\\`*_{}\[\]<>|~#&])", r"\\\1", value)


def to_markdown(table: Table) -> str:
    """A Markdown table; bold marks the best method."""
    grid = _grid(table, "interval", lambda value: f"**{value}**", lambda value: value, " (baseline)")
    header = [escape_markdown(heading) for heading in grid[0]]
    body = [[escape_markdown(row[0]), *row[1:]] for row in grid[1:]]
    lines = [header, ["---", *("---:" for _ in header[1:])], *body]
    legend = "; bold: best method" if table.marks_best else ""
    return f"{escape_markdown(table.caption)}{legend}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in lines) + "\n"


_LATEX = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_LATEX |= {c: "\\" + c for c in "&%$#_{}"} | {"<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}"}
_LATEX |= {"–": "--", "±": r"$\pm$", '"': "''"}


def latex(value: str) -> str:
    """`value` with every character that LaTeX would act on written out."""
    written = "".join(_LATEX.get(character, character) for character in value)
    return "{[}" + written[1:] if written.startswith("[") else written  # not the argument of the line break before


def to_latex(table: Table) -> str:
    """A booktabs table; bold marks the best method."""
    number = lambda value: re.sub(r"-(?=[\d.i])", "$-$", latex(value))  # noqa: E731
    grid = _grid(table, "interval", lambda value: rf"\textbf{{{number(value)}}}", number, " (baseline)")
    split = 1 + sum(line.baseline for line in table.lines)
    body = [" & ".join([latex(row[0]), *row[1:]]) + r" \\" for row in grid[1:]]
    if 1 < split < len(grid):
        body.insert(split - 1, r"\midrule")
    legend = "; bold: best method" if table.marks_best else ""
    return "\n".join(
        [
            r"% needs \usepackage{booktabs}",
            r"\begin{table}",
            r"\centering",
            rf"\caption{{{latex(table.caption)}{legend}.}}",
            rf"\begin{{tabular}}{{l{'r' * (len(grid[0]) - 1)}}}",
            r"\toprule",
            " & ".join(latex(heading) for heading in grid[0]) + r" \\",
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )


CSV_COLUMNS = (
    *("method", "baseline", "task", "metric", "unit", "mean", "low", "high", "n"),
    *("against", "difference", "difference_low", "difference_high"),
)


def to_csv(*tables: Table) -> str:
    """One line a value, numbers in full; what was not measured has no line."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(CSV_COLUMNS)
    for table in tables:
        for line in table.lines:
            for column, cell, pair in zip(table.columns, line.cells, line.differences, strict=True):
                if cell is None:
                    continue
                paired = [pair.against, pair.mean, pair.low, pair.high] if pair else [None] * 4
                place = [line.method, str(line.baseline).lower(), column, table.metric, table.unit]
                writer.writerow([*place, cell.mean, cell.low, cell.high, cell.n, *paired])
    return out.getvalue()


RENDERERS: dict[str, Callable[[Table], str]] = {
    "text": to_text,
    "markdown": to_markdown,
    "latex": to_latex,
    "csv": to_csv,
}


def render(folder: Path | str, to: str = "text", width: int | None = None) -> str:
    """The tables of a run folder, one for each metric, as `to`. `width` bounds the text form (terminal columns)."""
    _check_form(to)
    run = read_run(folder)
    tables = all_tables(run.results)
    if not tables:
        where = str(run.path / "results.json")
        raise SpoliaError("the run has no results yet", where=where, mend="run it again to continue, then ask again")
    return written(tables, to, width)


def written(tables: list[Table], to: str = "text", width: int | None = None) -> str:
    """Tables one after the other, as `to`."""
    _check_form(to)
    if to == "csv":
        return to_csv(*tables)
    return "\n".join(to_text(table, width) if to == "text" else RENDERERS[to](table) for table in tables)


def _check_form(to: str) -> None:
    if to not in RENDERERS:
        raise SpoliaError(f"no table form is called `{to}`", where="--to", mend=did_you_mean(to, RENDERERS))
