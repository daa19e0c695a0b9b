"""A sweep as it stands: its runs, the table of its points, and sweep.json, from which it is listed without opening a run."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from spolia.bench.multitask import Interval, paired, t_interval
from spolia.errors import SpoliaError
from spolia.runs.describe import columns
from spolia.runs.sweep_numbers import ACCURACY, number_of, validation_of

FILE = "sweep.json"
VERSION = 1
_MOST_LINES = 6  # of an error in the text form; its log has all of it

State = Literal["waiting", "unfinished", "done", "failed"]


@dataclass
class SweptRun:
    """One run. `number` (the main metric on the test) and `validation` are there once it is done."""

    name: str
    values: dict[str, str]
    seed: int | None
    overrides: list[str]
    state: State = "waiting"
    error: str = ""
    seconds: float | None = None
    line: str = ""
    number: dict[str, Any] | None = None
    validation: dict[str, float] = field(default_factory=dict)

    def look(self, folder: Path) -> None:
        """Take the state from the run folder, where `spolia run` keeps it."""
        try:
            status = json.loads((folder / self.name / "status.json").read_text(encoding="utf-8"))
            state, self.seconds = status["state"], round(sum(status["seconds"].values()), 1)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            begun = (folder / self.name / "recipe.yaml").is_file()
            self.state = self.state if self.state == "failed" else "unfinished" if begun else "waiting"
            return
        if state != "failed":
            self.state, self.error = "done" if state == "done" else "unfinished", ""
        else:
            self.state, self.error = "failed", self.error or str(status.get("message", ""))

    def measure(self, folder: Path, metric: str | None) -> None:
        """Take the numbers of a run that is done, where they are not known yet."""
        if self.state == "done" and self.number is None:
            self.number = number_of(folder / self.name, self.line, metric)
            self.validation = validation_of(folder / self.name, self.line)


@dataclass
class PointRow:
    """The runs of one combination together. `difference` is from the first point, over the seeds that both have."""

    values: dict[str, str]
    names: list[str]
    done: int
    seeds: list[int]
    number: dict[str, Any] | None
    difference: dict[str, Any] | None
    validation: dict[str, float]

    @property
    def whole(self) -> bool:
        return self.done == len(self.names)


@dataclass
class Sweep:
    """What is gone over in `folder`. `digest` stands for the recipe without its overrides, `metric` for what was asked to be
    shown, `search` for what chooses.
    """

    folder: Path
    recipe: str
    digest: int
    fixed: list[str]
    runs: list[SweptRun]
    search: dict[str, Any] | None = None
    metric: str | None = None

    @classmethod
    def read(cls, folder: Path) -> Sweep:
        """The sweep kept in `folder`, with the states of unfinished runs as they are now."""
        file = folder / FILE
        try:
            kept = json.loads(file.read_text(encoding="utf-8"))
            runs = [SweptRun(**run) for run in kept["runs"]]
            sweep = cls(folder, kept["recipe"], kept["digest"], kept["overrides"], runs, kept["search"], kept["metric"])
        except FileNotFoundError:
            mend = "name a folder that `spolia sweep` has written"
            raise SpoliaError("there is no sweep", where=str(folder), mend=mend) from None
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            raise SpoliaError(
                "cannot be read", where=str(file), mend="delete it, and give the sweep's command again"
            ) from None
        for run in runs:
            if run.state in ("waiting", "unfinished"):
                run.look(folder)
                run.measure(folder, sweep.metric)
        return sweep

    @property
    def failed(self) -> list[SweptRun]:
        return [run for run in self.runs if run.state == "failed"]

    def write(self) -> None:
        from spolia.runs.store import write_json

        write_json(self.folder / FILE, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        return {
            "sweep": VERSION,
            "recipe": self.recipe,
            "digest": self.digest,
            "overrides": self.fixed,
            "search": self.search,
            "metric": self.metric,
            "runs": [asdict(run) for run in self.runs],
            "points": [asdict(point) for point in points_of(self.runs)],
            "chosen": None if (best := self.chosen()) is None else best.names,
        }

    def chosen(self) -> PointRow | None:
        """The point that validation prefers; of a search on the test, that the test prefers. Of a grid, once all are there."""
        points = points_of(self.runs)
        rule = self.search or {"metric": ACCURACY, "lowest": False, "on_test": False}
        scored = [(v, point) for point in points if point.whole and (v := score_of(point, rule)) is not None]
        if len(scored) < 2 or (self.search is None and len(scored) < len(points)):
            return None
        sign = -1 if rule["lowest"] else 1
        return max(scored, key=lambda pair: sign * pair[0])[1]

    # --- as text -----------------------------------------------------------------------------------------------------

    def runs_text(self, width: int | None = None) -> str:
        """Every run and how it stands: what is shown before anything runs."""
        keys = _keys(self.runs)
        seeded = any(run.seed is not None for run in self.runs)
        heads = ["run", *keys, *(["seed"] if seeded else []), "state"]
        rows = [
            [run.name, *(run.values.get(key, "-") for key in keys), *([f"{run.seed}"] if seeded else []), run.state]
            for run in self.runs
        ]
        done = sum(run.state == "done" for run in self.runs)
        count = f"{len(self.runs)} runs" if len(self.runs) != 1 else "1 run"
        head = f"{self.recipe}: {count} in {self.folder}" + (f", {done} done" if done else "")
        return head + ("\n" + columns(heads, rows, width) if rows else "")

    def to_text(self, width: int | None = None) -> str:
        """The table of the points, what the numbers mean, what validation prefers, and what failed."""
        points, parts = points_of(self.runs), [f"{self.recipe}: {_counted(self.runs)} in {self.folder}"]
        if any(point.number for point in points):
            parts += [_caption(points, self.runs), self._table(points, width), *_notes(points), *self._choice()]
        elif any(run.state == "done" for run in self.runs):
            parts.append("No run measured anything that could stand here.")
        for run in self.failed:
            lines = run.error.splitlines()[:_MOST_LINES] or ["no reason is known"]
            parts += ["", f"failed: {run.name}", *("  " + line for line in lines)]
        return "\n".join(parts)

    def _table(self, points: Sequence[PointRow], width: int | None) -> str:
        keys = _keys(self.runs)
        metric = (self.search or {}).get("metric", ACCURACY)
        seen, several = any(metric in point.validation for point in points), len(points) > 1
        named = [self.runs_of(point)[0].name.partition(",")[0] for point in points] if self.search else []
        heads = [*(["point"] if named else []), *keys, "mean [low, high]"]
        heads += ["minus the first"] if several else []
        heads += [f"{metric} on validation"] if seen else []
        rows = []
        for place, point in enumerate(points):
            row = [named[place]] if named else []
            row += [_short(point.values.get(key, "-")) for key in keys]
            row += [_shown(point.number)] + ([_shown(point.difference, sign="+")] if several else [])
            row += [f"{point.validation[metric]:.4g}" if metric in point.validation else "-"] if seen else []
            rows.append([*row, f"{point.done} of {len(point.names)}"])
        return columns([*heads, "done"], rows, width)

    def runs_of(self, point: PointRow) -> list[SweptRun]:
        return [run for run in self.runs if run.name in point.names]

    def _choice(self) -> list[str]:
        best = self.chosen()
        if best is None:
            return []
        values = ", ".join(f"{key}={value}" for key, value in best.values.items())
        if (self.search or {}).get("on_test"):
            return [
                f"Best on the test: {values}. It was chosen by the test, so its number is too good: judge it on data"
                " that nothing has chosen by."
            ]
        return [f"Best on validation: {values}. The test has not chosen it, so its number above stands as it is."]


def usual_folder(recipe: str) -> Path:
    """Where the sweep of a recipe of this name stands unless -o says otherwise."""
    return Path("runs") / f"{recipe}-sweep"


def points_of(runs: Sequence[SweptRun]) -> list[PointRow]:
    """The runs by their values, in the order in which they first stand."""
    groups: dict[tuple[Any, ...], list[SweptRun]] = {}
    for run in runs:  # one without a seed of its own may hold the same seed as another, and stands apart
        groups.setdefault((run.seed is None, *run.values.items()), []).append(run)
    first: dict[int | None, float] | None = None
    rows = []
    for group in groups.values():
        done = [run for run in group if run.state == "done"]
        scores = {run.seed: run.number["mean"] for run in done if run.number is not None}
        known = [run.number for run in done if run.number is not None]
        number = known[0] if known else None
        if len(known) > 1:
            number = known[0] | _within(known[0], t_interval(list(scores.values()))) | {"n": len(known)}
        common = [] if first is None else [seed for seed in scores if seed in first]
        gap = paired([scores[s] for s in common], [first[s] for s in common]) if first and common else None
        first = scores if first is None else first
        metrics = dict.fromkeys(name for run in done for name in run.validation)
        seen = {m: fmean(run.validation[m] for run in done if m in run.validation) for m in metrics}
        seeds = [run.seed for run in done if run.seed is not None]
        difference = None if gap is None else _told(gap) | {"n": len(common)}
        names = [run.name for run in group]
        rows.append(PointRow(dict(group[0].values), names, len(done), seeds, number, difference, seen))
    return rows


def score_of(point: PointRow, rule: dict[str, Any]) -> float | None:
    """What a point is chosen by."""
    if not rule["on_test"]:
        return point.validation.get(rule["metric"])
    return None if point.number is None else point.number["mean"]


def _told(found: Interval) -> dict[str, Any]:
    return {"mean": found.mean, "low": found.low, "high": found.high}


def _within(number: dict[str, Any], found: Interval) -> dict[str, Any]:
    """As it is, but no accuracy lies outside 0 … 100 %."""
    told = _told(found)
    if number["unit"] == "%" and number["metric"].lower().endswith(ACCURACY):
        told |= {key: min(100.0, max(0.0, told[key])) for key in ("low", "high") if told[key] is not None}
    return told


def _keys(runs: Sequence[SweptRun]) -> list[str]:
    return list(dict.fromkeys(key for run in runs for key in run.values))


def _counted(runs: Sequence[SweptRun]) -> str:
    states = [run.state for run in runs]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(sorted(states)))


def _caption(points: Sequence[PointRow], runs: Sequence[SweptRun]) -> str:
    number = next(point.number for point in points if point.number)
    lines = dict.fromkeys(run.line for run in runs if run.number)
    unit = f" ({number['unit']})" if number["unit"] else ""
    return f"\n{number['metric']}{unit} of {', '.join(lines)} on the test"


def _notes(points: Sequence[PointRow]) -> list[str]:
    several = any(point.done > 1 for point in points)
    own = "Intervals are those of each run's own report."
    notes = ["Means over seeds with 95 % intervals of Student." if several else own]
    if any(point.difference for point in points):
        notes.append("Differences are taken seed by seed." if several else "Differences are of one run each.")
    return ["", " ".join(notes)]


def _shown(number: dict[str, Any] | None, sign: str = "") -> str:
    if number is None:
        return "-"
    digits = 2 if abs(number["mean"]) >= 1 or sign else 4
    text = f"{number['mean']:{sign}.{digits}f}"
    if number["low"] is None or number["high"] is None:
        return text
    return f"{text} [{number['low']:{sign}.{digits}f}, {number['high']:{sign}.{digits}f}]"


def _short(value: str) -> str:
    """A number in four digits, anything else as it is."""
    try:
        return f"{float(value):.4g}" if len(value) > 8 else value
    except ValueError:
        return value
