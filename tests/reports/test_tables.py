"""The main table: order, best, averages, paired differences, and its four written forms."""

from __future__ import annotations

import csv
import io
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia.errors import SpoliaError
from spolia.reports import tables
from spolia.reports.ledger import all_tables
from spolia.reports.tables import main_table, to_csv, to_latex, to_markdown, to_rich, to_text


def test_baselines_come_first_and_average_last(ledger):
    table = main_table(ledger)
    assert [line.method for line in table.lines] == ["base", "expert upright", "ties", "average", "dare"]
    assert [line.baseline for line in table.lines] == [True, True, False, False, False]
    assert table.columns == ("upright", "turned", "average")


def test_best_is_among_methods_not_baselines(ledger):
    table = main_table(ledger)
    best = [
        (line.method, c) for line in table.lines for c, cell in zip(table.columns, line.cells, strict=True) if cell.best
    ]
    assert best == [("ties", "upright"), ("ties", "average"), ("dare", "turned")]  # the expert's 97.0 does not count


@pytest.mark.parametrize("metric", ["loss", "queries", "cost"])
def test_lower_is_better_for_losses_and_costs(ledger, metric):
    for row in ledger["rows"]:
        row["metric"] = metric
    marked = {line.method for line in main_table(ledger).lines if any(cell.best for cell in line.cells)}
    assert marked == {"average"}


def test_average_is_computed_only_where_every_task_is_measured(ledger):
    ledger["rows"] = [
        r for r in ledger["rows"] if r["task"] != "average" and (r["method"], r["task"]) != ("dare", "turned")
    ]
    cells = {line.method: line.cells[-1] for line in main_table(ledger).lines}
    assert cells["dare"] is None
    assert cells["ties"].mean == pytest.approx(75.0)  # (80 + 70) / 2, exact in binary
    assert not cells["ties"].has_interval


def test_levels_have_no_average(ledger):
    """`average: false`: tasks whose mean says nothing; one that is stated all the same is shown."""
    whole = main_table(ledger | {"average": False})
    assert whole.columns == ("upright", "turned", "average")
    ledger["rows"] = [r for r in ledger["rows"] if r["task"] != "average"]
    assert main_table(ledger | {"average": False}).columns == ("upright", "turned")
    assert main_table(ledger).columns == ("upright", "turned", "average")


def test_one_task_has_no_average_column(ledger):
    ledger["rows"] = [r for r in ledger["rows"] if r["task"] == "upright"]
    table = main_table(ledger)
    assert table.columns == ("upright",)
    assert table.lines[2].difference.mean == 25.0


def test_paired_difference_column(ledger):
    table = main_table(ledger)
    assert table.against == "average"
    line = next(line for line in to_text(table).splitlines() if line.startswith("ties"))
    assert line.split("  ")[-1].strip() == "+20.0 [+19.0, +21.0]"


def test_last_of_equal_rows_counts(ledger):
    again = {**ledger["rows"][0], "mean": 11.0}
    ledger["rows"].append(again)
    assert main_table(ledger).lines[2].cells[0].mean == 11.0


def test_text_shrinks_to_the_width_and_says_how(ledger):
    table = main_table(ledger)
    assert "mean [low, high]" in to_text(table) and "±" not in to_text(table).splitlines()[3]
    narrow = to_text(table, 80)
    assert "± half the interval" in narrow.splitlines()[0]
    assert max(map(len, narrow.splitlines()[1:])) <= 80
    assert "[" not in to_text(table, 40).split("\n", 1)[1]


def test_best_is_starred_in_text(ledger):
    starred = [line for line in to_text(main_table(ledger)).splitlines()[2:] if "*" in line]
    assert [line.split()[0] for line in starred] == ["ties", "dare"]


def test_rich_takes_names_literally(ledger):
    from rich.console import Console

    ledger["rows"][0]["method"] = "[red]x[/red]"
    out = io.StringIO()
    Console(file=out, width=200, no_color=True).print(to_rich(main_table(ledger)))
    assert "[red]x[/red]" in out.getvalue()


def test_markdown_escapes_and_bolds(ledger):
    for row in ledger["rows"]:
        row["method"] = row["method"].replace("ties", "a|b_<i>")
    written = to_markdown(main_table(ledger))
    assert r"| a\|b\_\<i\> |" in written
    assert "**80.0 [79.0, 82.0]**" in written
    rows = [line for line in written.splitlines() if line.startswith("|")]
    assert len({line.replace(r"\|", "").count("|") for line in rows}) == 1


