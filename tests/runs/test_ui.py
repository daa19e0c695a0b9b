"""The pages of `spolia ui`, asked for over loopback: shown to who has the token, from this machine, and nothing else."""

from __future__ import annotations

import http.client
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any
from urllib.parse import quote, urlsplit

import pytest

pytest.importorskip("starlette")
pytest.importorskip("uvicorn")
httpx = pytest.importorskip("httpx")

from spolia.errors import SpoliaError  # noqa: E402
from spolia.reports.pages import render  # noqa: E402
from spolia.runs.serve import served  # noqa: E402
from spolia.runs.ui import application  # noqa: E402

TOKEN = "t0ken-of_this-test"
EVIL = "<script>alert(1)</script>\"'><img src=x onerror=y>"
VOID = {"meta", "link", "br", "hr", "img", "input"}


class Page(HTMLParser):
    """A page whose tags are closed in order; what it says, and what a reader without sight is given."""

    def __init__(self, source: str):
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.open: list[str] = []
        self.feed(source)
        assert self.open == [], f"not closed: {self.open}"
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
        self.words.append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for found, attrs in self.tags if found == tag]


def ledger(**more: Any) -> dict[str, Any]:
    rows = [
        {"method": m, "task": t, "metric": "accuracy", "unit": "%", "mean": mean, "baseline": m == "average"}
        for m, mean in (("average", 60.0), ("ties", 80.25))
        for t in ("upright", "turned")
    ]
    return {"name": "merge/ties-tiny", "seeds": [0, 1], "data": {"merge": "weights only"}, "rows": rows} | more


