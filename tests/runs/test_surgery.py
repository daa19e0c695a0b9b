"""Surgery as a user meets it: the function, and the recipes on real digits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

import spolia
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.journal import Interrupted, Journal
from spolia.errors import SpoliaError
from spolia.parts.learned import Learned
from spolia.runs import surgery_study
from spolia.runs.recipe import load_recipe
from spolia.runs.surgery import weights_of
from spolia.zoo.mlp import ResidualMLP

FAST = {"steps": 3, "rank": 3}


class Given:
    """Base and two experts in memory, heads, inputs."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(0)
        module = ResidualMLP(8, 2, generator=draws)
        self.base = {name: t.clone() for name, t in module.state_dict().items()}
        self.experts = {
            task: {n: t + 0.1 * torch.randn(t.shape, generator=draws) for n, t in self.base.items()} for task in "ab"
        }
        heads = {task: nn.Linear(8, 3) for task in "ab"}
        self.network = spolia.Network(module, heads)
        self.inputs = {task: torch.randn(20, 8, generator=draws) for task in "ab"}
        self.merged = spolia.merge(self.experts, method="average")


@pytest.fixture
def given() -> Given:
    return Given()


def test_models_may_be_given_in_every_form(given: Given, tmp_path: Path) -> None:
    folders = {
        task: write_checkpoint(tmp_path / task, state) or tmp_path / task for task, state in given.experts.items()
    }
    write_checkpoint(tmp_path / "merged", given.merged)
    call = {"network": given.network, "unlabelled": given.inputs, "settings": FAST}
    plain = spolia.surgery(given.merged, given.experts, **call)
    x = given.inputs["a"]
    forms = [Learned(given.merged), given.network.loaded(given.merged), tmp_path / "merged"]
    for merged in forms:
        assert torch.equal(spolia.surgery(merged, folders, **call)(x, "a"), plain(x, "a"))
    assert weights_of(given.merged) is given.merged


@pytest.mark.parametrize("method", ["surgery", "deep"])
def test_adapters_outlive_the_call(given: Given, tmp_path: Path, method: str) -> None:
    call = {"network": given.network, "unlabelled": given.inputs, "settings": FAST, "method": method}
    model = spolia.surgery(given.merged, given.experts, **call)
    file = model.adapters.save(tmp_path / "adapters.safetensors")
    loaded = given.network.loaded(given.merged)
    with spolia.Adapters.load(file).attach(loaded, "b"):
        assert torch.equal(given.network.heads["b"](loaded(given.inputs["b"])), model(given.inputs["b"], "b"))


def test_a_killed_call_goes_on(given: Given, tmp_path: Path) -> None:
    call = {"network": given.network, "unlabelled": given.inputs, "settings": FAST, "method": "deep"}
    whole = spolia.surgery(given.merged, given.experts, **call)
    journal = Journal(tmp_path, save_every=0)
    journal.request_stop()
    with pytest.raises(Interrupted):
        spolia.surgery(given.merged, given.experts, journal=journal, **call)
    again = spolia.surgery(given.merged, given.experts, journal=tmp_path, **call)
    x = given.inputs["b"]
    assert torch.equal(whole(x, "b"), again(x, "b"))


def test_inputs_that_judge_are_compared_with_those_fitted_to(given: Given) -> None:
    call = {"network": given.network, "unlabelled": given.inputs, "settings": FAST}
    tests = {"a": given.inputs["a"][:5], "b": given.inputs["b"] + 1}
    facts = spolia.surgery(given.merged, given.experts, tested_on=tests, **call).facts
    assert facts["tested on"] == {"a": {"inputs": 5, "fitted to too": 5}, "b": {"inputs": 20, "fitted to too": 0}}


def test_mistakes_are_told_with_their_cure(given: Given) -> None:
    call = {"network": given.network, "unlabelled": given.inputs}
    with pytest.raises(SpoliaError, match="ties is no surgery"):
        spolia.surgery(given.merged, given.experts, method="ties", **call)
    with pytest.raises(SpoliaError, match=r"call spolia\.surgery"):
        spolia.merge(given.experts, method="deep")
    with pytest.raises(SpoliaError, match="did you mean `rank`"):
        spolia.surgery(given.merged, given.experts, settings={"rang": 4}, **call)
    with pytest.raises(SpoliaError) as caught:
        spolia.surgery(given.merged, given.experts, network=given.network.module, unlabelled=None)  # type: ignore[arg-type]
    assert [problem.where for problem in caught.value.problems] == ["network", "unlabelled"]
    with pytest.raises(SpoliaError, match=r"the weights lack tensor `layers.0.bias`"):
        few = {name: t for name, t in given.merged.items() if name != "layers.0.bias"}
        spolia.surgery(few, given.experts, **call)


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "where"),
    [
        ("method.merge=surgery", "method.merge"),
        ("method.merge=tees", "method.merge"),
        ("method.merge=slerp", "method.merge"),
        ("method.merge_settings={skale: 1}", "method.merge_settings.skale"),
    ],
)
def test_a_merge_that_does_not_fit_is_told_before_any_work(override: str, where: str) -> None:
    with pytest.raises(SpoliaError) as caught:
        spolia.plan("surgery/deep-tiny", [override])
    assert caught.value.problems[0].where == where


