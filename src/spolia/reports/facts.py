"""What a report says in words: state, summary, phases with their data and time, plan, environment."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any

from spolia.reports import words
from spolia.reports.folder import RunRecord
from spolia.reports.ledger import Difference, Line, Table, side_by_side
from spolia.reports.tables import show_value

MOST_LINES = 300
MOST_FILES = 60
STATES = {
    "finished": "Every phase was completed.",
    "running": "The run had not ended when this page was written; numbers may still change.",
    "interrupted": "The run was interrupted; what it had measured by then is below. The same command continues it.",
    "failed": "The run failed; what it had measured by then is below.",
    "unknown": "The folder does not say whether the run ended.",
}


@dataclass(frozen=True)
class Phase:
    """One phase: what was planned, what it touched, how long it took. `share` is its part of all time, in %."""

    name: str
    does: str
    data: str
    trained: str
    frozen: str
    seconds: str
    share: float


def gather(run: RunRecord, tables: list[Table]) -> dict[str, Any]:
    """Everything the page says in words and tables, ready to be set."""
    plan, env, status = run.plan, run.env, run.status
    summary = run.summary or sentence(tables, run)
    inputs = [item for item in _items(plan.get("inputs")) if isinstance(item, dict)]
    files, (broad, measures) = _folded(run.files), side_by_side([bounded(table) for table in tables])
    return {
        "title": words.name(run.results.get("name") or plan.get("title") or run.path.resolve().name, 120),
        "state": run.state,
        "state_text": STATES[run.state],
        "message": words.text(status.get("message"), 2000),
        "phase_now": words.name(status.get("phase")) if run.state != "finished" else "",
        "summary": summary,
        "glance": glance(run),
        "tables": broad,
        "measures": measures,
        "paired": [bounded(t) for t in tables if _paired_columns(t)],
        "phases": _phases(run),
        "inputs": inputs[:MOST_LINES],
        "plan_pairs": _plan_pairs(plan),
        "memory": _memory(run),
        "files": files[:MOST_FILES],
        "more_files": max(0, len(files) - MOST_FILES),
        "all_bytes": sum(count for _, count in run.files),
        "recipe": words.text(run.recipe, 60_000),
        "command": words.text(env.get("command") or run.results.get("command"), 2000),
        "environment": [
            (heading, words.pairs(env.get(key) or run.results.get(key)))
            for heading, key in (("Versions", "versions"), ("Machine", "machine"))
        ],
        "notes": [words.text(run.results.get("notes"), 8000)] if run.results.get("notes") else [],
        "warnings": [words.text(w, 1000) for w in _items(plan.get("warnings"))][:MOST_LINES],
        "drawn_on": words.name(status.get("finished") or run.results.get("date")),
    }


def _folded(files: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The files, those of checkpoints/ as one entry: what a run resumes from is nothing to read."""
    kept = [size for file, size in files if file.startswith("checkpoints/")]
    shown = [(file, size) for file, size in files if not file.startswith(("checkpoints/", "."))]
    return [*([(f"checkpoints/: {len(kept)} file{'s' * (len(kept) != 1)}", sum(kept))] if kept else []), *shown]


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def bounded(table: Table) -> Table:
    """The table with no more lines than a page can hold."""
    return Table(table.metric, table.unit, table.columns, table.lines[:MOST_LINES], table.digits)


def _paired_columns(table: Table) -> int:
    return sum(any(line.differences[k] for line in table.lines) for k in range(len(table.columns) - 1))


def verdict(pair: Difference, lower_is_better: bool) -> str:
    """What a paired difference says, in a word, so that no colour has to."""
    if pair.low is None or pair.high is None or not (pair.low > 0 or pair.high < 0):
        return "not clear"
    return "better" if (pair.low > 0) != lower_is_better else "worse"


def sentence(tables: list[Table], run: RunRecord) -> str:
    """One sentence of what came out, for runs that left none themselves."""
    table = tables[0] if tables else None
    ranked = rivals(table) if table else []
    if not table or not ranked:
        title = words.name(run.plan.get("title"), 200)
        return f"{title[:1].upper()}{title[1:]}; nothing has been measured." if title else "Nothing has been measured."
    best = ranked[0]
    unit = f" {table.unit}" if table.unit else ""
    value = show_value(best.cells[-1], table.digits, "mean")
    place = "on average over the tasks" if len(table.columns) > 1 else f"on {table.columns[0]}"
    if len(ranked) > 1:
        kind = "baselines" if best.baseline else "methods"
        said = f"Of {len(ranked)} {kind}, {best.method} has the best {table.metric}"
        said += f": {value}{unit} {place}"
    else:
        said = f"The {table.metric} of {best.method} is {value}{unit} {place}"
    pair = best.difference
    if pair and words.finite(pair.mean):
        points = " points" if table.unit == "%" else unit
        said += f", {show_value(pair, table.digits)}{points} against {pair.against}"
        said += f" ({verdict(pair, table.lower_is_better)})"
    return said + "."