def write(folder: Path, state: str | None = "done", **parts: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    status = {"state": state, "phase": "merge", "started": "2026-11-21T10:00:00", "message": ""}
    contents = {"status.json": status, "results.json": ledger(), "recipe.yaml": "spolia: 1\nseed: 0\n"}
    contents |= {"plan.json": {"title": "ties merge of 2 experts", "method": "ties", "seconds": 60.0}}
    contents |= {name.replace("__", "."): value for name, value in parts.items()}
    for name, value in contents.items():
        if value is not None:
            (folder / name).write_text(value if isinstance(value, str) else json.dumps(value))
    return folder


@pytest.fixture(scope="module")
def top(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all kinds, and a secret beside their folder."""
    home = tmp_path_factory.mktemp("home")
    (home / "secret.json").write_text('{"state": "top secret"}')
    runs = home / "runs"
    write(
        runs / "first",
        report__html="<!doctype html><script>alert(1)</script><p>the report",
        summary__txt="It is good.\n",
    )
    write(runs / "sweep" / "second", recipe__yaml="spolia: 1\nseed: 5\n", results__json=ledger(seeds=[0]))
    write(runs / "other", results__json=ledger(data={"test": "other inputs"}))
    write(runs / "failed", "failed", results__json=None)
    write(runs / "odd seeds", results__json=ledger(seeds=["../../../secret"]))
    write(runs / "no rows", results__json={"rows": 5})
    write(runs / "broken", status__json='{"state": ', results__json="[1", plan__json="\x00", recipe__yaml="\x1b[31m")
    write(runs / "a&b = c", status__json={"state": EVIL, "phase": EVIL, "message": EVIL, "started": EVIL})
    write(runs / EVIL.replace("/", "-"), results__json=ledger(name=EVIL), recipe__yaml=EVIL, summary__txt=EVIL)
    write(runs / "linked", recipe__yaml=None, report__html=None)
    (runs / "linked" / "recipe.yaml").symlink_to(home / "secret.json")
    (runs / "linked" / "report.html").symlink_to(home / "secret.json")
    (runs / "away").symlink_to(write(home / "elsewhere"), target_is_directory=True)
    live = write(runs / "live", "running", results__json=None)
    (live / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    lines = [{"time": s / 2, "phase": "train", "step": s, "loss": 1 / (s + 1), "flat": 2.0} for s in range(20)]
    (live / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return runs


@pytest.fixture(scope="module")
def url(top: Path) -> Iterator[str]:
    with served(application(top, TOKEN, render)) as address:
        yield f"{address}/{TOKEN}/"


Get = Callable[..., Any]


@pytest.fixture(scope="module")
def get(url: str) -> Iterator[Get]:
    def asked(path: str = "", status: int = 200, **query: Any) -> Any:
        answer = client.get(url + path, params=query or None)
        assert answer.status_code == status, answer.text
        return answer

    with httpx.Client(timeout=60) as client:
        yield asked


def page(answer: Any) -> Page:
    """Basics of a page: it parses, is called something, in a language, with names for what is in it."""
    found = Page(answer.text)
    assert answer.text.startswith("<!doctype html>") and found.all("html")[0]["lang"] == "en"
    assert found.all("title") and found.all("meta")[0]["charset"] == "utf-8" and len(found.all("h1")) == 1
    ids = [attrs["id"] for _, attrs in found.tags if attrs.get("id")]
    assert len(ids) == len(set(ids)) and "main" in ids
    assert {a["href"][1:] for a in found.all("a") if a["href"].startswith("#")} <= set(ids)
    assert len(found.all("caption")) == len(found.all("table"))
    assert all(cell.get("scope") for cell in found.all("th"))
    assert all(svg.get("aria-label") and svg.get("role") == "img" for svg in found.all("svg"))
    assert len(found.all("label")) == len(found.all("input")) + len(found.all("progress"))
    for tag, attrs in found.tags:
        for key in ("href", "src", "action", "data-from"):
            assert not re.match(r"\w+:|//", attrs.get(key) or "") or attrs[key] == "data:,", (tag, attrs)
        assert "style" not in attrs and not any(key.startswith("on") for key in attrs)  # the policy forbids both
    return found


# --- pages -----------------------------------------------------------------------------------------------------------


def test_every_run_is_listed(get: Get) -> None:
    listed = page(get())
    links = [a["href"] for a in listed.all("a") if (a["href"] or "").startswith("run?")]
    assert len(links) == len(listed.all("input")) == 11
    for word in ("11 runs", "first", "sweep/second", "finished", "failed", "running", "unknown", "merge/ties-tiny"):
        assert word in listed.text
    assert "accuracy 80.2 % (ties)" in listed.text and "2026-11-21 10:00" in listed.text
    assert "away" not in listed.text and "secret" not in listed.text
    for link in links:
        page(get(link))


def test_markup_in_names_is_shown_not_obeyed(get: Get) -> None:
    for answer in (get(), get("run", id="a&b = c"), get("run", id=EVIL.replace("/", "-"))):
        found = page(answer)
        assert [s.get("src") for s in found.all("script")] in ([], ["live.js"], ["list.js"]) and not found.all("img")
        assert "alert(1)" in found.text


def test_a_finished_run(get: Get) -> None:
    found = page(get("run", id="first"))
    for word in ("finished", "It is good.", "ties", "spolia: 1 seed: 0", "Open the report"):
        assert word in found.text
    assert any(attrs.get("aria-live") == "polite" for attrs in found.all("p"))
    assert "stopped" not in found.text and "progress" not in [tag for tag, _ in found.tags]


def test_unfinished_and_broken_runs_have_a_page(get: Get) -> None:
    assert "The run failed" in page(get("run", id="failed")).text
    assert "unknown" in page(get("run", id="broken")).text
    assert "There is no report" in page(get("run", id="failed")).text


def test_a_run_is_followed(get: Get, top: Path) -> None:
    found = page(get("run", id="live"))
    assert "step 19" in found.text and "its last 20 lines" in found.text
    curve = found.all("svg")[0]["aria-label"]
    assert curve == "loss from 1 at 0 to 0.05 at 19"
    assert "9.5 s , 1 min 00 s planned".replace(" ,", ",") in found.text
    assert found.all("progress") == [{"id": "spent", "max": "60.0", "value": "9.5"}]
    assert found.all("div")[0]["data-from"] == "live?id=live"
    with (top / "live" / "metrics.jsonl").open("a") as stream:
        stream.write('{"time": 10.5, "phase": "test", "step": null, "accuracy": 0.5}\n{"time": 11')
    part = Page(get("live", id="live").text)
    assert "Phase test" in part.text and "0.5" in part.text and "accuracy" in part.text and "loss" not in part.text
    assert not part.all("html")  # a part of a page
    assert Page(get("live", id="live").text).all("p")[0]["data-state"] == "running"


def test_numbers_that_are_none_do_not_break_the_live_part(get: Get, top: Path) -> None:
    folder = top / "live"
    lines = ['{"phase": "x", "step": "a", "loss": "b", "t": null}', "[]", "3", '{"loss": 1e400, "phase": []}']
    before = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    page(get("run", id="live"))
    (folder / "metrics.jsonl").write_text(before)


def test_runs_are_compared(get: Get) -> None:
    found = page(get("compare", run=["first", "sweep/second"]))
    for word in ("2 runs compared", "accuracy (%)", "80.25", "-seed: 0", "+seed: 5", "different seeds"):
        assert word in found.text
    three = page(get("compare", run=["first", "sweep/second", "first", "a&b = c"]))  # named twice, taken once
    assert "3 runs compared" in three.text and "c − a" in three.text


@pytest.mark.parametrize(
    ("runs", "status", "word"),
    [
        (["first"], 400, "two runs or more"),
        ([], 400, "two runs or more"),
        (["first"] * 3, 400, "two runs or more"),
        ([f"r{i}" for i in range(11)], 400, "10 at most"),
        (["first", "none"], 404, "no such run"),
        (["first", "../elsewhere"], 404, "no such run"),
        (["first", "away"], 404, "no such run"),
        (["first", "other"], 400, "data of `test`"),
        (["first", "failed"], 400, "no results"),
        (["first", "broken"], 400, "cannot be read"),
        (["first", "no rows"], 400, "cannot be read"),
        (["first", "linked"], 400, "is a link"),
        (["first", "odd seeds"], 400, "are no numbers"),
    ],
)
def test_what_does_not_compare_is_told(get: Get, top: Path, runs: list[str], status: int, word: str) -> None:
    answer = get("compare", status, run=runs)
    assert word in page(answer).text and str(top) not in answer.text and "secret" not in answer.text


def test_an_empty_folder(tmp_path: Path) -> None:
    with served(application(tmp_path, TOKEN, render)) as address:
        assert "no run here yet" in page(httpx.get(f"{address}/{TOKEN}/")).text
    with pytest.raises(SpoliaError, match="no such folder"):
        application(tmp_path / "none", TOKEN, render)


# --- what is not shown -----------------------------------------------------------------------------------------------


PATHS = ("", "run?id=first", "live?id=first", "report?id=first", "compare?run=first&run=other", "style.css", "live.js")


@pytest.mark.parametrize("path", PATHS)
def test_without_the_token_nothing_is_shown(url: str, path: str) -> None:
    root = url.removesuffix(f"{TOKEN}/")
    for wrong in ("", "wrong/", f"{TOKEN[:-1]}/", f"{TOKEN}x/", f"{quote('ü')}/"):
        answer = httpx.get(root + wrong + path, follow_redirects=True)
        assert answer.status_code == 403, wrong
        assert "spolia ui" in page(answer).text
        assert TOKEN not in answer.text.replace(wrong, "") and "first" not in answer.text


def raw(url: str, path: str, method: str = "GET", **headers: str) -> tuple[int, str]:
    """A request as written: no client tidies its path."""
    connection = http.client.HTTPConnection("127.0.0.1", urlsplit(url).port, timeout=30)
    connection.putrequest(method, path, skip_host=True)
    for name, value in ({"host": "127.0.0.1"} | headers).items():
        connection.putheader(name, value)
    connection.endheaders()
    answer = connection.getresponse()
    told = answer.status, answer.read().decode()
    connection.close()
    return told


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost.evil", "[::1]", ""]
)
def test_another_host_is_refused(url: str, host: str) -> None:
    status, text = raw(url, f"/{TOKEN}/", host=host)
    assert status == 400 and "first" not in text and TOKEN not in text


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "localhost:8888", "LOCALHOST"])
def test_this_machine_is_let_in(url: str, host: str) -> None:
    assert raw(url, f"/{TOKEN}/", host=host)[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        *(
            "/../../secret.json",
            "/..%2f..%2fsecret.json",
            "/runs/../../secret.json",
            "/first/status.json",
            "//etc/passwd",
        ),
        *(
            "/run?id=..",
            "/run?id=../elsewhere",
            "/run?id=%2e%2e%2felsewhere",
            "/run?id=away",
            "/run?id=/etc",
            "/run?id=",
        ),
        *("/run?id=first/..%2ffirst", "/run?id=%00", "/live?id=../elsewhere", "/report?id=../elsewhere", "/run"),
        *("/report?id=linked", "/report?id=failed", "/style.css/../../secret.json", "/ui.py", "/report.html"),
    ],
)
def test_no_path_leads_out(url: str, path: str) -> None:
    status, text = raw(url, f"/{TOKEN}{path}")
    assert status in (403, 404) and "secret" not in text.replace("secret.json", "")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_nothing_is_written(url: str, method: str) -> None:
    for path in ("", "run?id=first", "compare"):
        assert raw(url, f"/{TOKEN}/{path}", method)[0] == 405


def test_the_folder_is_as_before(top: Path, get: Get) -> None:
    def seen() -> dict[str, tuple[int, int]]:
        return {str(p): (p.lstat().st_mtime_ns, p.lstat().st_size) for p in top.rglob("*")}

    before = seen()
    for path in PATHS:
        if not path.startswith("compare"):
            get(path)
    assert seen() == before


def test_policies(get: Get) -> None:
    for path in ("", "run?id=first", "compare?run=first&run=sweep/second"):
        headers = get(path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
        assert headers["referrer-policy"] == "no-referrer" and headers["x-content-type-options"] == "nosniff"
        assert "server" not in headers and "set-cookie" not in headers
    answer = get("report", id="first")
    policy = answer.headers["content-security-policy"]
    assert answer.text == "<!doctype html><script>alert(1)</script><p>the report"  # shown as it is, and it cannot run:
    assert re.search(r"(^|; )sandbox allow-downloads(;|$)", policy) and "default-src 'none'" in policy
    assert "script-src" not in policy and "allow-scripts" not in policy


def test_scripts_ask_their_own_server_alone(get: Get) -> None:
    live, listed, style = get("live.js"), get("list.js"), get("style.css")
    assert all(script.headers["content-type"].startswith("text/javascript") for script in (live, listed))
    assert style.headers["content-type"].startswith("text/css")
    for text in (live.text, listed.text, style.text):
        assert not re.search(r"https?:|//\w+\.|@import|url\(|eval|import\(", text)
    for rule in ("prefers-color-scheme: dark", "@media (max-width", "--accent", ":focus-visible", ".course"):
        assert rule in style.text


def test_the_list_is_asked_again_and_a_choice_is_left_alone(get: Get) -> None:
    page, script = get(""), get("list.js").text
    assert page.text.count('id="list"') == 1 and '<script src="list.js">' in page.text
    assert 'fetch("./")' in script and "input:checked" in script and "setTimeout(look, 5000)" in script


def test_two_hundred_runs(tmp_path: Path) -> None:
    for i in range(200):
        write(tmp_path / f"{i:03d}")
        with (tmp_path / f"{i:03d}" / "metrics.jsonl").open("w") as stream:
            stream.truncate(10**9)  # a hole: whoever reads it whole is killed for memory or time
    with served(application(tmp_path, TOKEN, render)) as address:
        answer = httpx.get(f"{address}/{TOKEN}/", timeout=60)
    assert "200 runs" in answer.text and len(page(answer).all("input")) == 200


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_prints_the_address_and_ends_on_interrupt(top: Path) -> None:
    code = "from spolia.cli import main; main()"
    command = [sys.executable, "-u", "-c", code, "ui", str(top)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        address = process.stdout.readline().strip()
        token = urlsplit(address).path.strip("/")
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+/[\w-]{32}/", address)
        page(httpx.get(address, timeout=60))
        assert httpx.get(address.replace(token, TOKEN)).status_code == 403
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 0 and "Traceback" not in err
    assert token not in err and os.environ.get("BROWSER") is None


@pytest.mark.slow
def test_the_command_tells_what_is_wrong(tmp_path: Path, monkeypatch, capsys) -> None:
    from spolia import cli

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli.main(["ui"])
    assert end.value.code == 2 and "runs: there is no such folder" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        cli.main(["ui", "."])
    assert end.value.code == 2 and "spolia[api]" in capsys.readouterr().err
