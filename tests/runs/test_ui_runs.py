"""Runs as `spolia ui` reads them: found, told apart, followed; odd files, links and pipes are empty, never an error."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from spolia.runs import ui_runs
from spolia.runs.ui_runs import last_lines, run_at, runs_under


def write(folder: Path, **parts: Any) -> Path:
    """A run folder: `status={...}` is status.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in ({"status": {"state": "done", "started": "2026-11-21T10:00:00"}} | parts).items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def ids(top: Path) -> list[str]:
    return [run.id for run in runs_under(top)]


def test_runs_are_found_where_they_lie_the_latest_first(tmp_path: Path) -> None:
    for i, name in enumerate(["a", "sweep/one", "sweep/two", "x/y/z"]):
        write(tmp_path / name, status={"state": "done", "started": f"2026-11-2{i}T10:00:00"})
    write(tmp_path / "x/y/z/checkpoints/within")  # nothing is looked for within a run
    write(tmp_path / "1/2/3/4")  # too deep
    write(tmp_path / ".hidden")
    (tmp_path / "merged").mkdir()
    (tmp_path / "merged" / "spolia.json").write_text("{}")
    assert ids(tmp_path) == ["x/y/z", "sweep/two", "sweep/one", "a"]


def test_the_folder_itself_may_be_a_run(tmp_path: Path) -> None:
    write(tmp_path)
    assert ids(tmp_path) == ["."]
    run = run_at(tmp_path, ".")
    assert run is not None and run.path == tmp_path


@pytest.mark.parametrize(
    "id",
    [
        *("", "..", "../secret", "a/..", "a/../a", "./a", "a/", "/a", "a//b", ".git", "a\0b", "no", "link", "inlink/a"),
        *("a\\..\\..\\secret", "a/b/c/d", "file", "empty", "..%2fsecret", "\ud800", "x" * 5000),
    ],
)
def test_no_name_leads_elsewhere(tmp_path: Path, id: str) -> None:
    top = tmp_path / "runs"
    write(tmp_path / "secret")
    write(top / "a")
    (top / "file").write_text("x")
    (top / "empty").mkdir()
    (top / "link").symlink_to(tmp_path / "secret", target_is_directory=True)
    (top / "inlink").symlink_to(top, target_is_directory=True)
    assert run_at(top, id) is None
    assert ids(top) == ["a"]
    assert run_at(top, "a") is not None


ODD: dict[str, Any] = {
    "half-written": b'{"state": "runn',
    "a list": b"[1]",
    "nothing": b"",
    "binary": bytes(range(256)),
    "deep": b"[" * 100_000,
    "surrogates": b'{"state": "\\ud800", "started": 3, "phase": []}',
}


@pytest.mark.parametrize("content", ODD.values(), ids=list(ODD))
def test_odd_files_are_empty(tmp_path: Path, content: bytes) -> None:
    folder = write(tmp_path / "a")
    for name in ("status.json", "plan.json", "results.json", "metrics.jsonl", ".lock"):
        (folder / name).write_bytes(content)
    run = run_at(tmp_path, "a")
    assert run is not None and isinstance(run.status, dict) and last_lines(run) == []


def test_links_pipes_and_large_files_are_not_read(tmp_path: Path, monkeypatch) -> None:
    secret = tmp_path / "secret"
    secret.write_text('{"state": "secret"}')
    folder = write(tmp_path / "runs" / "a", plan={"title": "x" * 100})
    for name in ("recipe.yaml", "metrics.jsonl", "report.html"):
        (folder / name).symlink_to(secret)
    os.mkfifo(folder / "summary.txt")  # to read it would wait for ever
    (folder / "results.json").symlink_to(secret)
    monkeypatch.setattr(ui_runs, "SMALL", 50)
    run = run_at(tmp_path / "runs", "a")
    assert run is not None and run.results == {} and not run.has_report
    assert [ui_runs.text(run, name) for name in ("recipe.yaml", "summary.txt")] == ["", ""]
    assert last_lines(run) == []
    assert ui_runs.read(folder / "plan.json", 50) == b"" and ui_runs.read(folder / "plan.json", 500)


def test_a_growing_file_is_followed(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    run, file = run_at(tmp_path, "a"), folder / "metrics.jsonl"
    assert run is not None and last_lines(run) == []
    with file.open("a") as stream:
        for step in range(3):
            stream.write(json.dumps({"step": step}) + "\n")
            stream.flush()
            assert [line["step"] for line in last_lines(run)] == list(range(step + 1))
        stream.write('{"step": 3')
        stream.flush()
        assert len(last_lines(run)) == 3  # a line counts when it is whole
        stream.write("}\n")
        stream.flush()
        assert len(last_lines(run)) == 4
    file.write_text('{"step": 0}\n')  # begun anew
    assert last_lines(run) == [{"step": 0}]


def test_of_a_long_file_the_end_is_read(tmp_path: Path) -> None:
    folder = write(tmp_path / "a")
    (folder / "metrics.jsonl").write_text("".join(f'{{"step": {i}}}\n' for i in range(50_000)))
    run = run_at(tmp_path, "a")
    assert run is not None
    steps = [line["step"] for line in last_lines(run)]
    assert steps == list(range(50_000 - len(steps), 50_000)) and 1000 < len(steps) < 10_000


def test_what_changes_is_read_again(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", status={"state": "done"})
    assert runs_under(tmp_path)[0].status == {"state": "done"}
    write(folder, status={"state": "failed"})
    assert runs_under(tmp_path)[0].status == {"state": "failed"}


def test_a_run_whose_process_is_gone_is_told(tmp_path: Path) -> None:
    folder = write(tmp_path / "a", status={"state": "running"})

    def gone(**owner: Any) -> bool:
        (folder / ".lock").write_text(json.dumps(owner))
        run = run_at(tmp_path, "a")
        assert run is not None
        return run.gone

    here, ended = socket.gethostname(), subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    assert not gone(host=here, pid=os.getpid())
    assert gone(host=here, pid=ended.pid)
    assert not gone(host="elsewhere", pid=ended.pid)  # its death cannot be seen from here
    for odd in ("1", -1, 0, 2**80, None, [1]):
        assert not gone(host=here, pid=odd)
    (folder / ".lock").unlink()
    assert runs_under(tmp_path)[0].gone
    write(folder, status={"state": "done"})
    assert not runs_under(tmp_path)[0].gone
