"""Rows by hand: two learners, two seeds, three tasks."""

from __future__ import annotations

import math

import pytest

from spolia.bench.continual import Outcome, Protocol
from spolia.bench.continual_ledger import (
    CLASS_IL,
    FORGETTING,
    TASK_IL,
    found_of,
    ledger_rows,
    mean_matrix,
    metrics_of,
    so_far,
    value_of,
)

ORACLE = [[90.0, 0.0, 0.0], [70.0, 80.0, 0.0], [60.0, 75.0, 85.0]]


def outcome(shift: float = 0.0, scenario: str = "class", held: int | None = 2_000_000) -> Outcome:
    matrix = [[value + shift for value in row] for row in ORACLE]
    about = {"scenario": scenario, "experiences": ["task 1", "task 2", "task 3"], "sizes": [4, 4, 4], "classes": 6}
    task = [[90.0] * 3, [math.nan] * 3, [92.0, 91.0, 90.0]]
    return Outcome(about, Protocol(), matrix, task, [0.0] * 3, [50.0] * 3, [5, 5, 5], 100, 0.5, held)


def rows_by(rows):
    return {(row["method"], row["task"], row["metric"]): row for row in rows}


def test_rows_are_means_with_differences_seed_by_seed():
    found = {"low": [found_of(outcome()), found_of(outcome(2.0))], "high": [found_of(outcome(v)) for v in (1.0, 5.0)]}
    rows = rows_by(ledger_rows(found, "three tasks", against={"high": "low"}, baselines=["low"]))
    row = rows["high", "average", CLASS_IL]
    assert row["mean"] == pytest.approx(220 / 3 + 3) and row["n"] == 2 and row["low"] < row["mean"] < row["high"]
    gap = row["paired_difference"]
    assert gap["against"] == "low" and gap["mean"] == pytest.approx(2.0)  # 1 and 3
    assert rows["low", "task 2", CLASS_IL]["mean"] == 76.0 and rows["low", "task 2", CLASS_IL]["baseline"]
    assert rows["low", "three tasks", FORGETTING]["mean"] == pytest.approx(17.5)
    assert rows["low", "three tasks", "time"]["mean"] == pytest.approx(5.0)
    assert rows["low", "three tasks", "memory"]["mean"] == pytest.approx(2.0)
    assert "paired_difference" not in rows["low", "average", CLASS_IL]


def test_without_columns_there_is_one_row_a_metric():
    rows = rows_by(ledger_rows({"one": [found_of(outcome())]}, "three tasks", each=False))
    assert {task for _, task, _ in rows} == {"three tasks"}
    assert rows["one", "three tasks", CLASS_IL]["mean"] == pytest.approx(220 / 3)
    assert rows["one", "three tasks", CLASS_IL]["low"] is None  # one seed says nothing of others


def test_what_was_not_measured_has_no_row():
    free = found_of(outcome(scenario="domain", held=None))
    rows = rows_by(ledger_rows({"one": [free]}, "domains", judged="domain"))
    assert {metric for *_, metric in rows} == set(metrics_of("domain")) - {"memory"}
    assert free["task_matrix"][1] == [None, None, None]  # strict JSON


def test_the_judge_says_which_rule_comes_first():
    assert metrics_of("class")[:2] == [CLASS_IL, TASK_IL] == metrics_of("class", "task")[1::-1]
    one = found_of(outcome())
    assert value_of(one, TASK_IL) == pytest.approx(91.0)
    assert so_far(mean_matrix([one, one])) == pytest.approx([90.0, 75.0, 220 / 3])
