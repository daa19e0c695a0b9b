"""From the ledger form to a table: methods against tasks, baselines first, the best method of each column known."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spolia.reports import words
from spolia.reports.folder import rows

AVERAGE = "average"
LOWER_IS_BETTER = {
    *("loss", "error", "error_rate", "perplexity", "nll", "kl", "l1", "l2", "distance", "ber", "bler", "ser", "wer"),
    *("cer", "forgetting", "ece", "brier", "seconds", "time", "bytes", "memory", "flops", "queries", "cost"),
    *("frame_error", "token_error", "bit_error", "symbol_error", "character_error", "undetected", "reads"),
    *("channel_uses_a_character", "performance_drop", "needed_for_50%_exact", "needed_for_90%_exact"),
    *("learned", "time_an_item", "overhead_an_item", "processor_time_a_frame"),
}


@dataclass(frozen=True)
class Cell:
    """One measured value. `best` is the best of the column's methods, baselines aside."""

    mean: float | None
    low: float | None = None
    high: float | None = None
    n: int | None = None
    best: bool = False

    @property
    def has_interval(self) -> bool:
        return self.low is not None and self.high is not None


@dataclass(frozen=True)
class Difference:
    """This method minus `against` on the same items or seeds, with its interval."""

    against: str
    mean: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """One method: a cell for each column, None where nothing was measured (yet)."""

    method: str
    baseline: bool
    cells: tuple[Cell | None, ...]
    differences: tuple[Difference | None, ...]

    @property
    def is_paired(self) -> bool:
        return any(self.differences)

    @property
    def difference(self) -> Difference | None:
        """The paired difference of the last column: Average where there is one."""
        return self.differences[-1] if self.differences else None


@dataclass(frozen=True)
class Table:
    """One metric. `columns` are the tasks in the ledger's order, then `average`."""

    metric: str
    unit: str
    columns: tuple[str, ...]
    lines: tuple[Line, ...]
    digits: int

    @property
    def heading(self) -> str:
        return f"{self.metric} ({self.unit})" if self.unit else self.metric

    @property
    def lower_is_better(self) -> bool:
        return self.metric.lower().replace(" ", "_") in LOWER_IS_BETTER

    @property
    def against(self) -> str:
        """What the paired differences are taken against, or empty where there are none."""
        names = dict.fromkeys(line.difference.against for line in self.lines if line.difference)
        return " / ".join(names)

    @property
    def pairs(self) -> list[str]:
        """The same for the differences of all columns, one by one."""
        return list(dict.fromkeys(d.against for line in self.lines for d in line.differences if d))

    @property
    def pairs_ranged(self) -> bool:
        """Whether any paired difference states its interval."""
        return any(d and d.low is not None and d.high is not None for line in self.lines for d in line.differences)

    @property
    def marks_best(self) -> bool:
        return any(cell and cell.best for line in self.lines for cell in line.cells)

    @property
    def counts(self) -> list[int]:
        return sorted({cell.n for line in self.lines for cell in line.cells if cell and cell.n is not None})

    @property
    def has_interval(self) -> bool:
        return any(cell and cell.has_interval for line in self.lines for cell in line.cells)

    @property
    def caption(self) -> str:
        caption = f"{self.heading}, {'lower' if self.lower_is_better else 'higher'} is better"
        caption += "; mean [low, high]" if self.has_interval else "; mean"
        if len(self.counts) == 1:
            caption += f", n = {self.counts[0]}"
        return caption


@dataclass(frozen=True)
class Measures:
    """Tables of one and the same column, side by side: a line for each method, a column for each metric."""

    task: str
    tables: tuple[Table, ...]

    @property
    def pairs(self) -> list[str]:
        """What paired differences are taken against."""
        return list(dict.fromkeys(name for table in self.tables for name in table.pairs))

    @property
    def has_interval(self) -> bool:
        return any(table.has_interval for table in self.tables)

    @property
    def lines(self) -> list[tuple[Line, list[tuple[Table, Line | None]]]]:
        """Each method by its first line, baselines first, with its line in every table."""
        first = {line.method: line for table in reversed(self.tables) for line in table.lines}
        order = sorted(
            dict.fromkeys(line.method for table in self.tables for line in table.lines),
            key=lambda m: not first[m].baseline,
        )
        held = [{line.method: line for line in table.lines} for table in self.tables]
        return [(first[m], [(t, own.get(m)) for t, own in zip(self.tables, held, strict=True)]) for m in order]


