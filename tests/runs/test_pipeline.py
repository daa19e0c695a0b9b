"""One recipe from trimming to surgery: what is wrong in it, what it plans, what it leaves, and that a kill changes nothing."""

from __future__ import annotations

import hashlib
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.core.journal import Journal
from spolia.errors import SpoliaError
from spolia.runs import surgery_study
from spolia.runs.digits_pool import make_pool
from spolia.runs.editors import json_schema
from spolia.runs.engine import study_of
from spolia.runs.recipe import load_recipe

PIPELINE = """\
spolia: 1
pool: {source: digits, domains: [upright, turned]}
preprocess:
  - {name: ties, density: 0.3}
  - {name: awd, granularity: row}
method: {name: adamerging, steps: 12, lr: 0.01, check_every: 5}
surgery: {name: deep, steps: 8, rank: 4}
"""
CHAIN = "ties + awd + adamerging"


def written(folder: Path, text: str = PIPELINE) -> Path:
    file = folder / "pipeline.yaml"
    file.write_text(text)
    return file


# --- without training ------------------------------------------------------------------------------------------------


def test_the_chain_is_read_and_loads_to_itself(tmp_path: Path) -> None:
    recipe = load_recipe(written(tmp_path), ["surgery.rank=5", "preprocess=[{name: awd, alpha: 0.2}, ties]"])
    assert [step.name for step in recipe.preprocess] == ["awd", "ties"]
    assert recipe.surgery is not None and (recipe.surgery[0].name, recipe.surgery[1].rank) == ("deep", 5)
    again = load_recipe(written(tmp_path, recipe.to_yaml()))
    assert again.to_yaml() == recipe.to_yaml()
    assert (again.preprocess, again.surgery) == (recipe.preprocess, recipe.surgery)


def test_a_recipe_without_the_keys_does_not_name_them(tmp_path: Path) -> None:
    text = "spolia: 1\npool: {source: digits}\nmethod: {name: ties}\n"
    resolved = load_recipe(written(tmp_path, text)).to_yaml()
    assert "preprocess" not in resolved and "surgery" not in resolved


