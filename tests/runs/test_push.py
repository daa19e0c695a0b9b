"""Push: what would be sent, what must not be, and a hub that is a module here. No network."""

from __future__ import annotations

import json
import os
import pickle
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

import spolia
from spolia import cli
from spolia.errors import SpoliaError
from spolia.runs.push import CARD, prepare, push

Write = Callable[..., Path]
SECRET = "hf_" + "s3cretToken"
CARD_TEXT = (
    "---\nbase_model:\n- org/base\nlicense: mit\n---\n\n# result\n\n```python\n"
    'model = AutoModel.from_pretrained("result")\n```\n'
)


class Hub(ModuleType):
    """A huggingface_hub that keeps what it is sent. `fails`: the error of the next commit."""

    def __init__(self) -> None:
        super().__init__("huggingface_hub")
        self.repos: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.fails: Exception | None = None
        self.CommitOperationAdd = lambda path, content: (path, content)
        self.HfApi = lambda: self

    def create_repo(self, repo: str, *, private: bool | None, exist_ok: bool) -> str:
        self.asked.append("create_repo")
        assert exist_ok
        self.repos.setdefault(repo, {"private": bool(private), "files": {}})
        return f"https://hub.test/{repo}"

    def repo_info(self, repo: str) -> Any:
        return SimpleNamespace(private=self.repos[repo]["private"])

    def create_commit(self, repo: str, operations: list, *, commit_message: str) -> None:
        self.asked.append("create_commit")
        if self.fails is not None:
            error, self.fails = self.fails, None
            raise error
        for name, content in operations:
            self.repos[repo]["files"][name] = content if isinstance(content, bytes) else Path(content).read_bytes()


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    monkeypatch.setitem(sys.modules, "huggingface_hub", fake := Hub())
    return fake


@pytest.fixture
def run(tmp_path: Path, write_model: Write) -> Path:
    """A finished run: result/ with a model and its card, and the run's own files around it."""
    folder = tmp_path / "run"
    write_model(folder / "result", {"w": torch.ones(4, 3)}, {"model_type": "x"})
    (folder / "result" / CARD).write_text(CARD_TEXT)
    (folder / "result" / "spolia.json").write_text("{}")
    (folder / "checkpoints").mkdir()
    (folder / "checkpoints" / "step-1.safetensors").write_bytes(b"x")
    for name, text in {"status.json": '{"state": "done"}', "recipe.yaml": "spolia: 1\n", "log.txt": "x"}.items():
        (folder / name).write_text(text)
    return folder


