"""Hub ids: told from paths, fetched through huggingface_hub, and told what to do when that cannot be. No network."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import spolia
from spolia.data import hub
from spolia.errors import SpoliaError
from spolia.runs.references import is_hub_id

Write = Callable[..., Path]


class Hub(ModuleType):
    """A huggingface_hub whose models are folders here."""

    def __init__(self, models: dict[str, Any]):
        super().__init__("huggingface_hub")
        self.models, self.asked = models, []

    def snapshot_download(self, repo_id: str, *, revision: str | None = None, **rest: Any) -> str:
        self.asked.append((repo_id, revision, rest))
        found = self.models.get(f"{repo_id}@{revision}" if revision else repo_id, KeyError(repo_id))
        if isinstance(found, Exception):
            raise found
        return str(found)


@pytest.fixture
def put_hub(monkeypatch) -> Callable[..., Hub]:
    def put(models: dict[str, Any]) -> Hub:
        monkeypatch.setitem(sys.modules, "huggingface_hub", fake := Hub(models))
        return fake

    return put


def error(name: str, *bases: type[Exception], text: str = "") -> Exception:
    return type(name, bases or (Exception,), {})(text)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("org/name", ("org/name", None)),
        ("org/name-7B_v0.1", ("org/name-7B_v0.1", None)),
        ("org/name@main", ("org/name", "main")),
        ("org/name@refs/pr/3", ("org/name", "refs/pr/3")),
        ("gpt2", None),
        ("org/name/sub", None),
        ("./org/name", None),
        ("/org/name", None),
        ("org/name@", None),
        ("org/name@a@b", None),
        ("org/na me", None),
        ("", None),
    ],
)
def test_ids_are_told_from_paths(text: str, parts: tuple | None) -> None:
    assert hub.split_id(text) == parts


def test_a_local_path_wins_and_so_does_its_folder(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("org/name") and is_hub_id("org/name@dev")
    (tmp_path / "org").mkdir()
    assert not is_hub_id("org/name")  # a misspelt path is not asked of the hub
    (tmp_path / "there" / "own").mkdir(parents=True)
    assert is_hub_id("own/name") and not is_hub_id("own/name", [tmp_path / "there"])


def test_only_safe_files_of_the_revision_are_asked_for(tmp_path: Path, put_hub, write_model: Write) -> None:
    fake = put_hub({"org/name@dev": write_model(tmp_path / "m", {"w": torch.ones(1)})})
    assert hub.fetch("org/name@dev") == tmp_path / "m"
    ((name, revision, rest),) = fake.asked
    assert (name, revision) == ("org/name", "dev")
    assert "*.safetensors" in rest["allow_patterns"] and "*.json" in rest["allow_patterns"]
    assert not any(word in pattern for pattern in rest["allow_patterns"] for word in ("bin", "pt", "py"))
    assert "*/*" in rest["ignore_patterns"]


def test_merging_from_the_hub(tmp_path: Path, put_hub, write_model: Write, write_adapter: Write, monkeypatch) -> None:
    base, factors = torch.ones(4, 3), {"a.lora_A.weight": torch.ones(2, 3), "a.lora_B.weight": torch.ones(4, 2)}
    models = {
        "org/base": write_model(tmp_path / "snap-1", {"a.weight": base}, {"model_type": "x"}),
        "org/math@v2": write_model(tmp_path / "snap-2", {"a.weight": base * 3}, {"model_type": "x"}),
        "org/lora": write_adapter(tmp_path / "snap-3", factors, lora_alpha=2),
    }
    put_hub(models)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    given = {
        "experts": ["org/math@v2", "org/lora", "org/base+org/lora"],
        "base": "org/base",
        "method": "task_arithmetic",
    }
    dense = base + (3 - 1) + 2 * 2.0  # scale 1 each: the full model adds 2, either way of naming the adapter adds 2
    merged = spolia.merge(**given, settings={"scale": 1.0})
    assert torch.equal(merged["a.weight"], dense)
    spolia.merge(**given, settings={"scale": 1.0}, out="result")
    from spolia.core.checkpoint import read_tensors

    assert torch.equal(read_tensors("result")["a.weight"], dense)
    assert (tmp_path / "here/result/config.json").is_file()
    Path("own.yaml").write_text(
        "spolia: 1\npool: {base: org/base, experts: [org/math@v2, org/lora]}\n"
        "method: {name: task_arithmetic, scale: 1.0}\n"
    )
    recipe = spolia.load_recipe("own.yaml")  # nothing is fetched for checking it
    assert [str(e.path) for e in recipe.pool.experts] == ["org/math@v2", "org/lora"]
    spolia.run("own.yaml", "run")
    assert torch.equal(read_tensors("run/result")["a.weight"], base + 2 + 2)
    Path("theirs.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: org/base\nmodels:\n  - model: org/base+org/lora\n"
        "  - model: {model: {path: org/math, revision: v2}}\nparameters: {weight: 1.0}\n"
    )
    from spolia.runs.verbs import merge_recipe

    merge_recipe("theirs.yml", "theirs")
    assert torch.equal(read_tensors("theirs")["a.weight"], base + 2 + 2)


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (
            error("LocalEntryNotFoundError", OSError),
            ["cannot be reached", "hf download org/name --revision dev --local-dir name"],
        ),
        (error("OfflineModeIsEnabled", ConnectionError), ["cannot be reached", "hf download"]),
        (error("ConnectTimeout", ConnectionError), ["cannot be reached"]),
        (error("GatedRepoError"), ["gated", "hf auth login"]),
        (error("RepositoryNotFoundError"), ["no model that the hub shows", "hf auth login"]),
        (error("RevisionNotFoundError"), ["not in this revision"]),
        (error("HFValidationError", ValueError), ["no name that the hub knows"]),
        (OSError(28, "No space left on device"), ["No space left", "try again"]),
        (error("Odd"), ["Odd"]),
    ],
)
def test_what_the_hub_refuses(problem: Exception, words: list[str], put_hub) -> None:
    put_hub({"org/name@dev": problem})
    with pytest.raises(SpoliaError) as caught:
        hub.fetch("org/name@dev")
    assert all(word in str(caught.value) for word in ("org/name@dev", *words)), str(caught.value)


def test_without_the_library(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(SpoliaError, match="not installed") as caught:
        hub.fetch("org/name")
    assert "pip install 'spolia[hub]'" in str(caught.value) and "hf download org/name" in str(caught.value)


def test_the_real_library_offline() -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    if not constants.HF_HUB_OFFLINE:
        pytest.skip("would reach for the network")
    with pytest.raises(SpoliaError, match="cannot be reached"):
        hub.fetch("spolia-tests/no-such-model")


def test_a_release_without_safetensors(tmp_path: Path, put_hub) -> None:
    put_hub({"org/name": tmp_path})
    with pytest.raises(SpoliaError, match=r"no \*\.safetensors on the hub"):
        hub.fetch("org/name")


def test_mistyped_paths_never_reach_the_hub(tmp_path: Path, put_hub, monkeypatch) -> None:
    fake = put_hub({})
    monkeypatch.chdir(tmp_path)
    (tmp_path / "experts").mkdir()
    with pytest.raises(SpoliaError, match="no such folder"):
        spolia.merge(["experts/maths", "./other/one"])
    (tmp_path / "r.yaml").write_text("spolia: 1\npool: {experts: [./a/b, experts/x]}\nmethod: {name: average}\n")
    with pytest.raises(SpoliaError, match="there is no"):
        spolia.load_recipe("r.yaml")
    assert fake.asked == []