def rivals(table: Table) -> list[Line]:
    """Methods with a value in the last column, the best first; baselines where no method has one."""
    scored = [(c.mean, line) for line in table.lines if (c := line.cells[-1]) and words.finite(c.mean)]
    named = [(mean, line) for mean, line in scored if not line.baseline] or scored
    return [line for _, line in sorted(named, key=lambda rival: rival[0], reverse=not table.lower_is_better)]


def glance(run: RunRecord) -> list[tuple[str, str]]:
    """The few facts that stand on top: method, seeds, time, memory, date, source."""
    plan, env, status = run.plan, run.env, run.status
    took = _elapsed(status)
    git = env.get("git") if isinstance(env.get("git"), dict) else {}
    commit = words.name(git.get("commit") or run.results.get("commit"))[:12]
    seeds = _items(env.get("seeds")) or _items(run.results.get("seeds")) or _items(plan.get("seeds"))
    memory = words.size(status.get("peak_memory_bytes"))
    entries = [
        ("method", words.name(plan.get("method"))),
        ("seeds", words.inline(seeds) if len(seeds) <= 8 else f"{len(seeds)} seeds")
        if seeds
        else ("seed", words.name(env.get("seed"))),
        ("time", took),
        ("peak memory", memory),
        ("finished" if status.get("finished") else "started", moment(status.get("finished") or status.get("started"))),
        ("source", commit + (" + changes" if git.get("dirty") else "") if commit else ""),
    ]
    return [(label, value) for label, value in entries if value and value != words.MISSING]


def _elapsed(status: dict[str, Any]) -> str:
    """Time spent working: the phases' seconds where told, else from start to finish (which counts pauses too)."""
    seconds = status.get("seconds")
    if isinstance(seconds, dict) and seconds:
        return words.duration(sum(v for s in seconds.values() if words.finite(v := words.number(s))))
    try:
        span = datetime.fromisoformat(str(status["finished"])) - datetime.fromisoformat(str(status["started"]))
    except (KeyError, ValueError, TypeError):
        return words.MISSING
    return words.duration(span.total_seconds())


def moment(value: Any) -> str:
    """An ISO time to the minute; anything else as it is."""
    try:
        return datetime.fromisoformat(str(value)).strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return words.name(value)


def _phases(run: RunRecord) -> list[Phase]:
    """The plan's phases in order, then those that only the results or the timing name.

    Results may call what a phase touched otherwise than the plan: the same words are not said twice.
    """
    planned = {words.name(p.get("name")): p for p in _items(run.plan.get("phases")) if isinstance(p, dict)}
    data = run.results.get("data") if isinstance(run.results.get("data"), dict) else {}
    seconds = run.status.get("seconds") if isinstance(run.status.get("seconds"), dict) else {}
    touched = {words.name(key): value for key, value in data.items()}
    took = {words.name(key): number for key, value in seconds.items() if words.finite(number := words.number(value))}
    whole = sum(took.values()) or 1.0
    phases, said = [], {words.inline(touched.get(key, plan.get("data"))) for key, plan in planned.items()}
    for key in list(dict.fromkeys([*planned, *touched, *took]))[:MOST_LINES]:
        if key not in planned and key not in took and words.inline(touched[key]) in said:
            continue
        plan = planned.get(key, {})
        does, trained, frozen = (
            words.text(words.inline(plan.get(k)) if plan.get(k) else "", 600) for k in ("does", "trained", "frozen")
        )
        saw = touched.get(key, plan.get("data"))
        shown = words.duration(took[key]) if key in took else ""
        share = round(100 * max(0.0, took.get(key, 0.0)) / whole, 1)
        phases.append(
            Phase(key, does, words.inline(saw) if saw not in (None, "") else "", trained, frozen, shown, share)
        )
    return phases


def _memory(run: RunRecord) -> str:
    measured, planned = (words.size(part.get("peak_memory_bytes")) for part in (run.status, run.plan))
    said = [f"{measured} measured"] if measured != words.MISSING else []
    return "; ".join(said + ([f"{planned} planned"] if planned != words.MISSING else []))


def _stored(dtypes: Any) -> str:
    """`6 float32, 2 int64`: how many tensors are stored as what."""
    return ", ".join(f"{count} {dtype}" for dtype, count in words.pairs(dtypes))


def _plan_pairs(plan: dict[str, Any]) -> list[tuple[str, str]]:
    entries = [
        ("tensors", words.inline(plan.get("tensors") or "")),
        ("stored as", _stored(plan.get("dtypes")) if plan.get("tensors") else ""),
        ("read", words.size(plan.get("bytes_in") or None)),
        ("written", words.size(plan.get("bytes_out") or None)),
        ("planned time", words.duration(plan.get("seconds"))),
        ("time estimated from", words.inline(plan.get("time_basis") or "")),
    ]
    return [(label, value) for label, value in entries if value and value != words.MISSING]
