from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import spolia
from spolia.core.checkpoint import Checkpoint, read_tensors
from spolia.core.journal import Interrupted, Journal
from spolia.errors import SpoliaError
from spolia.runs import digits_study, lifecycle
from spolia.runs.digits_pool import make_pool
from spolia.runs.engine import plan_recipe, run_recipe, study_of
from spolia.runs.recipe import load_recipe
from spolia.runs.store import RunFolder


def recipe(tmp_path: Path, method: str = "{name: ties}", domains: str = "[upright, turned]", more: str = "") -> Path:
    file = tmp_path / "mine.yaml"
    file.write_text(f"spolia: 1\npool: {{source: digits, domains: {domains}}}\nmethod: {method}\n{more}")
    return file


def read(folder: Path, name: str):
    return json.loads((folder / name).read_text())


def shape(rows):
    return {(row["method"], row["task"]) for row in rows}


# --- without training ------------------------------------------------------------------------------------------------


def test_the_baselines_are_those_the_recipe_is_not(tmp_path):
    labels = {
        method: [(e.label, e.baseline) for e in study_of(load_recipe(recipe(tmp_path, method))).entries]
        for method in ("{name: ties}", "{name: average}", "{name: task_arithmetic, scale: 0.5}")
    }
    assert labels == {
        "{name: ties}": [("average", True), ("task_arithmetic", True), ("ties", False)],
        "{name: average}": [("task_arithmetic", True), ("average", False)],
        "{name: task_arithmetic, scale: 0.5}": [
            ("average", True), ("task_arithmetic, defaults", True), ("task_arithmetic", False),
        ],
    }  # fmt: skip


def test_masks_are_judged_with_the_task_known_beside_the_one_model(tmp_path):
    entries = study_of(load_recipe(recipe(tmp_path, "{name: tall_masks, threshold: 0.2}"))).entries
    found = [(e.label, e.baseline, e.known, e.settings.get("threshold")) for e in entries if e.method == "tall_masks"]
    assert found == [("tall_masks, task known", True, True, 0.2), ("tall_masks", False, False, 0.2)]


def test_plan_of_a_digits_recipe_says_what_touches_data(tmp_path):
    plan = plan_recipe(load_recipe(recipe(tmp_path, more="seed: 4\nseeds: 3\n")))
    assert plan.seeds == [4, 5, 6]
    assert {phase.name: phase.trained for phase in plan.phases}["merge"] == "nothing"
    assert "weights only" in {phase.name: phase.data for phase in plan.phases}["merge"]
    json.dumps(plan.to_dict())


def test_dry_run_leaves_nothing_behind(tmp_path):
    plan = run_recipe(load_recipe(recipe(tmp_path)), RunFolder(tmp_path / "run"), dry_run=True)
    assert plan.method == "ties"
    assert not (tmp_path / "run").exists()


def test_a_folders_recipe_merges_into_result(tmp_path, write_model):
    base = {"w": torch.zeros(4), "b": torch.ones(2)}
    write_model(tmp_path / "base", base, {"model_type": "x"})
    for name, value in (("one", 1.0), ("two", 3.0)):
        write_model(tmp_path / name, {"w": torch.full((4,), value), "b": torch.ones(2)}, {"model_type": "x"})
    text = "spolia: 1\npool: {base: base, experts: [one, two]}\nmethod: {name: task_arithmetic, scale: 0.5}\n"
    (tmp_path / "mine.yaml").write_text(text)
    run = spolia.run(tmp_path / "mine.yaml", tmp_path / "run")
    assert torch.equal(read_tensors(run / "result")["w"], torch.full((4,), 2.0))
    assert Checkpoint.open(run / "result").config == {"model_type": "x"}
    assert read(run, "status.json")["state"] == "done"
    assert read(run, "plan.json")["method"] == "task_arithmetic"
    assert (run / "report.html").exists() and "one, two" in (run / "summary.txt").read_text()
    before = (run / "result" / "model.safetensors").stat().st_mtime_ns
    spolia.run(tmp_path / "mine.yaml", tmp_path / "run")
    assert (run / "result" / "model.safetensors").stat().st_mtime_ns == before  # finished: not merged again
    (tmp_path / "mine.yaml").write_text(text.replace("0.5", "0.25"))
    with pytest.raises(SpoliaError, match="another recipe"):
        spolia.run(tmp_path / "mine.yaml", tmp_path / "run")
    spolia.run(tmp_path / "mine.yaml", tmp_path / "run", fresh=True)
    assert torch.equal(read_tensors(run / "result")["w"], torch.full((4,), 1.0))