def test_latex_escapes_everything():
    written = tables.latex(r"a_b & 50% #1 $x$ {y} \input ~^ <>|")
    assert written == (
        r"a\_b \& 50\% \#1 \$x\$ \{y\} \textbackslash{}input \textasciitilde{}\textasciicircum{} "
        r"\textless{}\textgreater{}\textbar{}"
    )
    assert tables.latex("[x]").startswith("{[}")  # after a line break, LaTeX reads [x] as an argument


def test_latex_is_a_booktabs_table(ledger):
    written = to_latex(main_table(ledger))
    for part in (
        r"\toprule",
        r"\bottomrule",
        r"\begin{tabular}{lrrrr}",
        r"accuracy (\%)",
        r"\textbf{80.0 [79.0, 82.0]}",
    ):
        assert part in written
    assert written.count(r"\midrule") == 2  # under the header, and between baselines and methods
    lines = [line for line in written.splitlines() if line.endswith(r"\\")]
    assert {line.count("&") for line in lines} == {4}


def test_csv_holds_numbers_in_full(ledger):
    ledger["rows"][0]["mean"] = 1 / 3
    rows = list(csv.DictReader(io.StringIO(to_csv(main_table(ledger)))))
    ties = next(r for r in rows if r["method"] == "ties" and r["task"] == "upright")
    assert float(ties["mean"]) == 1 / 3
    assert (ties["low"], ties["high"], ties["n"], ties["baseline"]) == ("79.0", "82.0", "3", "false")
    assert (ties["against"], ties["difference"]) == ("average", "25.0")
    assert len(rows) == 15


def test_every_metric_has_its_table_accuracy_first(ledger):
    ledger["rows"].insert(0, {"method": "ties", "task": "upright", "metric": "loss", "unit": "nats", "mean": 0.5})
    assert [table.metric for table in all_tables(ledger)] == ["accuracy", "loss"]


@pytest.mark.parametrize("results", [{}, {"rows": None}, {"rows": [1, None, {}, {"method": "a"}]}])
def test_a_ledger_without_rows_has_no_lines(results):
    assert main_table(results).lines == ()
    assert all_tables(results) == []


NUMBERS = st.none() | st.floats() | st.integers() | st.text(max_size=3) | st.booleans()
NAMES = st.text(min_size=1, max_size=8) | st.sampled_from(["average", "a", "b"])
ROWS = st.fixed_dictionaries(
    {"method": NAMES, "task": NAMES, "metric": st.sampled_from(["accuracy", "loss"]), "mean": NUMBERS, "low": NUMBERS},
    optional={
        "high": NUMBERS,
        "n": NUMBERS,
        "unit": NAMES,
        "baseline": st.booleans(),
        "paired_difference": st.none()
        | st.fixed_dictionaries({"against": NAMES, "mean": NUMBERS, "low": NUMBERS, "high": NUMBERS}),
    },
)


@given(st.lists(ROWS, max_size=12))
def test_no_ledger_breaks_a_table(rows):
    for table in all_tables({"rows": rows}):
        for written in (to_text(table), to_text(table, 60), to_markdown(table), to_latex(table), to_csv(table)):
            written.encode("utf-8")
            assert "\x1b" not in written  # nothing in a name may drive the terminal


def test_not_a_number_is_shown_and_never_best(ledger):
    ledger["rows"][0]["mean"] = math.nan
    table = main_table(ledger)
    assert "nan" in to_text(table)
    assert not table.lines[2].cells[0].best


def test_render_every_form(make_run):
    folder = make_run()
    for to, sign in (("text", "---"), ("markdown", "| ---"), ("latex", r"\toprule"), ("csv", "method,baseline")):
        assert sign in tables.render(folder, to)


def test_render_answers_mistakes(make_run, tmp_path):
    folder = make_run(results=None)
    with pytest.raises(SpoliaError, match="no results yet"):
        tables.render(folder)
    with pytest.raises(SpoliaError, match="did you mean `markdown`"):
        tables.render(folder, "markdwn")
    with pytest.raises(SpoliaError, match="no such folder"):
        tables.render(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(SpoliaError, match="not a run folder"):
        tables.render(tmp_path / "empty")


def test_json_nan_survives_reading(make_run, ledger):
    ledger["rows"][0]["mean"] = math.inf
    assert "Infinity" in json.dumps(ledger)
    assert "inf" in tables.render(make_run(results=ledger))
