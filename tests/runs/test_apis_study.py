"""Recipes of `apis`: what is checked before anything is asked, what a run leaves, and two terminals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("sklearn")

from spolia.errors import SpoliaError
from spolia.methods.continual.apis import queries
from spolia.runs.apis_problems import addresses
from spolia.runs.apis_rounds import rounds_of
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.recipe import load_recipe
from spolia.runs.store import RunFolder

QUICK = ["problem.tasks=2", "problem.budget=6000", "method.batch=32", "seeds=1", "problem.baselines=false"]


def recipe(*overrides: str):
    return load_recipe("continual/apis-tiny", [*QUICK, *overrides])


def test_apis_do_not_come_from_a_labelled_stream() -> None:
    with pytest.raises(SpoliaError, match="apis does not work on `digits`"):
        load_recipe("continual/apis-tiny", ["problem={source: digits}"])


@pytest.mark.parametrize(
    ("override", "word"),
    [
        ("problem.tasks=3", "ten classes do not go into 3"),
        ("problem.tasks=[9, 1]", "two classes or more"),
        ("problem.tasks=[4, 4]", "ten classes"),
        ("problem.budget=500", "do not pay for one round"),
        ("problem.urls=[ftp://x]", "http://HOST:PORT"),
        ("problem.urls=[http://me:secret@x]", "http://HOST:PORT"),
        ("problem.urls=[http://a, http://b, http://c]", "3 addresses for 2 APIs"),
        ("problem.answers=vibes", "answers"),
        ("problem.decimals=0", "decimals"),
        ("problem.experts=[vit]", "experts"),
        ("method.directons=3", "directions"),
    ],
)
def test_what_does_not_fit_is_told_before_anything_is_asked(override: str, word: str) -> None:
    with pytest.raises(SpoliaError) as told:
        recipe(override)
    assert word in str(told.value) and "secret" not in str(told.value)


def test_other_methods_do_not_work_on_apis() -> None:
    with pytest.raises(SpoliaError, match="er does not work on `apis`"):
        load_recipe("continual/er-tiny", ["problem={source: apis}"])


def test_rounds_are_what_the_budget_pays() -> None:
    made = recipe("problem.few=2")
    rounds, once, each = rounds_of(made.problem, made.settings)
    assert (each, once) == (queries(made.settings)[0], 2 * 5)
    assert rounds * each + once <= 6000 < (rounds + 1) * each + once


def test_one_server_or_one_address_each() -> None:
    one = recipe("problem.urls=[https://h:1/]").problem
    assert addresses(one, ["digits:01", "digits:23"]) == [("https://h:1", "digits:01"), ("https://h:1", "digits:23")]
    each = recipe("problem.urls=[http://a/v2/models/x, http://b/v2/models/digits%3A01]").problem
    assert addresses(each, ["", ""]) == [("http://a", "x"), ("http://b", "digits:01")]


def test_the_plan_says_what_it_will_cost_and_asks_nobody() -> None:
    plan = plan_recipe(recipe("problem.price=2.5", "problem.urls=[http://127.0.0.1:9]"))
    text = " ".join(plan.notes)
    items = int(re.search(r"([\d,]+) items in all", text)[1].replace(",", ""))  # type: ignore[index]
    assert items == 2 * rounds_of(recipe().problem, recipe().settings)[0] * queries(recipe().settings)[0]
    assert f"{items * 2.5 / 1000:.2f} USD" in text and "terms" in text


@pytest.mark.slow
def test_a_run_leaves_table_figures_queries_and_a_model(tmp_path: Path) -> None:
    made = recipe("problem.few=2", "problem.baselines=true", "problem.price=1")
    run_recipe(made, RunFolder(tmp_path / "run"))
    ledger = json.loads((tmp_path / "run" / "results.json").read_text())
    methods = {row["method"] for row in ledger["rows"]}
    assert methods == {"DECL-APIs", "no replay", "plain estimator", "router", "the few alone", "joint"}
    rounds, once, each = rounds_of(made.problem, made.settings)
    asked = [
        r for r in ledger["rows"] if r["method"] == "DECL-APIs" and (r["metric"], r["unit"]) == ("queries", "items")
    ]
    assert {r["task"]: r["mean"] for r in asked}["digits:01234"] == rounds * each + once
    assert f"digits:01234 {(rounds * each + once) / 1000:.2f}" in ledger["notes"]
    kinds = [figure["kind"] for figure in json.loads((tmp_path / "run" / "figures.json").read_text())]
    assert kinds == ["lines", "lines", "matrix", "lines", "images"]
    assert (tmp_path / "run" / "result" / "config.json").exists()
    assert "Class-IL" in (tmp_path / "run" / "summary.txt").read_text()
    assert (tmp_path / "run" / "report.html").exists()


# --- two terminals ---------------------------------------------------------------------------------------------------

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
SPOLIA = [sys.executable, "-c", "from spolia.cli import main; main()"]


def serving(port: int = 0) -> tuple[subprocess.Popen, str]:
    command = [*SPOLIA, "serve", "digits:01234", "digits:56789", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=ENVIRONMENT)
    assert server.stdout is not None
    line = server.stdout.readline()
    return server, line.split("/v2/")[0]


@pytest.mark.slow
def test_two_terminals_suffice_and_a_server_may_come_and_go(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    httpx = pytest.importorskip("httpx")
    server, url = serving()
    port = int(url.rpartition(":")[2])
    out = tmp_path / "run"
    command = [
        *SPOLIA,
        "run",
        "continual/apis-tiny",
        "-o",
        str(out),
        "problem.tasks=2",
        f"problem.urls=[{url}]",
    ]
    command += ["seeds=1", "problem.budget=5000", "method.batch=16", "--quiet"]
    try:
        child = subprocess.Popen(command, env=ENVIRONMENT)
        store = out / "checkpoints" / "answers.sqlite"
        deadline = time.monotonic() + 60
        while not store.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.3)
        server.send_signal(signal.SIGINT)  # unplugged in the middle
        server.wait(20)
        time.sleep(1.0)
        assert child.poll() is None  # it waits
        server, _ = serving(port)
        assert child.wait(100) == 0
        spent = json.loads((out / "checkpoints" / "apis-seed-0.json").read_text())["spent"]
        counts = {}
        for name in spent:
            counts[name] = httpx.get(f"{url}/v2/models/{name}/stats").json()["model_stats"][0]["inference_count"]
        asked = json.loads((out / "checkpoints" / "apis-seed-0.json").read_text())["lines"]["DFCL-APIs"]["asked"]
        for name, told in spent.items():
            assert counts[name] <= told["items"] <= 5000  # the second server's count; the first one's is gone
            assert told["answered"] + told["kept"] >= asked[name]
    finally:
        server.send_signal(signal.SIGINT)
        server.wait(20)
