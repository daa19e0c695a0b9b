"""The command against a hub on this machine, through the real huggingface_hub: requests, token, repository, files."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.slow  # each imports the library in a process of its own

TOKEN = "hf_" + "notarealtoken"


class Hub(ThreadingHTTPServer):
    """The few paths of the hub that an upload of small files needs. `broken`: answers to commits that are refused."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.repos: dict[str, dict[str, Any]] = {}
        self.seen: list[str] = []
        self.broken = 0

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Answers(BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.seen.append(f"GET {self.path}")
        name = self.path.removeprefix("/api/models/").partition("?")[0]
        repo = self.server.repos.get(name)
        if repo is None:
            return self.answer({"error": "Repository not found"}, 404)
        return self.answer({"_id": "1", "id": name, "private": repo["private"], "siblings": [], "sha": "0" * 40})

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"] or 0))
        path = self.path.partition("?")[0]
        self.server.seen.append(f"POST {path}")
        if self.headers.get("authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid username or password."}, 401)
        if path == "/api/validate-yaml":
            return self.answer({"errors": [], "warnings": []})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            made = {"url": f"{self.server.url}/{name}", "name": name}
            if name in self.server.repos:
                return self.answer(made | {"error": "You already created this model repo"}, 409)
            private = asked.get("private", False) or asked.get("visibility") == "private"
            self.server.repos[name] = {"private": private, "files": {}}
            return self.answer(made)
        name, _, verb = path.removeprefix("/api/models/").removesuffix("/main").rpartition("/")
        if verb == "preupload":
            files = [{"path": f["path"], "uploadMode": "regular"} for f in json.loads(body)["files"]]
            return self.answer({"files": [f | {"shouldIgnore": False, "oid": None} for f in files]})
        if self.server.broken:
            self.server.broken -= 1
            return self.answer({"error": "the disk of the hub is full"}, 400)
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                held = entry["value"]
                self.server.repos[name]["files"][held["path"]] = base64.b64decode(held["content"])
        made = {"commitUrl": f"{self.server.url}/{name}/commit/{'1' * 40}", "commitOid": "1" * 40, "hookOutput": ""}
        return self.answer({"success": True, **made})

    def answer(self, value: Any, status: int = 200) -> None:
        raw = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def log_message(self, *_: Any) -> None: ...


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def model(tmp_path: Path, write_model) -> Path:
    folder = write_model(tmp_path / "model", {"w": torch.ones(4, 3)}, {"model_type": "x"})
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\n# model\n")
    return folder


def push(url: str, tmp_path: Path, *arguments: str, token: str = TOKEN) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, with a home that is empty and no hub but `url`."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("HF_") and "proxy" not in k.lower()}
    home = tmp_path / "home"
    home.mkdir(exist_ok=True)
    own = {"HF_ENDPOINT": url, "HF_HOME": str(home), "HF_TOKEN": token, "HF_HUB_DISABLE_TELEMETRY": "1"}
    code = "from spolia.cli import main; main()"
    return subprocess.run(
        [sys.executable, "-c", code, "push", *arguments],
        env=kept | own,
        cwd=tmp_path,
        input="",
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_what_lies_here_is_what_the_hub_holds(hub: Hub, model: Path, tmp_path: Path) -> None:
    done = push(hub.url, tmp_path, str(model), "org/name", "--private", "--yes")
    assert done.returncode == 0, done.stderr
    assert f"sent to {hub.url}/org/name" in done.stdout
    repo = hub.repos["org/name"]
    assert repo["private"]
    assert repo["files"].pop("README.md") == b"---\nlicense: mit\n---\n\n# name\n"
    assert repo["files"] == {f.name: f.read_bytes() for f in model.iterdir() if f.name != "README.md"}
    written = "".join(f.read_text(errors="replace") for f in (tmp_path / "home").rglob("*") if f.is_file())
    assert TOKEN not in done.stdout + done.stderr + written


def test_after_a_failure_the_same_command_goes_on(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.broken = 1
    done = push(hub.url, tmp_path, str(model), "org/name", "--yes")
    assert done.returncode == 2 and "disk of the hub is full" in done.stderr and "same command" in done.stderr
    assert TOKEN not in done.stderr and hub.repos["org/name"]["files"] == {}
    done = push(hub.url, tmp_path, str(model), "org/name", "--yes")
    assert done.returncode == 0, done.stderr
    assert "model.safetensors" in hub.repos["org/name"]["files"]


def test_nothing_is_asked_of_the_hub_before_the_yes(hub: Hub, model: Path, tmp_path: Path) -> None:
    assert push(hub.url, tmp_path, str(model), "org/name", "--dry-run").returncode == 0
    done = push(hub.url, tmp_path, str(model), "org/name")
    assert done.returncode == 2 and "no terminal" in done.stderr
    assert hub.seen == []


def test_a_wrong_token_and_no_hub_are_told(hub: Hub, model: Path, tmp_path: Path) -> None:
    done = push(hub.url, tmp_path, str(model), "org/name", "--yes", token="hf_" + "wrong")
    assert done.returncode == 2 and "who you are" in done.stderr and "hf auth login" in done.stderr
    done = push("http://127.0.0.1:9", tmp_path, str(model), "org/name", "--yes")  # the discard port: nobody listens
    assert done.returncode == 2 and "cannot be reached" in done.stderr


def test_private_never_goes_to_a_public_repository(hub: Hub, model: Path, tmp_path: Path) -> None:
    hub.repos["org/name"] = {"private": False, "files": {}}
    done = push(hub.url, tmp_path, str(model), "org/name", "--private", "--yes")
    assert done.returncode == 2 and "is public" in done.stderr
    assert hub.repos["org/name"]["files"] == {}
