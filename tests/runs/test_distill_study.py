"""Distillation as a user meets it: the function, and the recipes on digits, on prose, and on images in files."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import spolia
from spolia.catalog import METHODS
from spolia.core.checkpoint import read_tensors, write_checkpoint
from spolia.core.journal import Interrupted, Journal
from spolia.errors import SpoliaError
from spolia.methods.distill.kd import Kd
from spolia.methods.distill.train import Training
from spolia.runs import distill_pair, distill_study
from spolia.runs import recipe as recipes
from spolia.runs.distill_pair import moved, noisy
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.recipe import check_recipe, read_source
from spolia.runs.store import RunFolder
from spolia.zoo.resnet import ResNet

pytestmark = pytest.mark.sampled(3)  # of many cases alike

LOSSES = [method.name for method in METHODS if method.family == "distill"]
SHORT = ["problem.training.epochs=2", "problem.training.check_every=5", "problem.images=40", "problem.teacher=16"]


def load_recipe(ref: str | Path, overrides: Sequence[str] = ()) -> Any:
    return recipes.load_recipe(ref, overrides)


def run(name: str, folder: Path, *overrides: str) -> dict[str, Any]:
    run_recipe(load_recipe(f"distill/{name}-tiny", overrides), RunFolder(folder))
    return json.loads((folder / "results.json").read_text())


@pytest.fixture
def hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher of one epoch: what is tested does not hang on what it knows."""
    monkeypatch.setitem(distill_pair._DIGITS_TEACHER, "epochs", 1.0)


# --- the function ----------------------------------------------------------------------------------------------------


@pytest.fixture
def given() -> tuple[nn.Module, nn.Module, tuple[Tensor, Tensor]]:
    draws = torch.Generator().manual_seed(0)
    x, y = torch.randn(40, 6, generator=draws), torch.randint(0, 4, (40,), generator=draws)
    return nn.Linear(6, 4), nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)), (x, y)


def test_the_door_is_the_method(given: Any) -> None:
    from spolia.methods.distill.rkkd import Rkkd, rkkd
    from spolia.methods.distill.train import distill

    student, teacher, data = given
    pace = {"steps": 4, "batch": 10}
    ours = spolia.distill(student, teacher, data, settings={"gamma": 2.0}, training=pace)
    theirs = distill(student, teacher, data, Training(steps=4, batch=10), objective=rkkd(Rkkd(gamma=2.0)))
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    other = spolia.distill(student, teacher, data, method="kd", settings=Kd(), training=Training(**pace))
    assert not torch.equal(other.weight, ours.weight) and not torch.equal(other.weight, student.weight)


@pytest.mark.parametrize(
    ("call", "word"),
    [
        ({"method": "rkd2"}, "`rkd`"),
        ({"method": "ties"}, "of the family merge"),
        ({"settings": {"gama": 1}}, "did you mean `gamma`"),
        ({"settings": {"gamma": -1}}, "too small"),
        ({"settings": Kd()}, "a Kd is no Rkkd"),
        ({"training": {"epoch": 1}}, "training.epoch"),
        ({"training": 5}, "a int is no Training"),
        ({"settings": {"gama": 1}, "training": {"lr": 0}}, "training.lr"),
    ],
)
def test_mistakes_are_told_before_any_work(given: Any, call: dict[str, Any], word: str) -> None:
    with pytest.raises(SpoliaError, match=word):
        spolia.distill(*given, **call)
    with pytest.raises(SpoliaError, match="cannot be trained"):
        spolia.distill(lambda x: x, *given[1:])


# --- recipes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LOSSES)
def test_a_plan_says_what_is_touched(name: str) -> None:
    plan = plan_recipe(load_recipe(f"distill/{name}-tiny"))
    assert [phase.name for phase in plan.phases] == ["teacher", "distil", "choose", "test"]
    assert "1000 labelled digits" in plan.phases[0].data and "600 digits" in plan.phases[3].data
    assert plan.seconds < 60 and plan.seeds == [0, 1, 2]


@pytest.mark.parametrize("name", LOSSES)
def test_a_resolved_recipe_loads_to_itself(name: str, tmp_path: Path) -> None:
    recipe = load_recipe(f"distill/{name}-tiny", ["problem.training={epochs: 7}"])
    assert recipe.problem.training.epochs == 7 and recipe.problem.training.optimizer == "adamw"  # the problem's, kept
    (tmp_path / "again.yaml").write_text(recipe.to_yaml())
    again = load_recipe(tmp_path / "again.yaml")
    assert (again.settings, again.problem) == (recipe.settings, recipe.problem)