def test_a_failure_is_told_in_the_folder(tmp_path):
    with RunFolder(tmp_path / "run") as run:
        run.begin("spolia: 1\n")
        with pytest.raises(ZeroDivisionError), lifecycle.recorded(run, Journal(run.path), None):
            raise ZeroDivisionError("on purpose")
    status = read(run.path, "status.json")
    assert (status["state"], status["message"]) == ("failed", "ZeroDivisionError: on purpose")
    assert (run.path / "report.html").exists()


# --- with training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_pool_made_twice_has_equal_bits_and_threads_are_left_alone(tmp_path):
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    pools = [make_pool(tmp_path / name, ("upright", "inverted"), 1, Journal()) for name in ("one", "two")]
    assert torch.get_num_threads() == threads
    assert torch.equal(torch.get_rng_state(), state)
    for part in ("base", "heads", "upright", "inverted"):
        a, b = (read_tensors(pool.folder / part) for pool in pools)
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    assert not torch.equal(*(read_tensors(path)["layers.0.weight"] for path in pools[0].experts))
    assert Checkpoint.open(pools[0].expert("upright")).config["model_type"] == "spolia_mlp"


@pytest.mark.slow
def test_a_digits_recipe_fills_the_run_folder(tmp_path, ready_pools):
    with ready_pools():
        run = spolia.run(recipe(tmp_path, more="seeds: 2\noutput: {dtype: bfloat16}\n"), tmp_path / "run")
    results = read(run, "results.json")
    assert results["seeds"] == [0, 1]
    methods = {
        "base",
        "experts, each on its own",
        "expert upright",
        "expert turned",
        "average",
        "task_arithmetic",
        "ties",
    }
    assert shape(results["rows"]) == {(m, t) for m in methods for t in ("upright", "turned", "average")}
    ties = [row for row in results["rows"] if row["method"] == "ties"]
    assert all(
        row["n"] == 2 and "baseline" not in row and row["paired_difference"]["against"] == "average" for row in ties
    )
    assert {figure["kind"] for figure in read(run, "figures.json")} == {"matrix"}
    assert {info.dtype.code for info in Checkpoint.open(run / "result").tensors.values()} == {"BF16"}
    assert read(run, "status.json")["state"] == "done"
    assert "ties reaches" in (run / "summary.txt").read_text()


@pytest.mark.slow
def test_interrupted_between_seeds_and_run_again_gives_the_same_rows(tmp_path, monkeypatch, ready_pools):
    file = recipe(tmp_path, "{name: slerp}", more="seeds: 2\n")
    with ready_pools():
        whole = read(spolia.run(file, tmp_path / "whole"), "results.json")["rows"]
    score = digits_study._score

    def stop_after_first(pool, study, journal):
        found = score(pool, study, journal)
        journal.request_stop()
        return found

    monkeypatch.setattr(digits_study, "_score", stop_after_first)
    with pytest.raises(Interrupted):
        spolia.run(file, tmp_path / "run")
    assert read(tmp_path / "run", "status.json")["state"] == "interrupted"
    assert read(tmp_path / "run", "results.json")["seeds"] == [0]  # what was measured by then is there
    monkeypatch.undo()
    spolia.run(file, tmp_path / "run")
    assert read(tmp_path / "run", "results.json")["rows"] == whole
