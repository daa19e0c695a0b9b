"""Numbers on pages come from docs/results: every file has the ledger's form, every page says what the files say."""

from __future__ import annotations

import importlib.util
import json
import math
import re
import shlex
from datetime import date
from pathlib import Path
from typing import Any

import pytest

from spolia.errors import SpoliaError
from spolia.runs.packaged import packaged

HOUSE = Path(__file__).parents[1]
FILES = sorted((HOUSE / "docs" / "results").glob("*.json"))
_spec = importlib.util.spec_from_file_location("fill", HOUSE / "docs" / "fill.py")
assert _spec is not None and _spec.loader is not None
fill = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(fill)

TOP: dict[str, type | tuple[type, ...]] = {
    "name": str,
    "command": str,
    "commit": (str, type(None)),
    "date": str,
    "machine": dict,
    "versions": dict,
    "data": dict,
    "seeds": list,
    "rows": list,
    "notes": str,
}
ROW = {"method", "task", "metric", "unit", "mean", "low", "high", "n"}
MAY = {"baseline", "paired_difference"}
PAIR = {"against", "mean", "low", "high"}


def faults(ledger: Any, name: str) -> list[str]:
    """What keeps `ledger` from being of the form that docs/results/README.md describes."""
    if not isinstance(ledger, dict):
        return ["is not a mapping"]
    if odd := sorted(ledger.keys() - {"average"} ^ TOP.keys()):
        return [f"has {', '.join(odd)} too many or too few"]
    found = [
        f"{key} is a {type(ledger[key]).__name__}" for key, kind in TOP.items() if not isinstance(ledger[key], kind)
    ]
    if found:
        return found
    if ledger["name"] != name:
        found.append(f"calls itself {ledger['name']}")
    try:
        date.fromisoformat(ledger["date"])
    except ValueError:
        found.append(f"date is `{ledger['date']}`")
    found += _command_faults(ledger["command"])
    found += [f"{key} is empty" for key in ("rows", "data", "versions", "machine", "seeds") if not ledger[key]]
    places: set[tuple[str, ...]] = set()
    for i, row in enumerate(ledger["rows"]):
        found += [f"row {i}: {fault}" for fault in _row_faults(row)]
        place = tuple(str(row.get(key)) for key in ("method", "task", "metric"))
        found += [f"row {i}: {'; '.join(place)} stands twice"] if place in places else []
        places.add(place)
    return found


def _command_faults(command: str) -> list[str]:
    words = shlex.split(command)
    if words[:1] == ["python"] and len(words) > 1:
        return [] if (HOUSE / words[1]).is_file() else [f"command: there is no {words[1]}"]
    if words[:2] == ["spolia", "run"] and len(words) > 2:
        return [] if words[2] in packaged() else [f"command: no packaged recipe is called {words[2]}"]
    return [] if words[:2] == ["spolia", "demo"] else [f"`{command}` is not a command that others can give"]


def _row_faults(row: Any) -> list[str]:
    if not isinstance(row, dict) or not row.keys() >= ROW or not row.keys() <= ROW | MAY:
        return [f"the fields are {', '.join(sorted(ROW))}, and perhaps {', '.join(sorted(MAY))}"]
    found = [f"{key} is empty" for key in ("method", "task", "metric") if not row[key]]
    found += [] if isinstance(row["n"], int) and row["n"] >= 1 else [f"n is {row['n']}"]
    found += [] if row.get("baseline", True) is True else ["baseline is true, or absent"]
    found += _interval_faults(row)
    pair = row.get("paired_difference")
    if pair is not None:
        found += (
            _interval_faults(pair) if pair.keys() == PAIR else ["paired_difference is not against, mean, low, high"]
        )
    return found