@pytest.fixture
def merged(tmp_path: Path, write_model: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What `spolia merge` makes."""
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        write_model(tmp_path / name, {"w": torch.ones(4, 3)}, {"model_type": "x"})
    return tmp_path / spolia.merge(["a", "b"], out="merged")


def command(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["push", *arguments])
    out, err = capsys.readouterr()
    return int(end.value.code or 0), out, err


# --- what is sent ----------------------------------------------------------------------------------------------------


def test_of_a_run_its_model_is_sent_and_nothing_else(run: Path, hub: Hub) -> None:
    assert push(run, "org/name", private=True) == "https://hub.test/org/name"
    sent = hub.repos["org/name"]
    assert sent["private"]
    assert sorted(sent["files"]) == ["README.md", "config.json", "model.safetensors", "spolia.json"]
    assert sent["files"]["model.safetensors"] == (run / "result/model.safetensors").read_bytes()
    assert push(run / "result", "org/other") == "https://hub.test/org/other"
    assert sorted(hub.repos["org/other"]["files"]) == sorted(sent["files"])
    assert not hub.repos["org/other"]["private"]


def test_a_merged_folder_is_sent_whole(merged: Path, hub: Hub) -> None:
    upload = prepare(merged, "org/name")
    assert "model.safetensors" in upload.files and upload.card.startswith("---\n")
    assert upload.files == {name: len(content) for name, content in _sent(upload, hub).items()}


def _sent(upload: Any, hub: Hub) -> dict[str, bytes]:
    upload.send()
    return hub.repos[upload.repo]["files"]


def test_the_card_calls_the_model_as_the_hub_does(run: Path, hub: Hub) -> None:
    push(run, "org/name")
    card = hub.repos["org/name"]["files"][CARD].decode()
    assert "\n# name\n" in card and 'from_pretrained("org/name")' in card
    assert (run / "result" / CARD).read_text() == CARD_TEXT  # here nothing changes


def test_a_look_sends_nothing(run: Path, hub: Hub, capsys) -> None:
    assert push(run, "org/name", dry_run=True).files["model.safetensors"] > 48
    code, out, err = command(capsys, str(run), "org/name", "--dry-run", "--private")
    assert (code, err) == (0, "")
    for word in ("org/name (private)", "model.safetensors", "card (README.md)", "license: mit"):
        assert word in out
    told = json.loads(command(capsys, str(run), "org/name", "--dry-run", "--json")[1])
    assert told["files"]["README.md"] == len(told["card"].encode()) and told["bytes"] == sum(told["files"].values())
    assert hub.asked == [] and hub.repos == {}


def test_a_look_needs_no_library(run: Path, monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert command(capsys, str(run), "org/name", "--dry-run")[0] == 0
    code, _, err = command(capsys, str(run), "org/name", "--yes")
    assert code == 2 and "spolia[hub]" in err


# --- asking ----------------------------------------------------------------------------------------------------------


def test_without_a_terminal_yes_must_be_said(run: Path, hub: Hub, capsys, monkeypatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: False))
    code, _, err = command(capsys, str(run), "org/name")
    assert code == 2 and "--yes" in err and "--dry-run" in err
    assert hub.asked == []
    code, out, _ = command(capsys, str(run), "org/name", "--yes")
    assert code == 0 and "sent to https://hub.test/org/name" in out and hub.repos["org/name"]["files"]


@pytest.mark.parametrize(("answer", "sent"), [(True, True), (False, False)])
def test_on_a_terminal_it_asks(run: Path, hub: Hub, capsys, monkeypatch, answer: bool, sent: bool) -> None:
    asked = []
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr("typer.confirm", lambda text, **_: asked.append(text) or answer)
    code, _, err = command(capsys, str(run), "org/name")
    assert code == 0 and "org/name" in asked[0]
    assert bool(hub.repos) is sent
    assert ("nothing was sent" in err) is not sent


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", None, "broken"])
def test_unfinished_runs_are_refused(run: Path, state: str | None) -> None:
    text = {None: None, "broken": '{"state": '}.get(state, json.dumps({"state": state}))
    (run / "plan.json").write_text("{}")
    (run / "status.json").unlink() if text is None else (run / "status.json").write_text(text)
    for given in (run, run / "result"):
        with pytest.raises(SpoliaError, match="has not ended"):
            prepare(given, "org/name")


def test_parts_of_a_run_are_refused(run: Path) -> None:
    with pytest.raises(SpoliaError, match="is a part of a run"):
        prepare(run / "checkpoints", "org/name")
    (run / "result").rename(run.parent / "elsewhere")
    with pytest.raises(SpoliaError, match="wrote no model"):
        prepare(run, "org/name")
    (run / "result").symlink_to(run.parent / "elsewhere", target_is_directory=True)
    with pytest.raises(SpoliaError, match="is a link"):
        prepare(run, "org/name")


def test_unfinished_merges_are_refused(merged: Path) -> None:
    (merged / ".spolia-progress").touch()
    with pytest.raises(SpoliaError, match="not ended"):
        prepare(merged, "org/name")
    (merged / ".spolia-progress").unlink()
    with pytest.raises(SpoliaError, match="not ended"):
        prepare(merged.rename(merged.with_name("merged.partial")), "org/name")


def _pickled(folder: Path, name: str) -> None:
    (folder / name).write_bytes(pickle.dumps({"w": 1}, protocol=4))


INTRUDERS: dict[str, tuple[Callable[[Path], Any], str]] = {
    "pickle": (lambda f: _pickled(f, "pytorch_model.bin"), "may hold pickled code"),
    "pickle under another name": (lambda f: _pickled(f, "tokenizer.json"), "may hold pickled code"),
    "torch archive": (lambda f: torch.save({}, f / "vocab.txt"), "may hold pickled code"),
    "pickle as safetensors": (lambda f: _pickled(f, "other.safetensors"), "damaged or not safetensors"),
    "cut short": (lambda f: os.truncate(f / "model.safetensors", 60), "header claims"),
    "lost shard": (
        lambda f: (f / "model.safetensors").rename(f / "model-00001-of-00002.safetensors"),
        "part 2 is not beside it",
    ),
    "index": (
        lambda f: (f / "m.safetensors.index.json").write_text('{"weight_map": {"w": "../w.safetensors"}}'),
        "points outside its folder",
    ),
    "log": (lambda f: (f / "log.txt").write_text("x"), "no part of a model"),
    "metrics": (lambda f: (f / "metrics.jsonl").write_text("{}"), "no part of a model"),
    "program": (lambda f: (f / "run.sh").write_text("x"), "no part of a model"),
    "checkpoints": (lambda f: (f / "checkpoints").mkdir(), "checkpoints of a loop"),
    "link out": (lambda f: (f / "notes.md").symlink_to("/etc/hostname"), "leads out"),
    "link up": (lambda f: (f / "notes.md").symlink_to(f.parent / "a" / "config.json"), "leads out"),
    "linked folder": (lambda f: (f / "more").symlink_to(f.parent / "a", target_is_directory=True), "link to a folder"),
    "pipe": (lambda f: os.mkfifo(f / "a.json"), "no regular file"),
    "dangling": (lambda f: (f / "a.json").symlink_to("none.json"), "no regular file"),
}


@pytest.mark.parametrize("name", INTRUDERS)
def test_what_is_no_model_is_refused(merged: Path, hub: Hub, name: str) -> None:
    make, word = INTRUDERS[name]
    make(merged)
    with pytest.raises(SpoliaError) as caught:
        push(merged, "org/name")
    assert word in str(caught.value)
    assert hub.asked == []


def test_everything_is_told_at_once(merged: Path) -> None:
    for name in ("log", "pickle", "link out"):
        INTRUDERS[name][0](merged)
    with pytest.raises(SpoliaError) as caught:
        prepare(merged, "org/name")
    assert len(caught.value.problems) == 3


def test_links_inside_and_further_folders_go_along(merged: Path, write_model: Write, hub: Hub) -> None:
    write_model(merged / "heads" / "sum", {"w": torch.ones(2)})
    (merged / "LICENSE").write_text("as is")
    (merged / "LICENSE.txt").symlink_to("LICENSE")
    push(merged, "org/name")
    files = hub.repos["org/name"]["files"]
    assert "heads/sum/model.safetensors" in files and files["LICENSE.txt"] == b"as is"


def test_folders_without_weights(tmp_path: Path) -> None:
    with pytest.raises(SpoliaError, match="no such folder"):
        prepare(tmp_path / "none", "org/name")
    with pytest.raises(SpoliaError, match=r"holds no \*\.safetensors"):
        prepare(tmp_path, "org/name")


@pytest.mark.parametrize("repo", ["name", "org/name@v1", "a/b/c", "", "https://hub.test/a/b", "org/na me"])
def test_names_that_are_no_repository(run: Path, repo: str) -> None:
    with pytest.raises(SpoliaError, match="names no repository"):
        prepare(run, repo)


# --- what is told ----------------------------------------------------------------------------------------------------


def notes(folder: Path) -> str:
    return "\n".join(prepare(folder, "org/name").notes)


def test_what_is_missing_is_told(run: Path) -> None:
    assert notes(run) == ""
    card = run / "result" / CARD
    card.write_text(CARD_TEXT.replace("license: mit\n", "").replace("org/base", "base"))
    assert "names no licence" in notes(run) and "base_model names base" in notes(run)
    card.write_text("---\n[\n---\nno mapping\n")
    assert "names no licence" in notes(run)
    card.unlink()
    assert "there is no card" in notes(run) and prepare(run, "org/name").card == ""
    assert "there is no card" in str(prepare(run, "org/name"))


def test_paths_code_and_hidden_files_are_told(run: Path, tmp_path: Path) -> None:
    result = run / "result"
    (result / "recipe.yaml").write_text(f"models: [{tmp_path}/run, /no/such/path, ./here]\n")
    (result / "modeling_x.py").write_text("x = 1\n")
    (result / ".DS_Store").touch()
    told = notes(run)
    assert f"recipe.yaml names a path of this machine: {tmp_path}/run" in told
    assert "/no/such/path" not in told
    assert "modeling_x.py: code" in told
    assert "left out: .DS_Store" in told and ".DS_Store" not in prepare(run, "org/name").files


# --- what the hub refuses --------------------------------------------------------------------------------------------


def error(name: str, *bases: type[Exception], text: str = "", status: int = 0) -> Exception:
    made = type(name, bases or (Exception,), {})(text)
    if status:
        made.response = SimpleNamespace(status_code=status)
    return made


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        (error("OfflineModeIsEnabled", ConnectionError), ["offline", "HF_HUB_OFFLINE"]),
        (error("ConnectError", type("TransportError", (Exception,), {})), ["cannot be reached", "network"]),
        (error("HfHubHTTPError", status=401), ["who you are", "hf auth login"]),
        (error("HfHubHTTPError", status=403), ["does not let you write", "token"]),
        (error("HfHubHTTPError", text="Bad gateway", status=502), ["Bad gateway", "wait"]),
        (error("HFValidationError", ValueError), ["no name that the hub takes"]),
        (ValueError("Invalid metadata in README.md.\n- license must be"), ["the card", "license must be"]),
        (OSError(5, f"read error {SECRET}"), ["read error", "same command"]),
    ],
)
def test_a_failed_upload_says_what_to_do_and_can_be_repeated(run: Path, hub: Hub, problem, words) -> None:
    hub.fails = problem
    with pytest.raises(SpoliaError) as caught:
        push(run, "org/name")
    assert all(word in str(caught.value) for word in ("org/name", *words)), str(caught.value)
    assert SECRET not in str(caught.value)
    assert hub.repos["org/name"]["files"] == {}
    push(run, "org/name")
    assert "model.safetensors" in hub.repos["org/name"]["files"]


def test_private_is_not_sent_to_a_public_repository(run: Path, hub: Hub) -> None:
    hub.repos["org/name"] = {"private": False, "files": {}}
    with pytest.raises(SpoliaError, match="is public"):
        push(run, "org/name", private=True)
    assert hub.repos["org/name"]["files"] == {} and "create_commit" not in hub.asked


def test_the_real_library_offline(run: Path) -> None:
    constants = pytest.importorskip("huggingface_hub.constants")
    if not constants.HF_HUB_OFFLINE:
        pytest.skip("would reach for the network")
    with pytest.raises(SpoliaError, match="stay offline"):
        push(run, "spolia-tests/no-such-model")
