"""Drawings: well-formed, deterministic, theirs alone on the page, and never a crash on odd numbers."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.reports import figures, plots

LINES = {"kind": "lines", "title": "A <b> & c", "series": [{"name": "_a $x$", "x": [1, 2, 3], "y": [1, 4, 2]}]}
BARS = {
    "kind": "bars",
    "title": "Bars",
    "groups": ["g", "h"],
    "series": [
        {"name": f"m{i}", "values": [i, None], "low": [i - 1, 0], "high": [i + 1, 1], "baseline": i < 2}
        for i in range(9)
    ],
}
MATRIX = {"kind": "matrix", "title": "M", "rows": ["a", "b"], "columns": ["c"], "values": [[1.0], [float("nan")]]}


def drawn(data, name="figure-1"):
    return plots.draw(figures.read_figure(data), name)


@pytest.mark.parametrize("data", [LINES, BARS, MATRIX], ids=lambda d: d["kind"])
def test_svg_is_well_formed_named_and_free_of_addresses(data):
    svg = drawn(data)
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg" and root.get("role") == "img"
    titles = {root.find(t).get("id"): root.find(t).text for t in ("title", "desc")}
    assert set(root.get("aria-labelledby").split()) == set(titles)
    assert all(titles.values())
    assert "http" not in svg and "<style" not in svg and "#010101" not in svg
    assert "currentColor" in svg
    ElementTree.fromstring(plots.standalone(svg))


@pytest.mark.parametrize("data", [LINES, BARS, MATRIX], ids=lambda d: d["kind"])
def test_ids_are_the_figures_own_and_references_hold(data):
    svg = drawn(data, "figure-7")
    ids = re.findall(r'\bid="([^"]+)"', svg)
    assert len(ids) == len(set(ids))
    assert all(i.startswith("figure-7-") for i in ids)
    assert set(re.findall(r"url\(#([^)]+)\)", svg)) | set(re.findall(r'href="#([^"]+)"', svg)) <= set(ids)


@pytest.mark.slow
def test_same_figure_same_bytes():
    program = (
        "import json,sys; from spolia.reports import figures, plots;"
        "print(plots.draw(figures.read_figure(json.loads(sys.argv[1])), 'f'))"
    )
    runs = [
        subprocess.run([sys.executable, "-c", program, json.dumps(BARS)], capture_output=True, check=True).stdout
        for _ in "ab"
    ]
    assert runs[0] == runs[1] and len(runs[0]) > 1000


def test_text_stays_text_and_is_taken_literally():
    texts = [t.text for t in ElementTree.fromstring(drawn(LINES)).iter("text")]
    assert any("_a $x$" in (t or "") for t in texts)
    tricky = {**LINES, "series": [{"name": 'id="x" url(#y)', "x": [1, 2], "y": [1, 2]}]}
    assert 'id="x" url(#y)' in [t.text for t in ElementTree.fromstring(drawn(tricky)).iter("text")]


def test_no_figure_window_machinery():
    figure = {"kind": "bars", "title": "t", "groups": ["g"], "series": [{"name": "a", "values": [1]}]}
    program = (
        "import sys; from spolia.reports import plots, figures, html, card, tables\n"
        "assert 'matplotlib' not in sys.modules\n"
        f"plots.draw(figures.read_figure({figure!r}), 'f')\n"
        "assert not {'matplotlib.pyplot', 'torch', 'spolia.runs', 'spolia.methods'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_many_points_are_thinned_but_keep_their_spike():
    y = [0.0] * 20_000
    y[12_345] = 9.0
    series = figures.Series("a", tuple(map(float, range(20_000))), tuple(y))
    kept = plots._thin(series)
    assert len(kept) <= plots.MOST_POINTS + 2  # two a stretch, and both ends
    assert {0, 12_345, 19_999} <= set(kept)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (None, "not a mapping"),
        ({"kind": "pie"}, "no figure is of kind `pie`"),
        ({"kind": "lines", "series": []}, "no series"),
        ({"kind": "lines", "series": [{"x": [1], "y": [1, 2]}]}, "1 numbers for 2 places"),
        ({"kind": "matrix", "rows": ["a"], "columns": ["b"], "values": []}, "1 rows and holds 0"),
        ({"kind": "bars", "groups": "ab", "series": []}, "`groups` is not a list"),
    ],
)
def test_what_cannot_be_drawn_says_why(data, says):
    with pytest.raises(ValueError, match=says):
        figures.read_figure(data)


ODD = st.none() | st.floats(width=64) | st.just(10**400) | st.integers(-5, 5)


@pytest.mark.slow
@settings(max_examples=12, deadline=None)  # each draws a picture
@given(st.lists(ODD, min_size=2, max_size=6), st.sampled_from(["lines", "bars", "panels", "matrix"]))
def test_odd_numbers_never_break_a_drawing(values, kind):
    count = len(values)
    if kind == "lines":
        data = {"kind": kind, "series": [{"name": "a", "x": values, "y": values[::-1], "low": values, "high": values}]}
    elif kind == "matrix":
        data = {"kind": kind, "rows": ["r"] * count, "columns": ["c"] * count, "values": [values] * count}
    else:
        series = [{"name": "s", "values": values, "low": values[::-1], "high": values}] * (2 if kind == "bars" else 6)
        data = {"kind": "bars", "groups": ["g"] * count, "series": series}
    ElementTree.fromstring(drawn(data))


def test_curves_come_from_metrics():
    metrics = [{"phase": "a", "step": s, "loss": float(s), "flag": True, "note": "x"} for s in (0, 1, 2, 1)]
    metrics += [
        {"time": 1.0, "phase": "b", "loss": 3.0},
        {"phase": "a", "step": 1, "loss": 7.0},
        {"step": "x", "loss": 1},
    ]
    (curve,) = figures.learning_curves(metrics)
    assert [s.name for s in curve.series] == ["a"]  # b has one point, which is no curve
    assert curve.series[0].x == (0.0, 1.0, 2.0)
    assert curve.series[0].y == (0.0, 7.0, 2.0)  # a step logged again counts once


def test_numbers_of_a_figure_as_csv():
    assert figures.to_csv(figures.read_figure(LINES)).splitlines()[1] == "_a $x$,1.0,1.0,,"
    assert figures.to_csv(figures.read_figure(MATRIX)).splitlines()[1] == "a,c,1.0"
    assert figures.to_csv(figures.read_figure(BARS)).splitlines()[0] == "series,group,value,low,high"


def test_too_many_series_are_cut_with_a_word():
    many = {**BARS, "groups": ["g"] * 40, "series": [{"name": str(i), "values": [1.0] * 40} for i in range(50)]}
    cut, said = figures.drawable(figures.read_figure(many))
    assert (len(cut.series), len(cut.groups), len(cut.series[0].y)) == (40, 30, 30)
    assert "first 40 of 50 series" in said and "first 30 of 40 groups" in said