@pytest.mark.parametrize("name", LOSSES)
def test_the_table_has_its_baselines(name: str) -> None:
    entries = distill_study.entries_of(load_recipe(f"distill/{name}-tiny"))
    labels = [entry.label for entry in entries]
    assert labels[:2] == ["labels alone", "kd"] and len(set(labels)) == len(labels)
    assert sum(entry.own for entry in entries) == 1
    assert all(entry.against in labels for entry in entries[1:])
    assert ("kd + rank" if name == "rkkd" else f"{name} + rank") in labels


def test_a_base_with_settings_of_its_own() -> None:
    recipe = load_recipe("distill/rkkd-tiny", ["method.base={name: dkd, beta: 2}"])
    entries = distill_study.entries_of(recipe)
    assert [entry.label for entry in entries] == ["labels alone", "kd", "dkd", "dkd + rank"]
    assert entries[-1].own and entries[-1].against == "dkd"
    warmer = distill_study.entries_of(load_recipe("distill/kd-tiny", ["method.temperature=2"]))
    assert [entry.label for entry in warmer] == ["labels alone", "kd, defaults", "kd", "kd + rank"]


@pytest.mark.parametrize(
    ("name", "overrides", "word"),
    [
        ("mlkd", ["problem={source: prose}"], "two views"),
        ("fitnets", ["problem={source: prose}"], "not of tokens"),
        ("rkd", ["problem={source: prose}"], "angle: 0"),
        ("attention", ["problem.network=mlp"], "network: conv"),
        ("rkkd", ["method.base=attention", "problem.network=mlp"], "network: conv"),
        ("kd", ["problem.training.task=tokens"], "task: classes"),
        ("kd", ["problem.training.epoch=3"], "epochs"),
        ("kd", ["problem.images=5"], "too small"),
        ("kd", ["problem={source: digit}"], "digits"),
        ("kd", ["problem={source: npz, data: x.npz, teacher: resnet20, student: resnet8}"], "learned nothing"),
        ("kd", ["problem={source: npz, data: x.npz, teacher: {width: 4}, student: resnet8}"], "neither network"),
        ("rkkd", ["method.base=kdd"], "`kd`"),
    ],
)
def test_a_recipe_is_checked_whole(name: str, overrides: list[str], word: str) -> None:
    with pytest.raises(SpoliaError, match=word):
        load_recipe(f"distill/{name}-tiny", overrides)


def test_files_are_looked_for_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SPOLIA_DATA", raising=False)
    with pytest.raises(SpoliaError, match="SPOLIA_DATA"):
        plan_recipe(load_recipe("distill/kd"))
    np.savez(tmp_path / "set.npz", classes=np.array(["a"]))
    problem = f"problem={{source: npz, data: {tmp_path}/set.npz, teacher: {tmp_path}/none, student: resnet8}}"
    with pytest.raises(SpoliaError, match="there is no such model"):
        plan_recipe(load_recipe("distill/kd", [problem]))
    source = read_source("distill/kd")
    with pytest.raises(SpoliaError, match="no such file"):
        plan_recipe(check_recipe(source, ["problem.data=nowhere.npz"]))


