from __future__ import annotations

import math
import random
from statistics import fmean

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spolia.bench.multitask import (
    Share,
    Task,
    accuracy,
    choose,
    evaluate,
    ledger_rows,
    mean_percent,
    paired,
    t_interval,
    t_quantile,
    wilson,
)  # fmt: skip

# Student's table, two-sided 95 % and 99 %, as printed in statistics books
TABLE = {(1, 0.975): 12.706, (2, 0.975): 4.303, (4, 0.975): 2.776, (9, 0.975): 2.262, (30, 0.975): 2.042}
TABLE |= {(1, 0.995): 63.657, (3, 0.995): 5.841, (10, 0.995): 3.169, (120, 0.995): 2.617}


@pytest.mark.parametrize(("degrees", "probability"), TABLE)
def test_t_quantile_is_the_printed_table(degrees, probability):
    assert round(t_quantile(probability, degrees), 3) == TABLE[degrees, probability]


def test_t_quantile_against_scipy():
    stats = pytest.importorskip("scipy.stats")
    for degrees in (*range(1, 20), 57, 200):
        for probability in (0.9, 0.975, 0.999):
            # both are iterative; 1e-9 is far below a printed digit
            assert math.isclose(t_quantile(probability, degrees), stats.t.ppf(probability, degrees), rel_tol=1e-9)


def test_wilson_known_value_and_limits():
    low, high = wilson(81 / 263, 263)  # Newcombe 1998, table I
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)
    # rounding of a few ulp
    assert all(wilson(0.0, n)[0] == 0 and wilson(1.0, n)[1] == 1 for n in range(1, 200))  # the share, not a bit beside
    assert wilson(1.0, 10)[0] < 1.0  # ten of ten is no certainty


@given(st.integers(1, 500), st.floats(0, 1))
def test_wilson_holds_the_share_and_mirrors(n, part):
    share = round(part * n) / n
    low, high = wilson(share, n)
    assert low - 1e-12 <= share <= high + 1e-12  # rounding of a few ulp
    assert wilson(1 - share, n) == pytest.approx((1 - high, 1 - low), abs=1e-12)


def test_t_interval_covers_as_often_as_it_says():
    rng = random.Random(0)
    hits = sum(i.low <= 3.0 <= i.high for i in (t_interval([rng.gauss(3, 2) for _ in range(4)]) for _ in range(4000)))
    assert abs(hits / 4000 - 0.95) < 0.014  # four binomial standard deviations


def test_a_single_value_has_no_interval():
    assert t_interval([3.0]).low is None


def test_paired_differences_cancel_what_seeds_share():
    seeds = [50.0, 80.0, 95.0]
    gap = paired([s + d for s, d in zip(seeds, (1.0, 1.5, 2.0), strict=True)], seeds)
    assert gap.mean == 1.5 and 0 < gap.low < gap.high < 3.0
    with pytest.raises(ValueError, match="shorter"):
        paired([1.0, 2.0], [1.0])


def test_accuracy_counts_over_batches_and_nan_is_wrong():
    logits = torch.tensor([[2.0, 1.0], [0.0, 1.0], [3.0, 1.0], [math.nan, 1.0], [1.0, math.nan]])
    labels = torch.tensor([0, 1, 1, 0, 1])
    for batch in (1, 2, 100):
        assert accuracy(lambda rows: logits[rows], torch.arange(5), labels, batch) == Share(2, 5)


def test_evaluate_asks_for_each_tasks_own_outputs():
    tasks = [Task("a", torch.zeros(4, 1), torch.zeros(4).long()), Task("b", torch.zeros(2, 1), torch.ones(2).long())]
    shares = evaluate(lambda name, x: torch.tensor([[1.0, 0.0]]).expand(len(x), 2), tasks)
    assert shares == {"a": Share(4, 4), "b": Share(0, 2)}
    assert mean_percent(shares) == 50.0  # tasks weigh the same, not items


def test_choose_takes_the_first_of_equals_and_never_nan():
    assert choose([3, 1, 2], lambda v: {3: 0.5, 1: 0.5, 2: 0.4}[v]) == (3, [0.5, 0.5, 0.4])
    assert choose([1, 2], lambda v: {1: math.nan, 2: 0.1}[v])[0] == 2


def scores(*percents):
    return [{"a": Share(a, 100), "b": Share(b, 100)} for a, b in percents]


def test_rows_over_seeds():
    rows = ledger_rows(
        {"base": scores((60, 50), (62, 40)), "average": scores((80, 70), (82, 72)), "ties": scores((81, 71), (84, 73))},
        baselines=["base"],
        against="average",
    )
    assert [(r["method"], r["task"]) for r in rows[:3]] == [("base", "a"), ("base", "b"), ("base", "average")]
    assert rows[0]["baseline"] is True and "baseline" not in rows[3]
    ties = next(r for r in rows if r["method"] == "ties" and r["task"] == "average")
    assert ties["mean"] == fmean([76, 78.5]) and ties["n"] == 2 and ties["unit"] == "%"
    assert ties["paired_difference"]["against"] == "average"
    assert ties["paired_difference"]["mean"] == pytest.approx(fmean([1.0, 1.5]))
    assert "paired_difference" not in next(r for r in rows if r["method"] == "average")
    assert all(0 <= r["low"] <= r["mean"] <= r["high"] <= 100 for r in rows)


def test_rows_of_one_seed_have_wilsons_interval():
    rows = ledger_rows({"average": scores((80, 60)), "ties": scores((90, 60))}, against="average")
    assert rows[0]["n"] == 100
    assert (rows[0]["low"], rows[0]["high"]) == pytest.approx([100 * p for p in wilson(0.8, 100)])
    both = rows[2]
    # the same images stand behind both tasks: they count once
    assert both["task"] == "average" and both["n"] == 100
    assert rows[-1]["paired_difference"] == {"against": "average", "mean": 5.0, "low": None, "high": None}


def test_a_method_with_fewer_tasks_has_no_average():
    rows = ledger_rows({"average": scores((80, 60)), "pair": [{"a": Share(9, 10)}]}, against="average")
    assert [(r["task"], "paired_difference" in r) for r in rows if r["method"] == "pair"] == [("a", False)]
