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

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")

from spolia.errors import SpoliaError
from spolia.methods.continual.apis import queries
from spolia.runs.apis_entries import inventing_of
from spolia.runs.apis_ground import trained_experts
from spolia.runs.apis_problems import addresses
from spolia.runs.apis_rounds import rounds_of
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.recipe import load_recipe
from spolia.runs.serve import application, served
from spolia.runs.serve_requests import Served
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


# --- packed sets over HTTP -------------------------------------------------------------------------------------------


def packed(folder: Path, *overrides: str):
    """Two APIs of two classes each, of images whose brighter corner is their class; and a recipe that asks all lines."""
    draws = np.random.default_rng(0)
    parts = {}
    for part, count in (("train", 80), ("test", 40)):
        labels = np.arange(count) % 4
        images = draws.integers(0, 120, (count, 12, 12), dtype=np.uint8)
        for image, label in zip(images, labels, strict=True):
            image[6 * (label // 2) :, :][:6, 6 * (label % 2) :][:, :6] += 120
        parts |= {f"x_{part}": images, f"y_{part}": labels}
    np.savez(folder / "corners.npz", classes=np.array(list("abcd")), **parts)
    problem = {"source": "packed_apis", "data": "corners", "folder": str(folder), "channels": 1, "tasks": 2}
    problem |= {"experts": ["linear", "conv2"], "expert_width": 4, "network": "mlp", "width": 16, "few": 2}
    problem |= {"questions": "flat", "questions_width": 16, "budget": 700, "price": 2.0, "baselines": True}
    own = [f"problem={json.dumps(problem)}", "method.batch=8", "method.directions=2", "method.model_steps=2", "seeds=1"]
    return load_recipe("continual/apis", [*own, *overrides])


def test_what_a_network_takes_is_told(tmp_path: Path) -> None:
    for override, word in (
        ("problem.experts=[conv4]", "conv4 for images of 12"),
        ("problem.experts=[resnet8]", "takes colour"),
    ):
        with pytest.raises(SpoliaError) as told:
            packed(tmp_path, "problem.size=12", override)
        assert word in str(told.value)


@pytest.mark.parametrize("kind", ["flat", "images"])
def test_generators_suit_the_inputs(tmp_path: Path, kind: str) -> None:
    inventing = inventing_of(packed(tmp_path, f"problem.questions={kind}").problem, (1, 14, 14))
    generator = inventing.make(torch.Generator().manual_seed(0))
    made = inventing.act(generator(torch.randn(6, inventing.latent)))
    assert made.shape == (6, 1, 14, 14) and bool((made >= 0).all()) and bool((made <= 1).all())
    assert any(type(part).__name__ == "Conv2d" for part in generator.modules()) == (kind == "images")


@pytest.mark.slow
def test_experts_of_a_packed_set_answer_over_http_within_what_all_lines_may_ask(tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    httpx = pytest.importorskip("httpx")
    experts = trained_experts(packed(tmp_path).problem, 0)
    assert [expert.name for expert in experts] == ["corners:1", "corners:2"]
    with served(application([Served(e.name, e.trained.logits, e.contract) for e in experts])) as url:
        made = packed(tmp_path, f"problem.urls=[{url}]")
        run_recipe(made, RunFolder(tmp_path / "run"))
        counted = {}
        for expert in experts:
            told = httpx.get(f"{url}/v2/models/{expert.name}/stats").json()["model_stats"][0]
            counted[expert.name] = told["inference_count"]
    scored = json.loads((tmp_path / "run" / "checkpoints" / "apis-seed-0.json").read_text())
    rounds, _, each = rounds_of(made.problem, made.settings)
    once = 2 * 2  # the few of both classes
    asking = ("no replay", "plain estimator", "DECL-APIs")
    for name, told in scored["spent"].items():
        assert told["items"] == counted[name]  # what it paid for is what the server answered
        asked = sum(line["asked"].get(name, 0) for line in scored["lines"].values())
        assert told["answered"] + told["kept"] == asked
        assert [scored["lines"][line]["asked"][name] for line in asking] == [rounds * each + once] * 3
    ledger = json.loads((tmp_path / "run" / "results.json").read_text())
    cost = {(r["method"], r["task"]): r for r in ledger["rows"] if r["metric"] == "cost"}
    row = cost["DECL-APIs", "corners:1"]
    assert row["unit"] == "USD" and row["mean"] == pytest.approx((rounds * each + once) * 2 / 1000)


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
