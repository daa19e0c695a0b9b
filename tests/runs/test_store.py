"""The run folder: made, taken up again, refused with a difference; one writer; every file whole or absent."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia.errors import SpoliaError
from spolia.runs import store
from spolia.runs.environment import environment
from spolia.runs.interrupt import gentle_stop
from spolia.runs.store import OWN_FILES, OWN_FOLDERS, RunFolder, write_json, write_whole

RECIPE = "spolia: 1\nseed: 0\nmethod:\n  name: ties\n  density: 0.2\n"


def test_making_the_object_touches_nothing(tmp_path):
    RunFolder(tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


def test_new_then_resumed(tmp_path):
    with RunFolder(tmp_path / "a" / "run") as folder:
        assert folder.begin(RECIPE) is False
        assert (folder.path / "recipe.yaml").read_text() == RECIPE
        folder.append_metrics(loss=1.0)
    with RunFolder(tmp_path / "a" / "run") as folder:
        assert folder.begin(RECIPE) is True
        assert (folder.path / "metrics.jsonl").exists()
    assert not (folder.path / ".lock").exists()


def test_another_recipe_is_refused_with_the_difference_and_changes_nothing(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.begin(RECIPE)
        folder.write_text("summary.txt", "kept")
    with RunFolder(tmp_path) as folder, pytest.raises(SpoliaError) as caught:
        folder.begin(RECIPE.replace("0.2", "0.3"))
    text = str(caught.value)
    assert "-  density: 0.2" in text
    assert "+  density: 0.3" in text
    assert "--fresh" in text
    assert (tmp_path / "summary.txt").read_text() == "kept"
    assert (tmp_path / "recipe.yaml").read_text() == RECIPE


def test_fresh_deletes_the_run_and_nothing_else(tmp_path):
    with RunFolder(tmp_path) as folder:
        folder.begin(RECIPE)
        for name in OWN_FILES[1:]:
            folder.write_text(name, "old")
        for name in OWN_FOLDERS:
            (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / "mine.txt").write_text("mine")
    with RunFolder(tmp_path) as folder:
        assert folder.begin(RECIPE.replace("0.2", "0.3"), fresh=True) is False
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine.txt", "recipe.yaml"]


@pytest.mark.parametrize("fresh", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path, fresh):
    (tmp_path / "thesis.tex").write_text("years of work")
    with RunFolder(tmp_path) as folder, pytest.raises(SpoliaError, match=r"thesis\.tex"):
        folder.begin(RECIPE, fresh=fresh)
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_a_file_in_the_way_is_told(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(SpoliaError, match="cannot be made"), RunFolder(tmp_path / "run"):
        pass


def test_the_default_folder_is_the_same_each_time():
    assert RunFolder.default("merge/ties-tiny").path == RunFolder.default("ties-tiny").path
    assert RunFolder.default("merge/ties-tiny").path.as_posix() == "runs/ties-tiny"


# --- one writer ------------------------------------------------------------------------------------------------------

HOLDER = """
import sys, time
from spolia.runs.store import RunFolder
with RunFolder(sys.argv[1]) as folder:
    folder.begin("spolia: 1\\n")
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_by_whom(tmp_path, holder):
    with pytest.raises(SpoliaError) as caught, RunFolder(tmp_path):
        pass
    assert f"process {holder.pid} on {socket.gethostname()}" in str(caught.value)
    assert (tmp_path / ".lock").exists()


def test_a_killed_writer_is_taken_over(tmp_path, holder):
    holder.kill()
    holder.wait()
    assert (tmp_path / ".lock").exists()  # it had no time to clean up
    with RunFolder(tmp_path) as folder:
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
        assert folder.begin("spolia: 1\n") is True


def test_two_writers_in_one_process_are_refused(tmp_path):
    with RunFolder(tmp_path), pytest.raises(SpoliaError, match="is writing this folder"), RunFolder(tmp_path):
        pass
    with RunFolder(tmp_path):  # free again, although the refused one closed its own handle on the way
        pass


@pytest.mark.parametrize("text", ["", "{", "[1]", '{"pid": 1}'])
def test_a_broken_lock_file_without_owner_is_taken_over(tmp_path, text):
    (tmp_path / ".lock").write_text(text)
    with RunFolder(tmp_path):
        pass


def test_a_lock_from_another_host_is_believed(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({"host": "elsewhere", "pid": 1}))
    with pytest.raises(SpoliaError, match=r"process 1 on elsewhere.*\n.*delete .*\.lock"), RunFolder(tmp_path):
        pass
    assert "elsewhere" in (tmp_path / ".lock").read_text()


def test_writing_without_the_lock_is_our_mistake(tmp_path):
    with pytest.raises(AssertionError):
        RunFolder(tmp_path).begin(RECIPE)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_failed_write_leaves_the_old_file_whole(tmp_path, monkeypatch):
    file = tmp_path / "plan.json"
    write_json(file, {"old": 1})

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_json(file, {"new": 2})
    assert json.loads(file.read_text()) == {"old": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]


def test_json_that_no_reader_takes_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "a.json", {"x": float("nan")})
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_the_usual_rights(tmp_path):
    mask = os.umask(0o027)
    try:
        assert write_whole(tmp_path / "a", "x").stat().st_mode & 0o777 == 0o640
    finally:
        os.umask(mask)


def test_a_half_written_line_is_cut_before_the_next(tmp_path):
    folder = RunFolder(tmp_path)
    folder.append_metrics(step=1)
    with (tmp_path / "metrics.jsonl").open("a") as stream:
        stream.write('{"step": 2, "lo')
    folder.append_metrics(step=2)
    assert [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2]


def test_status_keeps_what_it_knew(tmp_path):
    folder = RunFolder(tmp_path)
    first = folder.set_status("running", phase="train", seconds={"train": 2.0})
    second = folder.set_status("done", seconds={"merge": 1.0}, peak_memory_bytes=5)
    assert (first["finished"], second["started"]) == (None, first["started"])
    assert second["finished"] is not None
    assert second["seconds"] == {"train": 2.0, "merge": 1.0}
    assert folder.read_json("status.json") == second
    assert set(second) == {"state", "phase", "started", "finished", "seconds", "peak_memory_bytes", "message"}


@given(st.dictionaries(st.text(max_size=5), st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5)))
def test_json_is_read_back(tmp_path_factory, value):
    folder = RunFolder(tmp_path_factory.getbasetemp())
    folder.write_json("value.json", value)
    assert folder.read_json("value.json") == value


def test_the_environment_names_what_can_change_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = environment(seed=3, seeds=[3, 4], command="spolia run x")
    assert {"python", "spolia", "torch"} <= set(found["versions"])
    assert found["machine"]["cores"] >= 1
    assert found["git"] is None  # not a repository
    assert (found["seed"], found["seeds"], found["command"]) == (3, [3, 4], "spolia run x")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "x"], check=True)
    assert environment(seed=0, seeds=[0])["git"]["dirty"] is False
    (tmp_path / "new").write_text("")
    assert environment(seed=0, seeds=[0])["git"]["dirty"] is True


# --- Ctrl-C ----------------------------------------------------------------------------------------------------------


def test_the_first_signal_asks_and_the_second_stops(capsys):
    asked = []
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), gentle_stop(lambda: asked.append(1)):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)  # the handler runs between bytecodes
        assert asked == [1]
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
    assert asked == [1]
    assert signal.getsignal(signal.SIGINT) is before
    assert "once more" in capsys.readouterr().err