def test_views_of_digits() -> None:
    x = torch.full((30, 8, 8), -1.0)
    x[:, 3, 4] = 1.0
    flat = x.flatten(1)
    draws = np.random.default_rng(0)
    assert torch.equal(noisy(flat, draws, 0.0), flat)
    made = moved(flat, draws, 0.0).view(-1, 8, 8)
    assert torch.equal(made.sum((1, 2)), x.sum((1, 2)))  # one pixel of ink, somewhere
    places = {divmod(int(one.argmax()), 8) for one in made.flatten(1)}
    assert places == {(3, 4), (2, 4), (4, 4), (3, 3), (3, 5)}
    spread = noisy(flat, draws, 0.5) - flat
    assert float(spread.std()) == pytest.approx(0.5, abs=0.03)  # four deviations of 1,920 draws


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("name", LOSSES)
def test_every_recipe_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Short of training: every line is there, and what was touched is told. One report is drawn: it takes longest."""
    if name != "rkkd":
        monkeypatch.setattr("spolia.runs.verbs.report", lambda path: path)
    results = run(name, tmp_path / "run", "seeds=1", *SHORT)
    labels = {row["method"] for row in results["rows"]}
    assert labels >= {"teacher", "labels alone", "kd"} and len(labels) >= 4
    assert all(math.isfinite(row["mean"]) for row in results["rows"])
    assert {"teacher", "student", "choice of step", "test"} == set(results["data"])
    weights = read_tensors(tmp_path / "run" / "result")
    assert weights["head.weight"].shape[0] == 10
    assert name != "rkkd" or (tmp_path / "run" / "report.html").stat().st_size > 10_000
    assert (tmp_path / "run" / "summary.txt").read_text().count("\n") == 1


@pytest.mark.slow
@pytest.mark.usefixtures("hasty")
def test_killed_and_run_again_it_ends_with_the_same_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    overrides = ["seeds=2", *SHORT]
    monkeypatch.setattr("spolia.runs.verbs.report", lambda path: path)
    whole = run("ctkd", tmp_path / "whole", *overrides)
    steps = Journal.steps

    def dying(after: int) -> Any:
        count = iter(range(10**6))

        def stepped(self: Journal, n: int, keep: Any = None, *, shared: bool = False) -> Any:
            for step in steps(self, n, keep):
                if next(count) == after:
                    self.request_stop()
                yield step

        return stepped

    for after in (5, 14, 12):  # in a teacher, in a student, in the next seed
        monkeypatch.setattr(Journal, "steps", dying(after))
        with pytest.raises(Interrupted):
            run("ctkd", tmp_path / "killed", *overrides)
    monkeypatch.setattr(Journal, "steps", steps)
    again = run("ctkd", tmp_path / "killed", *overrides)
    assert again["rows"] == whole["rows"]
    for name in ("figures.json", "summary.txt"):
        assert (tmp_path / "killed" / name).read_text() == (tmp_path / "whole" / name).read_text()
    ours, theirs = (read_tensors(tmp_path / folder / "result") for folder in ("killed", "whole"))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.slow
def test_prose(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("spolia.runs.verbs.report", lambda path: path)
    monkeypatch.setattr("spolia.runs.distill_pair._PROSE_TEACHER", 4)
    monkeypatch.setattr("spolia.runs.distill_pair._PROSE_JUDGED", 3)
    problem = "problem={source: prose, teacher: 8, student: 4, context: 16, windows: 32}"
    short = ["problem.training.steps=4", "problem.training.batch=8", "problem.training.check_every=2"]
    results = run("rkkd", tmp_path / "run", problem, "seeds=1", *short)
    assert results["rows"][0]["metric"] == "perplexity"
    vocabulary = len(read_tensors(tmp_path / "run" / "result")["embed.weight"])
    assert 80 < vocabulary < 128
    assert all(1 < row["mean"] < 3 * vocabulary for row in results["rows"] if row["metric"] == "perplexity")


@pytest.mark.slow
def test_images_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A teacher with weights on disk that is trained further, and one of transformers as it is."""
    monkeypatch.setattr("spolia.runs.verbs.report", lambda path: path)
    draws = np.random.default_rng(0)
    arrays: dict[str, Any] = {"classes": np.array(list("abc"))}
    for part, n in (("train", 60), ("test", 20)):
        arrays[f"y_{part}"] = draws.integers(0, 3, n).astype(np.uint8)
        arrays[f"x_{part}"] = draws.integers(0, 256, (n, 28, 28)).astype(np.uint8)
    np.savez(tmp_path / "set.npz", **arrays)
    teacher = ResNet(8, 4, 3, generator=torch.Generator().manual_seed(0))
    write_checkpoint(tmp_path / "teacher", teacher.state_dict(), teacher.config())
    problem = {"source": "npz", "data": str(tmp_path / "set.npz"), "teacher": str(tmp_path / "teacher")}
    problem |= {"student": {"network": "resnet8", "width": 2}, "teacher_epochs": 1}
    problem |= {"training": {"steps": 2, "batch": 20, "check_every": 1}}
    results = run("fitnets", tmp_path / "run", f"problem={json.dumps(problem)}", "seeds=1")
    assert results["rows"][0]["task"] == str(tmp_path / "set.npz")
    assert read_tensors(tmp_path / "run" / "result")["layer3.0.conv1.weight"].shape[0] == 8

    hf = pytest.importorskip("transformers")
    config = hf.ViTConfig(
        image_size=32, patch_size=16, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
        intermediate_size=8, num_labels=3,
    )  # fmt: skip
    hf.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    problem |= {"teacher": str(tmp_path / "vit"), "teacher_epochs": 0}
    results = run("mlkd", tmp_path / "other", f"problem={json.dumps(problem)}", "seeds=1")
    assert {row["method"] for row in results["rows"]} >= {"mlkd", "mlkd + rank"}
