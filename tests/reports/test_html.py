"""The report page: every part is there, nothing is fetched, nothing in a folder breaks it."""

from __future__ import annotations

import base64
import json
import re
import shutil
from html import escape
from html.parser import HTMLParser

import pytest

from spolia.errors import SpoliaError
from spolia.reports import plots
from spolia.reports.html import MOST_BYTES, write_report

VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """What a test asks of a page: its tags, its text outside style, and whether every tag is closed in order."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        self.text = re.sub(r"\s+", " ", " ".join(self.words))

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    def all(self, tag):
        return [attrs for found, attrs in self.tags if found == tag]


def report(folder) -> Page:
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert page.open == []
    return page


@pytest.fixture(scope="module")
def source(sound_run) -> str:
    return write_report(sound_run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(source) -> Page:
    page = Page(source)
    assert page.open == []
    return page


@pytest.fixture
def undrawn(monkeypatch):
    """Drawing takes most of a report's time; tests about the words of a page go without."""
    monkeypatch.setattr(
        plots, "draw", lambda figure, name: f'<svg role="img"><title>{escape(figure.title)}</title></svg>'
    )


PARTS_OF_THE_PAGE = """\
Two experts
Every phase was completed.
Ties keeps most of both experts.
80.0 [79.0, 82.0]
+20.0 [+19.0, +21.0] better
Paired difference vs average
Accuracy by task
Against density
Learning curves
1,078 labelled digits
no data; weights only
5.0 MiB measured; 3.0 MiB planned
30.0 s
result/model.safetensors 2.0 KiB
method: {name: ties}
torch 2.13.0
0123456789ab
spolia run merge/ties-tiny --seeds 3
One small network.
two tensors differ little"""


def test_every_part_is_on_the_page(page):
    assert [part for part in PARTS_OF_THE_PAGE.splitlines() if part not in page.text] == []


def test_nothing_is_fetched_and_nothing_runs(source, page):
    assert not re.search(r"https?://|@import|<script|<link|<iframe|\bon\w+=", source)
    for _, attrs in page.tags:
        for key in ("href", "src"):
            assert (attrs.get(key) or "#").startswith(("#", "data:"))
    assert any("default-src 'none'" in (meta.get("content") or "") for meta in page.all("meta"))


def test_structure_for_readers_without_sight(page):
    assert page.all("html")[0]["lang"] == "en"
    skip = next(a for a in page.all("a") if a.get("class") == "skip")
    ids = [attrs["id"] for _, attrs in page.tags if attrs.get("id")]
    assert skip["href"][1:] in ids
    assert len(ids) == len(set(ids))
    assert {a["href"][1:] for a in page.all("a") if a["href"].startswith("#")} <= set(ids)
    assert all(th.get("scope") for th in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    assert all(svg.get("role") == "img" for svg in page.all("svg"))
    assert len(page.all("svg")) == len(page.all("figure")) == 5  # by task, three of its own, one curve


def test_light_dark_print_and_phone(source):
    for rule in (
        "prefers-color-scheme: dark",
        "@media print",
        "@media (max-width",
        "overflow-x: auto",
        "width=device-width",
    ):
        assert rule in source


def test_figures_download_with_their_numbers(page):
    links = {a["download"]: a["href"] for a in page.all("a") if a.get("download")}
    assert {"against-density.svg", "against-density.csv", "results.csv"} <= set(links)
    numbers = base64.b64decode(links["against-density.csv"].partition("base64,")[2]).decode()
    assert numbers.splitlines()[2] == "ties,0.2,70.0,69.0,71.0"
    assert base64.b64decode(links["cosines.svg"].partition("base64,")[2]).startswith(b"<svg xmlns=")


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ("running", "had not ended"),
        ("interrupted", "was interrupted"),
        ("failed", "The run failed"),
        ("done", "Every phase was completed"),
        ("what?", "does not say"),
    ],
)
def test_state_is_said(make_run, undrawn, state, says):
    page = report(make_run(status={"state": state, "phase": "merge", "message": "disk full"}))
    assert says in page.text and "disk full" in page.text