def test_folders_alone_cannot_be_repaired() -> None:
    with pytest.raises(SpoliaError, match=r"there is no .*\n.*spolia new surgery -o my\.yaml"):
        spolia.plan("surgery/surgery", ["pool.base=null"])


def test_the_plan_says_what_is_seen() -> None:
    plan = spolia.plan("surgery/surgery-tiny", ["method.protocol=transductive"])
    touched = {phase.name: phase.data for phase in plan.phases}
    assert touched["surgery"] == "the 600 test digits of each domain, without labels"
    assert "197 validation digits" in next(
        p.data for p in spolia.plan("surgery/surgery-tiny").phases if p.name == "surgery"
    )


def test_every_way_stands_beside_the_recipes_own() -> None:
    repairs = surgery_study.repairs_of(load_recipe("surgery/deep-tiny", ["method.rank=5"]))
    assert [r.label for r in repairs] == ["deep", "surgery, 300 steps", "surgery, closed form", "deep, closed form"]
    assert {r.settings.rank for r in repairs} == {5}
    assert repairs[0].settings.steps == 1000


@pytest.fixture(scope="module")
def finished(tmp_path_factory, ready_pools) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "deep"
    overrides = ["pool.domains=[upright, turned]", "method.online=true", "method.steps=40", "seeds=2"]
    with ready_pools():
        return Path(spolia.run("surgery/deep-tiny", folder, overrides=overrides))


@pytest.mark.slow
def test_a_run_leaves_a_table_figures_and_adapters(finished: Path) -> None:
    results = json.loads((finished / "results.json").read_text())
    average = {row["method"]: row["mean"] for row in results["rows"] if row["task"] == "average"}
    assert set(average) == {
        *("experts, each on its own", "merged", "deep", "deep, task routed"),
        *("surgery, 40 steps", "surgery, closed form", "deep, closed form"),
    }
    assert average["experts, each on its own"] > average["merged"]
    assert results["data"]["surgery"] == "197 validation digits of each domain, without labels"
    figures = json.loads((finished / "figures.json").read_text())
    assert [figure["kind"] for figure in figures] == ["bars", "points", "lines"]
    assert figures[0]["groups"] == ["blocks.0", "blocks.1", "blocks.2", "features"]
    assert [len(line["x"]) for line in figures[2]["series"]] == [10, 10]  # of 13 batches the first is 1 % and 10 %
    report = (finished / "report.html").read_text()
    assert "Bias of the states" in report and "Accuracy along the stream" in report and "Final features" in report
    merged = read_tensors(finished / "result")
    adapters = spolia.Adapters.load(finished / "result" / "adapters" / "adapters.safetensors")
    assert adapters.tasks == ["upright", "turned"] and not any(name.startswith("sets") for name in merged)
    assert "deep brings a merge of 2 experts from" in (finished / "summary.txt").read_text()
    of_merge = json.loads((finished / "result" / "results.json").read_text())
    assert of_merge["seeds"] == [0] and {"task_arithmetic", "deep"} <= {row["method"] for row in of_merge["rows"]}
    card = (finished / "result" / "README.md").read_text().replace("\\_", "_")
    assert "made with task_arithmetic: " in card and "## Results" in card and "Not measured" not in card


@pytest.mark.slow
def test_a_run_goes_on_after_a_stop_to_the_same_numbers(tmp_path, monkeypatch, ready_pools) -> None:
    overrides = ["pool.domains=[upright, turned]", "method.steps=6"]
    with ready_pools():
        whole = spolia.run("surgery/deep-tiny", tmp_path / "whole", overrides=overrides)

    class Stopping(Journal):
        left = 60 + 2 * 300 + 9  # steps: base, experts, and half of the first repair's second task

        def steps(self, n, keep=None, *, shared=False):
            for step in super().steps(n, keep):
                Stopping.left -= 1
                if Stopping.left == 0:
                    self.request_stop()
                yield step

    monkeypatch.setattr("spolia.runs.store.Journal", Stopping)
    with pytest.raises(KeyboardInterrupt):
        spolia.run("surgery/deep-tiny", tmp_path / "halved", overrides=overrides)
    assert json.loads((tmp_path / "halved" / "status.json").read_text())["state"] == "interrupted"
    spolia.run("surgery/deep-tiny", tmp_path / "halved", overrides=overrides)
    first, second = (json.loads((Path(f) / "results.json").read_text())["rows"] for f in (whole, tmp_path / "halved"))
    assert first == second
