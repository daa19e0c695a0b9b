"""Few-shot tables: what is made of an outcome, and its rows."""

from __future__ import annotations

import pytest

from spolia.bench.continual import Outcome, Protocol
from spolia.bench.fscil import (
    ACCURACY,
    BASE,
    DROP,
    HARMONIC,
    LEARNED,
    NOVEL,
    TIME,
    found_of,
    grouped_harmonic,
    ledger_rows,
    value_of,
)
from spolia.bench.multitask import AVERAGE


def outcome(shift: float = 0.0) -> Outcome:
    """60 base tests of six classes, then 20 and 20 of two."""
    matrix = [[90.0 + shift, 0, 0], [80.0, 60, 0], [70.0, 50, 40]]
    about = {"scenario": "class", "experiences": ["task 1", "task 2", "task 3"]}
    return Outcome(about, Protocol(), matrix, matrix, [0.0] * 3, [0.0] * 3, [60, 20, 20], 30, 1.5, None)


def test_what_is_found_by_hand() -> None:
    found = found_of(outcome(), learned=2500)
    assert found["sessions"] == [90, 75, 60] and found["mean"] == 75
    assert value_of(found, DROP) == 30 and value_of(found, BASE) == 70 and value_of(found, NOVEL) == 45
    assert value_of(found, HARMONIC) == pytest.approx(2 * 70 * 45 / 115)
    assert value_of(found, ACCURACY, 1) == 75 and found["retention"] == pytest.approx(2 / 3)
    assert value_of(found, TIME) == 1.5 and value_of(found, LEARNED) == 2.5


def test_rows_have_sessions_their_mean_and_differences() -> None:
    found = {"ncm": [found_of(outcome()), found_of(outcome(1))], "asp": [found_of(outcome(2)), found_of(outcome(4))]}
    rows = {
        (r["method"], r["task"], r["metric"]): r for r in ledger_rows(found, "toy", against="ncm", baselines=["ncm"])
    }
    assert [task for m, task, metric in rows if m == "asp" and metric == ACCURACY] == [
        "base",
        "session 1",
        "session 2",
        AVERAGE,
    ]
    first = rows["asp", "base", ACCURACY]
    assert first["mean"] == 93 and first["n"] == 2 and first["high"] == 100  # no accuracy is above
    assert first["paired_difference"]["against"] == "ncm" and first["paired_difference"]["mean"] == 2.5
    assert rows["asp", AVERAGE, ACCURACY]["paired_difference"]["mean"] == pytest.approx(2.5 / 3)
    assert rows["ncm", "toy", DROP]["mean"] == 30.5 and rows["ncm", "toy", DROP]["baseline"]
    assert "paired_difference" not in rows["ncm", "toy", DROP] and rows["asp", "toy", TIME]["unit"] == "s"


def test_the_grouped_harmonic_is_the_pooled_one_for_classes_of_equal_size() -> None:
    each = [90.0, 70.0, 80.0, 60.0, 40.0, 30.0, 50.0, 20.0]  # four old classes, two sessions of two
    old, new = 75.0, 35.0
    assert grouped_harmonic(each, 4, 2) == pytest.approx(2 * old * new / (old + new))
    assert grouped_harmonic([100.0, 0.0, 0.0], 1, 2) == 0  # of a group that reaches over the base none is old