PARTS = ["recipe", "plan", "env", "status", "metrics", "results", "figures", "summary"]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("content", [None, "", '{"a": [1, 2', "[1, 2]", "{}", "null", "\x00\x1b\ufffe"])
def test_no_missing_or_broken_part_breaks_the_page(make_run, undrawn, part, content):
    page = report(make_run(**{part: content}))
    assert "Environment and command" in page.text
    if part in ("plan", "env", "status", "results") and content in ("[1, 2]", '{"a": [1, 2'):
        assert f"{part}.json" in page.text.partition("Not in this report")[2]


def test_a_folder_with_only_a_plan(make_run):
    page = report(make_run(**dict.fromkeys(set(PARTS) - {"plan"})))
    assert "Ties merge of 2 experts; nothing has been measured." in page.text
    assert page.all("svg") == []


def test_half_written_last_line_is_left_out_and_said(make_run, undrawn):
    steps = "".join(json.dumps({"step": s, "phase": "train", "loss": 1.0 * s}) + "\n" for s in range(5))
    page = report(make_run(metrics=steps + '{"step": 5, "lo'))
    assert "the last line of metrics.jsonl is half-written" in page.text
    assert "Learning curves" in page.text


def test_wrong_shapes_everywhere(make_run, undrawn):
    odd = {
        "phases": [1, {"name": None}],
        "inputs": "x",
        "warnings": 3,
        "seconds": "x",
        "data": [],
        "seeds": {},
        "git": 1,
        "rows": 5,
    }
    odd |= {
        "versions": [1],
        "machine": "x",
        "dtypes": 3,
        "tensors": {"a": 1},
        "peak_memory_bytes": "x",
        "state": [],
        "started": 5,
    }
    assert report(make_run(plan=odd, env=odd, status=odd, results=odd, figures=[1, {}, odd], metrics="1\nx\n")).text


def test_not_a_number_and_missing_rows(make_run, undrawn, ledger):
    ledger["rows"] = [r for r in ledger["rows"] if r["method"] != "dare" or r["task"] == "upright"]
    ledger["rows"][0].update(mean=float("nan"), low=float("-inf"), high=float("inf"))
    ledger["rows"][1].update(mean=None, low=None)
    page = report(make_run(results=ledger))
    assert "nan [−inf, inf]" in page.text
    assert "not measured" in page.text


def test_markup_in_names_is_shown_not_obeyed(make_run, ledger):
    evil = "<script>alert(1)</script>\"'><img src=x onerror=y>"
    ledger |= {"name": evil, "notes": evil, "command": evil, "data": {evil: evil}}
    for row in ledger["rows"]:
        row["method"], row["task"] = row["method"] + evil, row["task"] + evil
    figure = {
        "kind": "bars",
        "title": evil,
        "caption": evil,
        "groups": [evil],
        "series": [{"name": evil, "values": [1]}],
    }
    page = report(make_run(results=ledger, recipe=evil, summary=evil, figures=[figure], status={"message": evil}))
    assert not page.all("script") and not page.all("img")
    assert evil in page.text


def test_surrogates_and_controls_do_not_stop_it(make_run, ledger):
    ledger["rows"][0]["method"] = "a\ud800\u0000\u202e\x1b[31mb"
    assert "\x1b" not in report(make_run(results=ledger)).text


@pytest.mark.slow
def test_it_is_the_same_every_time(make_run):
    folder = make_run()
    first = write_report(folder).read_bytes()
    assert write_report(folder).read_bytes() == first
    assert not list(folder.glob("*.tmp")) and not list(folder.glob(".*"))


@pytest.mark.slow
def test_everything_large_stays_below_the_bound(make_run, ledger):
    ledger["rows"] = [
        {
            "method": f"method number {i}",
            "task": f"t{k}",
            "metric": "accuracy",
            "unit": "%",
            "mean": i / 7,
            "low": 0.1,
            "high": 0.9,
        }
        for i in range(400)
        for k in range(6)
    ]
    ledger["notes"] = "n" * 10**6
    x = list(range(40_000))
    big = {"kind": "lines", "title": "big", "series": [{"name": "s", "x": x, "y": [v / 3 for v in x]}]}
    folder = make_run(results=ledger, figures=[big] * 3, recipe="# r\n" * 10**5)
    for i in range(300):
        (folder / f"file-{i}").touch()
    page = report(folder)
    assert (folder / "report.html").stat().st_size < MOST_BYTES
    assert "was left out to keep the page small" in page.text