def side_by_side(tables: list[Table]) -> tuple[list[Table], list[Measures]]:
    """The main table and the broad ones; and those that have one column, where several have the same."""
    narrow: dict[str, list[Table]] = {}
    for table in tables[1:]:
        if len(table.columns) == 1:
            narrow.setdefault(table.columns[0], []).append(table)
    joined = []
    for task, found in narrow.items():
        most = 4 if any(table.against for table in found) else 7  # that a page's width holds
        parts = [tuple(found[i : i + most]) for i in range(0, len(found), most)] if len(found) > 1 else []
        joined += [Measures(task, part) for part in parts]
    taken = {id(table) for one in joined for table in one.tables}
    return [table for table in tables if id(table) not in taken], joined


def main_table(results: dict[str, Any], metric: str | None = None) -> Table:
    """The table of `metric` (default: accuracy where measured, else the first). Without rows it has no lines.

    An average that the ledger does not state is the plain mean of a method's tasks, without interval, and only where
    every task was measured; a ledger that says `average: false` has none. Of rows that say the same twice, the last counts.
    """
    found = [(r, words.name(r["method"]), words.name(r["task"]), words.name(r["metric"])) for r in rows(results)]
    metrics = list(dict.fromkeys(row[3] for row in found))
    if metric is None:
        metric = "accuracy" if "accuracy" in metrics or not metrics else metrics[0]
    found = [(row, method, task) for row, method, task, measured in found if measured == metric]
    tasks = [task for task in dict.fromkeys(row[2] for row in found) if task.lower() != AVERAGE]
    stated = any(row[2].lower() == AVERAGE for row in found)
    columns = tasks if len(tasks) == 1 or not (stated or results.get("average", True)) else [*tasks, AVERAGE]
    units = [words.name(row[0].get("unit")) for row in found if row[0].get("unit")]
    cells: dict[tuple[str, str], Cell] = {}
    differences: dict[tuple[str, str], Difference] = {}
    baseline: dict[str, bool] = {}
    for row, method, task in found:
        place = (method, AVERAGE if task.lower() == AVERAGE else task)
        baseline[method] = baseline.get(method, False) or bool(row.get("baseline"))
        count = words.number(row.get("n"))
        mean, low, high = (words.number(row.get(key)) for key in ("mean", "low", "high"))
        cells[place] = Cell(mean, low, high, int(count) if words.finite(count) else None)
        pair = row.get("paired_difference")
        if isinstance(pair, dict):
            numbers = (words.number(pair.get(key)) for key in ("mean", "low", "high"))
            differences[place] = Difference(words.name(pair.get("against") or "?"), *numbers)
    for method in baseline:
        means = [c.mean for task in tasks if (c := cells.get((method, task))) and c.mean is not None]
        if (method, AVERAGE) not in cells and len(means) == len(tasks) > 1:
            cells[method, AVERAGE] = Cell(sum(means) / len(means))
    ordered = sorted(baseline.items(), key=lambda item: not item[1])  # keeps the ledger's order inside each group
    lines = [
        Line(m, b, tuple(cells.get((m, c)) for c in columns), tuple(differences.get((m, c)) for c in columns))
        for m, b in ordered
    ]
    table = Table(metric, units[0] if units else "", tuple(columns), tuple(lines), _digits(cells.values(), units))
    return _mark_best(table)


def all_tables(results: dict[str, Any]) -> list[Table]:
    """A table for each metric, the main one first."""
    first = main_table(results)
    others = [m for m in dict.fromkeys(words.name(r["metric"]) for r in rows(results)) if m != first.metric]
    return [t for t in (first, *(main_table(results, metric) for metric in others)) if t.lines]


def _digits(cells: Any, units: list[str]) -> int:
    if units and units[0] in ("%", "percent"):
        return 1
    shown = [v for cell in cells for v in (cell.mean, cell.low, cell.high) if words.finite(v)]
    largest = max(map(abs, shown), default=0.0)
    if largest >= 10 and all(value.is_integer() for value in shown):
        return 0
    return 1 if largest >= 100 else 2 if largest >= 10 else 3


def _mark_best(table: Table) -> Table:
    rivals = [line for line in table.lines if not line.baseline]
    if len(rivals) < 2:
        return table  # a winner of one says nothing
    marked: dict[int, set[int]] = {}
    for column in range(len(table.columns)):
        shown = {}
        for i, line in enumerate(table.lines):
            cell = line.cells[column]
            if not line.baseline and cell and words.finite(cell.mean):
                shown[i] = round(cell.mean, table.digits)
        if shown:
            top = (min if table.lower_is_better else max)(shown.values())
            marked[column] = {i for i, value in shown.items() if value == top}
    lines = []
    for i, line in enumerate(table.lines):
        cells = tuple(
            Cell(c.mean, c.low, c.high, c.n, True) if c and i in marked.get(k, ()) else c
            for k, c in enumerate(line.cells)
        )
        lines.append(Line(line.method, line.baseline, cells, line.differences))
    return Table(table.metric, table.unit, table.columns, tuple(lines), table.digits)