def _interval_faults(row: dict[str, Any]) -> list[str]:
    numbers = [row["low"], row["mean"], row["high"]]
    if row["low"] is None and row["high"] is None:  # one run: no interval
        numbers = [row["mean"]]
    if not all(isinstance(x, int | float) and math.isfinite(x) for x in numbers):
        return ["mean, low and high are numbers (low and high both null where there is no interval)"]
    return [] if numbers == sorted(numbers) else [f"mean {row['mean']} is not between {row['low']} and {row['high']}"]


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_every_file_has_the_ledgers_form(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    found = faults(json.loads(text), file.stem)
    assert not found, "\n".join(f"docs/results/{file.name}: {fault}" for fault in found)
    assert not re.search(r"/(home|root|work|Users|tmp)/", text), (
        f"docs/results/{file.name} names a path of the machine."
    )


@pytest.mark.parametrize("page", fill.pages(), ids=lambda page: str(page.relative_to(HOUSE)))
def test_pages_say_what_the_ledger_and_the_code_say(page: Path) -> None:
    text, name = page.read_text(encoding="utf-8"), page.relative_to(HOUSE)
    try:
        new = fill.filled(text)
    except (ValueError, SpoliaError) as error:
        pytest.fail(f"{name}: {error}")
    old_lines, new_lines = text.splitlines(), new.splitlines()
    at = next((i for i, (a, b) in enumerate(zip(old_lines, new_lines, strict=False), 1) if a != b), len(new_lines))
    assert new == text, f"{name}:{at} is not what docs/results or the code says; `make docs` writes it anew."


@pytest.fixture
def good() -> dict[str, Any]:
    row = {
        "method": "ties",
        "task": "turned",
        "metric": "accuracy",
        "unit": "%",
        "mean": 71.26,
        "low": 70.0,
        "high": 72.5,
    }
    rows = [
        row | {"n": 5, "paired_difference": {"against": "average", "mean": 1.0, "low": -0.5, "high": 2.5}},
        row | {"n": 5, "task": "upright", "mean": 91.0, "low": None, "high": None},
        row | {"n": 5, "method": "average", "baseline": True, "mean": 70.25},
        row | {"n": 1, "metric": "wall time", "unit": "s", "mean": 4.567, "low": 4.5, "high": 4.6},
    ]
    named = {
        "name": "digits",
        "command": "spolia run merge/ties-tiny",
        "commit": None,
        "date": "2026-11-21",
        "notes": "",
    }
    return named | {
        "machine": {"cores": 2},
        "versions": {"spolia": "0"},
        "data": {"m": "none"},
        "seeds": [0],
        "rows": rows,
    }


def test_a_good_ledger_passes(good: dict[str, Any]) -> None:
    assert faults(good, "digits") == []


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"name": "other"}, "calls itself"),
        ({"date": "21.11.2026"}, "date is"),
        ({"rows": []}, "rows is empty"),
        ({"seeds": 1}, "seeds is a int"),
        ({"extra": 1}, "extra too many"),
        ({"command": "python benchmarks/nothing.py"}, "there is no"),
        ({"command": "spolia run merge/nothing"}, "no packaged recipe"),
        ({"command": "my notebook"}, "not a command"),
    ],
)
def test_a_bad_ledger_is_told(good: dict[str, Any], change: dict[str, Any], word: str) -> None:
    assert word in "\n".join(faults(good | change, "digits"))


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"mean": 99.0}, "not between"),
        ({"mean": math.nan}, "are numbers"),
        ({"low": None}, "are numbers"),
        ({"n": 0}, "n is 0"),
        ({"baseline": False}, "baseline is true"),
        ({"score": 1}, "fields are"),
        ({"task": "upright"}, "stands twice"),
        ({"paired_difference": {"mean": 1}}, "paired_difference is not"),
    ],
)
def test_a_bad_row_is_told(good: dict[str, Any], change: dict[str, Any], word: str) -> None:
    good["rows"][0] |= change
    assert word in "\n".join(faults(good, "digits"))


@pytest.fixture
def results(tmp_path: Path, good: dict[str, Any]) -> Path:
    (tmp_path / "digits.json").write_text(json.dumps(good))
    return tmp_path


@pytest.mark.parametrize(
    ("page", "expected"),
    [
        ("<!-- value digits; ties; turned; accuracy -->0.00<!-- end -->", "71.26"),
        ("<!-- value digits; ties; turned; accuracy -->?<!-- end -->", "71.3"),
        ("<!-- value digits; ties; turned; accuracy; n -->0<!-- end -->", "5"),
        ("<!-- value digits; ties; turned; wall time; high -->0.0<!-- end -->", "4.6"),
    ],
)
def test_a_value_comes_from_the_ledger(results: Path, page: str, expected: str) -> None:
    new = fill.filled(page, results)
    assert f"-->{expected}<!--" in new
    assert fill.filled(new, results) == new


def test_tables_come_from_the_ledger(results: Path) -> None:
    methods = fill.filled("a\n<!-- table digits; accuracy -->\nold\n<!-- end -->\nb", results)
    assert "old" not in methods and "71.3 [70.0, 72.5]" in methods and "average (baseline)" in methods
    tasks = fill.filled("<!-- table digits; tasks; ties: accuracy; ties: wall time --><!-- end -->", results)
    assert "| turned | 71.3 | 4.57 |" in tasks and "| upright | 91.0 | – |" in tasks and "ties, wall time (s)" in tasks


def test_code_blocks_are_left_alone(results: Path) -> None:
    page = "```html\n<!-- value digits; ties; turned; accuracy -->1<!-- end -->\n```\n"
    assert fill.filled(page, results) == page


@pytest.mark.parametrize(
    "part",
    [
        "<!-- value nothing; ties; turned; accuracy -->1<!-- end -->",
        "<!-- value digits; tie; turned; accuracy -->1<!-- end -->",
        "<!-- value digits; average; upright; accuracy -->1<!-- end -->",
        "<!-- value digits; ties; accuracy -->1<!-- end -->",
        "<!-- value digits; ties; turned; accuracy; median -->1<!-- end -->",
        "<!-- value digits; ties; turned; accuracy -->1",
        "<!-- table digits; speed --><!-- end -->",
        "<!-- table digits; tasks --><!-- end -->",
        "<!-- table digits; tasks; ties: speed --><!-- end -->",
    ],
)
def test_what_the_ledger_does_not_hold_is_told(results: Path, part: str) -> None:
    with pytest.raises(ValueError):
        fill.filled(part, results)


def test_settings_come_from_the_code() -> None:
    one = fill.filled("<!-- settings slerp --><!-- end -->")
    assert "| `t` | `0.5` | number |" in one
    both = fill.filled("<!-- settings ties; dare --><!-- end -->")
    assert re.search(r"\| `scope` \|.*\| `model` \|  \|", both)