def test_not_a_run_folder(tmp_path, make_run):
    with pytest.raises(SpoliaError, match="not a run folder"):
        write_report(tmp_path)
    folder = make_run()
    shutil.rmtree(folder)
    with pytest.raises(SpoliaError, match="no such folder"):
        write_report(folder)


def row(method: str, task: str, metric: str, mean: float, **more) -> dict:
    return {
        "method": method,
        "task": task,
        "metric": metric,
        "unit": "",
        "mean": mean,
        "baseline": method == "base",
    } | more


def test_tables_of_one_column_stand_side_by_side(make_run, undrawn, ledger):
    paired = {"paired_difference": {"against": "base", "mean": -2.0, "low": -3.0, "high": -1.0}}
    for metric, value in (("forgetting", 4.5), ("novel accuracy", 30.25)):
        ledger["rows"] += [row("base", "stream", metric, value + 2), row("ties", "stream", metric, value, **paired)]
    page = report(make_run(results=ledger))
    _, _, others = page.text.partition("Other measures, stream; mean, below it the paired difference vs base.")
    assert others.startswith(
        " Method forgetting lower is better novel accuracy higher is better Baselines base 6.500 32.25"
    )
    assert "Methods ties 4.500 −2.000 [−3.000, −1.000] better 30.25 −2.00 [−3.00, −1.00] worse" in others
    assert len(page.all("table")) == 5  # main, these, paired differences, phases, inputs
    assert page.text.index("Figures of the method") < page.text.index("Other measures, stream")


def test_many_measures_share_a_table_as_far_as_a_page_is_wide(make_run, undrawn, ledger):
    ledger["rows"] += [row("ties", "stream", f"measure {i}", i) for i in range(8)]
    assert report(make_run(results=ledger)).text.count("Other measures, stream") == 2  # seven, then one


def test_a_single_seed_is_said_to_leave_differences_open(make_run, undrawn, ledger):
    for one in ledger["rows"]:
        if "paired_difference" in one:
            one["paired_difference"] |= {"low": None, "high": None}
    page = report(make_run(results=ledger))
    assert "A single seed gives them no interval" in page.text and "minus average, mean." in page.text


def test_each_difference_names_its_own_where_there_are_several(make_run, undrawn, ledger):
    for one in ledger["rows"]:
        if one["method"] == "dare":
            one["paired_difference"]["against"] = "ties"
    page = report(make_run(results=ledger))
    assert "Paired difference Baselines" in page.text and "better vs ties" in page.text


def test_what_a_run_resumes_from_is_one_entry(make_run, undrawn):
    folder = make_run()
    (folder / "checkpoints").mkdir()
    for i in range(3):
        (folder / "checkpoints" / f"step-{i}").write_bytes(b"0" * 1024)
    (folder / ".lock").touch()
    page = report(folder)
    assert "checkpoints/: 3 files 3.0 KiB" in page.text and "step-1" not in page.text and ".lock" not in page.text


def test_the_same_data_is_not_told_twice(make_run, undrawn, ledger):
    ledger["data"] = {"merge": "weights only", "experts": "none", "choice": "197 digits"}
    page = report(make_run(results=ledger, status={"state": "done", "seconds": {"merge": 1.0}}))
    phases = page.text.partition("Each phase with the data")[2].partition("Inputs and plan")[0]
    assert "weights only" in phases and "choice 197 digits" in phases
    ledger["data"] = {"again": "none"}  # the plan's words for `merge`
    assert "again" not in report(make_run(results=ledger)).text.partition("Each phase")[2].partition("Inputs and")[0]


def test_words_in_backticks_are_code(make_run, undrawn, ledger):
    page = report(make_run(results=ledger | {"notes": "`reads`: a <b> count"}))
    assert len(page.all("code")) == 1 and "<b> count" in page.text and not page.all("b")[1:]