@pytest.mark.parametrize(
    ("right", "wrong", "where", "what", "mend"),
    [
        ("name: ties,", "name: tise,", "pipeline.yaml:4 preprocess[0].name", "no preprocessing is called", "`ties`?"),
        ("density: 0.3", "densty: 0.3", "pipeline.yaml:4 preprocess[0].densty", "no `densty` here", "`density`?"),
        ("density: 0.3", "density: [0.3]", "preprocess[0].density", "1 values for 2 experts", "give 2 numbers"),
        ("granularity: row", "granularity: rows", ":5 preprocess[1].granularity", "not known here", "`row`?"),
        ("  - {name: ties, density: 0.3}\n  - {name: awd, granularity: row}", "  ties", "preprocess", "no list", "a list"),
        ("name: adamerging, steps: 12, lr: 0.01, check_every: 5", "name: average", ":3 preprocess", "average", "magmax"),
        ("name: deep", "name: deap", ":7 surgery.name", "no method is called `deap`", "`deep`?"),
        ("name: deep, steps: 8, rank: 4", "name: ties", ":7 surgery.name", "ties is no surgery", "surgery"),
        ("rank: 4", "rnak: 4", ":7 surgery.rnak", "there is no `rnak` here", "`rank`?"),
        ("rank: 4", "merge: ties", ":7 surgery.merge", "the merge that comes first is `method`", "leave `merge` away"),
        ("{name: deep, steps: 8, rank: 4}", "deep", ":7 surgery", "`deep` is not what belongs here", "mapping"),
        ("name: adamerging, steps: 12, lr: 0.01, check_every: 5", "name: deep", "surgery", "deep is no merge", "`method`"),
        ("{source: digits, domains: [upright, turned]}", "{base: b, experts: [a]}", "pool", "folders names none", "tasks"),
        ("{source: digits, domains: [upright, turned]}", "{experts: [a]}", "pool", "adamerging needs a base", "base: PATH"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_place_and_cure(
    tmp_path: Path, right: str, wrong: str, where: str, what: str, mend: str
) -> None:
    assert right in PIPELINE
    with pytest.raises(SpoliaError) as caught:
        load_recipe(written(tmp_path, PIPELINE.replace(right, wrong)))
    told = [p for p in caught.value.problems if where in p.where and what in p.what]
    assert told and any(mend in problem.mend for problem in told), str(caught.value)


def test_the_plan_names_every_stage(tmp_path: Path) -> None:
    plan = spolia.plan(written(tmp_path))
    assert plan.title == f"deep on a {CHAIN} merge of 2 digits experts"
    phases = {phase.name: phase for phase in plan.phases}
    assert phases["merge"].trained == "coefficients" and "197 validation digits" in phases["merge"].data
    assert phases["merge"].does.endswith("the task vectors went through ties and awd first")
    assert phases["surgery"].trained == "adapters"


def test_the_plan_over_folders_counts_the_steps(tmp_path: Path, write_model: Any) -> None:
    for name in ("base", "math", "code"):
        write_model(tmp_path / name, {"w": torch.randn(64, 64)}, {"model_type": "x"})
    text = "spolia: 1\npool: {base: ./base, experts: [./math, ./code]}\nmethod: {name: task_arithmetic}\n"
    plain = spolia.plan(written(tmp_path, text))
    plan = spolia.plan(written(tmp_path, text + "preprocess: [ties, awd]\n"))
    assert plan.title == "ties + awd + task_arithmetic merge of 2 experts"
    assert plan.cost["sweeps"] > plain.cost["sweeps"] == 1


def test_a_recipe_over_folders_is_the_call(tmp_path: Path, write_model: Any) -> None:
    for name in ("base", "math", "code"):
        write_model(tmp_path / name, {"w": torch.randn(20, 30)}, {"model_type": "x"})
    text = "spolia: 1\npool: {base: ./base, experts: [./math, ./code]}\nmethod: {name: pcb}\npreprocess: [awd, ties]\n"
    run = Path(spolia.run(written(tmp_path, text), tmp_path / "run"))
    call: dict[str, Any] = {"base": tmp_path / "base", "method": "pcb", "preprocess": ["awd", "ties"]}
    expected = spolia.merge([tmp_path / "math", tmp_path / "code"], **call)
    assert torch.equal(read_tensors(run / "result")["w"], expected["w"])
    assert "- name: awd" in (run / "recipe.yaml").read_text()


def test_the_merge_without_its_preprocessing_stands_beside(tmp_path: Path) -> None:
    text = "spolia: 1\npool: {source: digits}\nmethod: {name: task_arithmetic, scale: 0.5}\npreprocess: [awd]\n"
    entries = study_of(load_recipe(written(tmp_path, text))).entries
    assert [(e.label, e.baseline, bool(e.preprocess)) for e in entries] == [
        ("average", True, False), ("task_arithmetic, defaults", True, False), ("task_arithmetic", True, False),
        ("awd + task_arithmetic", False, True),
    ]  # fmt: skip


def test_editors_know_the_keys() -> None:
    properties = json_schema()["properties"]
    words, ties, awd = properties["preprocess"]["items"]["anyOf"]
    assert words == {"enum": ["ties", "awd"]}
    assert {"name", "density"} <= set(ties["properties"]) and "granularity" in awd["properties"]
    assert {"$ref": "#/$defs/surgery~1deep"} in properties["surgery"]["anyOf"]


# --- runs ------------------------------------------------------------------------------------------------------------

RELOAD = """
import sys, torch, spolia
from pathlib import Path
from spolia.core.checkpoint import read_tensors
from spolia.core.journal import Journal
from spolia.runs.digits_pool import make_pool
run = Path(sys.argv[1])
pool = make_pool(run / "checkpoints" / "seed-0", ("upright", "turned"), 0, Journal())
torch.set_num_threads(1)
encoder = pool.network.module
encoder.load_state_dict(read_tensors(run / "result"))
attached = spolia.Adapters.load(run / "result" / "adapters" / "adapters.safetensors").attach(encoder, task="upright")
logits = {}
for task in pool.tasks("test"):
    attached.task = task.name
    with torch.no_grad():
        logits[task.name] = pool.network.heads[task.name](encoder(task.x))
torch.save(logits, sys.argv[2])
"""
DIES = """
import os, signal, sys, spolia
from spolia.core.journal import Journal
true, die, seen = Journal.steps, int(sys.argv[3]), 0
def steps(self, n, keep=None, *, shared=False):
    global seen
    self._save_every = 0
    for step in true(self, n, keep):
        seen += 1
        if seen == die:
            os.kill(os.getpid(), signal.SIGKILL)
        yield step
Journal.steps = steps
spolia.run(sys.argv[1], sys.argv[2])
"""


@pytest.fixture
def child(fork: Callable[..., Any]) -> Callable[..., int]:
    """child(code, *words) -> how the process ended."""

    def child(code: str, *words: Any) -> int:
        started = fork(code, *words)
        started.communicate()
        return started.returncode

    return child


@pytest.fixture(scope="module")
def finished(
    tmp_path_factory: pytest.TempPathFactory, ready_pools: Callable[[], Any]
) -> tuple[Path, dict[str, torch.Tensor]]:
    """A whole run, and the logits of its repaired model on test images."""
    folder, logits = tmp_path_factory.mktemp("runs"), {}
    repaired = surgery_study._repaired

    def seen(repair: Any, merged: Any, held: Any, pool: Any, test: Any, *rest: Any) -> Any:
        model = repaired(repair, merged, held, pool, test, *rest)
        with torch.no_grad():
            logits.update({task.name: model(task.x, task.name) for task in test})
        return model

    with ready_pools(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(surgery_study, "_repaired", seen)
        return Path(spolia.run(written(folder), folder / "run")), logits


@pytest.mark.slow
def test_every_stage_is_a_row_and_the_result_holds_them(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    results = json.loads((run / "results.json").read_text())
    rows = {row["method"]: row for row in results["rows"] if row["task"] == "average"}
    assert set(rows) == {
        *("experts, each on its own", "average", "task_arithmetic"),
        *(CHAIN, f"{CHAIN} + deep", f"{CHAIN} + deep, task routed"),
    }
    assert not rows[CHAIN].get("baseline") and rows["average"]["baseline"]
    assert results["data"]["merge"] == results["data"]["surgery"]
    assert results["notes"].startswith(f"The merge is {CHAIN}; every repair stands on it. deep adds")
    assert "coefficients.json" in {file.name for file in (run / "result").iterdir()}
    assert not (run / "result" / "mergekit_recipe.yml").exists()  # a sum of plain task vectors is another model
    assert CHAIN in (run / "report.html").read_text()
    learned = {json.loads(line)["phase"] for line in (run / "metrics.jsonl").read_text().splitlines()}
    assert {p for p in learned if "merge" in p} == {"seed 0 merge / adapt"}  # writing it does not learn it again
    took = json.loads((run / "status.json").read_text())["seconds"]
    assert {"merge", "surgery"} <= set(took) <= {"base", "fine-tune", "merge", "surgery"} and took["surgery"] > 0


@pytest.mark.slow
def test_the_merged_weights_are_the_calls(finished: tuple[Path, Any]) -> None:
    run, _ = finished
    recipe = load_recipe(run / "recipe.yaml")
    pool = make_pool(run / "checkpoints" / "seed-0", ("upright", "turned"), 0, Journal())
    call: dict[str, Any] = {"network": pool.network, "unlabelled": pool.unlabelled(pool.domains)}
    learned = spolia.merge(
        {domain: pool.expert(domain) for domain in pool.domains},
        base=pool.base,
        method="adamerging",
        settings=recipe.settings,
        preprocess=[step.to_dict() for step in recipe.preprocess],
        **call,
    )
    torch.testing.assert_close(read_tensors(run / "result"), learned.weights, rtol=0, atol=1e-5)  # threads, 12 steps


@pytest.mark.slow
def test_the_result_gives_the_same_logits_in_a_fresh_process(
    finished: tuple[Path, Any], tmp_path: Path, child: Callable[..., int]
) -> None:
    run, logits = finished
    assert child(RELOAD, run, tmp_path / "logits.pt") == 0
    again = torch.load(tmp_path / "logits.pt", weights_only=True)
    assert set(again) == set(logits) and all(torch.equal(again[task], logits[task]) for task in again)


def digest(run: Path) -> dict[str, Any]:
    files = [p for p in sorted((run / "result").rglob("*")) if p.is_file() and p.name != "results.json"]
    found: dict[str, Any] = {str(p.relative_to(run)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}
    ledgers = [run / "results.json", run / "result" / "results.json"]  # each names the command, and so the folder
    return found | {"rows": [json.loads(file.read_text())["rows"] for file in ledgers]}


@pytest.mark.slow
def test_killed_at_any_step_it_ends_in_equal_bytes(
    finished: tuple[Path, Any], tmp_path: Path, child: Callable[..., int]
) -> None:
    run, _ = finished
    draws, recipe, out, done = random.Random(0), written(tmp_path), tmp_path / "run", 0
    pool = 60 + 2 * 300  # steps of base and experts; then come 12 of coefficients and 8 a task of surgery
    for first, last in ((1, pool), (pool + 1, pool + 12), (pool + 13, pool + 28)):
        at = draws.randint(first, last)
        assert child(DIES, recipe, out, at - done) == -signal.SIGKILL
        done = at - 1
    assert child(DIES, recipe, out, 0) == 0
    assert digest(out) == digest(run)
