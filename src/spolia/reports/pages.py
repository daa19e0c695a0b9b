"""The pages of `spolia ui`, in the look of reports: runs listed, one followed, several compared. Text in, text out.

Runs are given as they were read: `status`, `plan` and `results` are mappings of whatever the folder holds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from spolia.reports import facts, figures, words
from spolia.reports.folder import RunRecord
from spolia.reports.html import environment
from spolia.reports.ledger import all_tables, main_table
from spolia.reports.tables import show_value

MOST_CURVES = 8
WIDTH, HEIGHT = 240, 40  # of a curve, in its own units
LETTERS = "abcdefghijklmnopqrstuvwxyz"  # that compared runs go by
GONE = "It says that it runs, but its process is gone. The same command continues it."


@dataclass(frozen=True)
class Curve:
    """One number of the phase at hand: its last value, and its course where it has one."""

    name: str
    last: str
    lowest: str
    highest: str
    points: str  # of an SVG polyline; empty for a single value
    said: str  # for a reader who does not see it


def render(name: str, given: dict[str, Any]) -> str:
    """The text of a file in ui/, with what it is given."""
    tools: dict[str, Any] = {"state_of": state_of, "headline": headline, "told": told, "recipe_of": recipe_of}
    tools |= {"moment": facts.moment, "text": words.text, "number": words.number, "groups": groups}
    return environment().get_template(f"ui/{name}", globals=tools | {"letters": LETTERS}).render(given)


def state_of(run: Any) -> tuple[str, str]:
    """The state in a word, and in a sentence."""
    state = record(run).state
    if run.gone:
        return "stopped", GONE
    return state, "" if state == "running" else facts.STATES[state]


def recipe_of(run: Any) -> str:
    return words.name(run.results.get("name") or run.plan.get("title") or run.plan.get("method"), 120)


def headline(run: Any) -> str:
    """`accuracy 90.6 % (iso_c)`: the best method's last column of the main table. Empty where nothing was measured."""
    table = main_table(run.results)
    best = next(iter(facts.rivals(table)), None)
    if best is None:
        return ""
    value = show_value(best.cells[-1], table.digits, "mean")
    return f"{table.metric} {value}{' ' + table.unit if table.unit else ''} ({best.method})"


def told(run: Any, lines: list[dict[str, Any]], summary: str) -> dict[str, Any]:
    """What the live part says of one run: state, sentence, time, and the numbers of the phase at hand."""
    seen, (state, sentence) = record(run), state_of(run)
    last = lines[-1] if lines else {}
    phase = words.name(last.get("phase"))
    own = [line for line in lines if words.name(line.get("phase")) == phase]
    spent, planned = words.number(last.get("time")), words.number(run.plan.get("seconds"))
    timed = state == "running" and words.finite(spent) and words.finite(planned) and planned > 0
    tables = all_tables(run.results)
    return {
        "state": state,
        "sentence": sentence,
        "phase": words.name(run.status.get("phase")) if state != "finished" else "",
        "message": words.text(run.status.get("message"), 2000),
        "summary": words.name(summary, 600) or (facts.sentence(tables, seen) if tables else ""),
        "glance": facts.glance(seen),
        "time": (min(spent, planned), planned, words.duration(spent), words.duration(planned)) if timed else None,
        "numbers": _curves(own),
        "of": phase,
        "step": words.inline(last["step"]) if last.get("step") is not None else "",
        "count": len(own),
    }


def groups(rows: list[Any]) -> list[tuple[tuple[str, str], list[Any]]]:
    """Rows of a comparison by metric and unit, in their order."""
    found: dict[tuple[str, str], list[Any]] = {}
    for row in rows:
        found.setdefault((row.metric, row.unit), []).append(row)
    return list(found.items())


def record(run: Any) -> RunRecord:
    return RunRecord(run.path, plan=run.plan, status=run.status, results=run.results)


def _curves(lines: list[dict[str, Any]]) -> list[Curve]:
    """The numbers of one phase, in the order in which they came."""
    latest: dict[str, float] = {}
    for line in lines:
        for key, value in line.items():
            number = words.number(value)
            if key not in figures.NOT_A_CURVE and number is not None:
                latest[words.name(key)] = number
    drawn = {figure.y_label: figure.series[0] for figure in figures.learning_curves(lines)}
    return [_curve(name, value, drawn.get(name)) for name, value in list(latest.items())[:MOST_CURVES]]


def _curve(name: str, last: float, series: figures.Series | None) -> Curve:
    known = [] if series is None else [(x, y) for x, y in zip(series.x, series.y, strict=True) if words.finite(y)]
    if len(known) < 2:
        return Curve(name, f"{last:.4g}", words.MISSING, words.MISSING, "", "")
    left, right = known[0][0], known[-1][0]
    low, high = min(y for _, y in known), max(y for _, y in known)
    wide, tall = (right - left) or 1.0, high - low
    points = (f"{WIDTH * (x - left) / wide:.1f},{HEIGHT * ((high - y) / tall if tall else 0.5):.1f}" for x, y in known)
    said = f"{name} from {known[0][1]:.4g} at {left:.6g} to {known[-1][1]:.4g} at {right:.6g}"
    return Curve(name, f"{last:.4g}", f"{low:.4g}", f"{high:.4g}", " ".join(points), said)
