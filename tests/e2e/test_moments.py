"""What a stranger does in the first hour, and what goes wrong then: merging without reading, typos, a kill, no network,
doubt, a folder that cannot be written, a full disk, no terminal, paths of another system, two hundred runs.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from spolia import cli
from spolia.core import checkpoint

SCREEN = 24  # lines of a terminal
RECIPE = "spolia: 1\npool:\n  base: ./base\n  experts: [./math, ./code]\nmethod:\n  name: task_arithmetic\n"
Write = Callable[..., Path]


def spolia(*words: object) -> tuple[int, str, str]:
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        cli.main([str(word) for word in words])
    return int(end.value.code or 0), out.getvalue(), err.getvalue()


@pytest.fixture
def place(tmp_path: Path, write_model: Write, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base, two fine-tunes of it and a recipe, where a stranger stands."""
    draws = torch.Generator().manual_seed(0)
    for name in ("base", "math", "code"):
        tensors = {key: torch.randn(64, 64, generator=draws) for key in ("layers.0.weight", "head.weight")}
        write_model(tmp_path / name, tensors, {"model_type": "llama"})
    (tmp_path / "my.yaml").write_text(RECIPE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


# --- 1. nothing but pip and two folders ------------------------------------------------------------------------------


def test_two_folders_become_a_model_and_a_report(place: Path) -> None:
    code, out, _ = spolia("run", "merge/average", "pool.experts=[math, code]")
    assert code == 0 and "runs/average/report.html" in out  # one command
    merged, math, code_ = (load_file(f) for f in (
        place / "runs/average/result/model.safetensors", place / "math/model.safetensors", place / "code/model.safetensors"
    ))  # fmt: skip
    assert all(torch.allclose(merged[name], (math[name] + code_[name]) / 2) for name in merged)
    assert (place / "runs/average/report.html").stat().st_size > 1000
    assert "## Data touched" in (place / "runs/average/result/README.md").read_text()


def test_what_is_missing_is_asked_for_by_name(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A packaged recipe run as it is says what it lacks, in the words that give it."""
    monkeypatch.chdir(place / "base")
    code, _, err = spolia("run", "merge/ties")
    assert code == 2 and "pool.base=PATH 'pool.experts=[PATH, PATH]'" in err


# --- 2. a typo -------------------------------------------------------------------------------------------------------

TYPOS = {  # what is wrong: (in the recipe, written instead, words of the command, the fix)
    "method": ("task_arithmetic", "task_arithmetc", (), "did you mean `task_arithmetic`?"),
    "setting": ("arithmetic\n", "arithmetic\n  scal: 1\n", (), "did you mean `scale`?"),
    "path": ("./math", "./maths", (), "did you mean `math`?"),
    "override": ("", "", ("method.scal=1",), "did you mean `scale`?"),
    "override's key": ("", "", ("methd.scale=1",), "did you mean `method`?"),
    "task": ("method:", "  tasks:\n    mth: {test: ./x.npz}\n    code: {test: ./x.npz}\nmethod:", (), "did you mean `math`?"),
    "recipe's version": ("spolia: 1", "spolia: 2", (), "pip install --upgrade spolia"),
    "no version": ("spolia: 1\n", "", (), "add `spolia: 1` on top"),
    "key": ("pool:", "pol:", (), "did you mean `pool`?"),
    "type": ("", "", ("output.dtype=bf16",), "did you mean `bfloat16`?"),
    "quoted path of Windows": ("./math", '"C:\\models\\math"', (), "write paths with /, or in single quotes"),
}  # fmt: skip


@pytest.mark.parametrize("verb", ["run", "plan"])
@pytest.mark.parametrize("kind", TYPOS)
def test_a_typo_is_answered_on_one_screen(place: Path, kind: str, verb: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right, wrong, words, fix = TYPOS[kind]
    assert right in RECIPE
    (place / "my.yaml").write_text(RECIPE.replace(right, wrong, 1))
    np.savez(place / "x.npz", x=np.zeros((2, 3), np.float32), y=np.zeros(2, np.int64))
    before = sorted(place.rglob("*"))
    monkeypatch.setattr(checkpoint, "read_into", None)  # no tensor is read
    code, out, err = spolia(verb, "my.yaml", *words)
    assert (code, out) == (2, "") and fix in err and "mend: " in err
    assert len(err.splitlines()) <= SCREEN and "Traceback" not in err
    assert sorted(place.rglob("*")) == before


def test_a_typo_in_a_tensor(place: Path, write_model: Write) -> None:
    odd = load_file(place / "code/model.safetensors")
    write_model(place / "code", {"layers.0.weight": odd["layers.0.weight"], "head.weigth": odd["head.weight"]})
    code, _, err = spolia("run", "my.yaml")
    assert code == 2 and not (place / "runs").exists() and len(err.splitlines()) <= SCREEN
    assert "code: lacks tensor `head.weight`, which base has" in err and "it has `head.weigth`: rename that" in err


@pytest.mark.parametrize(
    ("words", "fix"),
    [
        (("rn", "my.yaml"), "Did you mean 'run'"),
        (("run", "my.yml"), "did you mean `my.yaml`?"),
        (("run", "merge/tis"), "did you mean `merge/ties`?"),
        (("show", "adamergin"), "did you mean `adamerging`?"),
        (("run", "my.yaml", "--frsh"), "--fresh"),
        (("plan", "continual/refresh-tiny", "method.host=drepp"), "did you mean `derpp`?"),
        (("plan", "link/llm_sc-tiny", "problem.channel=rayleih"), "did you mean `rayleigh`?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_typo_on_the_command_line(place: Path, words: tuple[str, ...], fix: str) -> None:
    code, out, err = spolia(*words)
    assert (code, out) == (2, "") and fix in err and len(err.splitlines()) <= SCREEN


def test_paths_of_windows(place: Path) -> None:
    """On Windows they are paths; elsewhere the answer says what to write."""
    for path, fix in (
        (r".\math", f"did you mean `{place / 'math'}`?"),
        (r"C:\Users\me\math", "write / between folders"),
    ):
        (place / "my.yaml").write_text(RECIPE.replace("./math", path))
        code, _, err = spolia("plan", "my.yaml")
        assert code == 2 and f"there is no {place}/{path}" in err and fix in err
    text = RECIPE.replace("\n", "\r\n")
    (place / "my.yaml").write_bytes(text.encode())
    assert spolia("plan", "my.yaml")[0] == 0


# --- 3. killed at 60 % -----------------------------------------------------------------------------------------------

WORDS = ["run", "merge/ties-tiny", "pool.domains=[upright, turned]", "--quiet", "-o"]
KILLED = """
import os, signal, sys
from spolia import cli
from spolia.runs import progress

class Deadly:
    done = total = 0.0
    def start(self, phase, total, unit="steps"):
        self.total = total
    def advance(self, n=1, **numbers):
        self.done += n
        if self.done >= 0.6 * self.total:
            os.kill(os.getpid(), signal.SIGKILL)
    def finish(self): ...

progress.choose = lambda *_: Deadly()
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory, fork: Callable[..., Any]) -> tuple[Path, Path]:
    """A run that nothing disturbed, and one killed at 60 % and started again."""
    place = tmp_path_factory.mktemp("killed")
    child = fork(KILLED, *WORDS, place / "killed")
    child.communicate()
    assert child.returncode == -signal.SIGKILL and not (place / "killed/results.json").exists()
    assert json.loads((place / "killed/status.json").read_text())["state"] == "running"
    for name in ("whole", "killed"):
        code, _, err = spolia(*WORDS, place / name)
        assert code == 0, err
    return place / "whole", place / "killed"


@pytest.mark.slow
def test_killed_at_60_percent_and_run_again(twice: tuple[Path, Path]) -> None:
    rows = [json.loads((run / "results.json").read_text())["rows"] for run in twice]
    weights = [(run / "result/model.safetensors").read_bytes() for run in twice]
    assert rows[0] == rows[1] and weights[0] == weights[1]
    steps = [
        [(line["phase"], line["step"], line["loss"]) for line in map(json.loads, text.splitlines())]
        for text in ((run / "metrics.jsonl").read_text() for run in twice)
    ]
    assert steps[0] == steps[1]


# --- 4. no network ---------------------------------------------------------------------------------------------------


@pytest.fixture
def unplugged(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Any]]:
    """Whoever asks for another machine is told that there is none, and written down."""
    asked: list[Any] = []

    def nowhere(*where: Any, **_: Any) -> Any:
        asked.append(where)
        raise OSError(errno.ENETUNREACH, "Network is unreachable")

    connect = socket.socket.connect

    def connecting(self: socket.socket, address: Any) -> None:
        if self.family in (socket.AF_INET, socket.AF_INET6) and not str(address[0]).startswith(("127.", "::1")):
            nowhere(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", connecting)
    monkeypatch.setattr(socket, "getaddrinfo", nowhere)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    yield asked


def test_without_a_network_everything_but_push_works(place: Path, unplugged: list[Any]) -> None:
    commands = [
        ("list",), ("show", "ties"), ("new", "ties", "-o", "new.yaml"), ("schema",), ("plan", "my.yaml"),
        ("run", "my.yaml"), ("merge", "my.yaml", "merged"), ("report", "runs/my", "--to", "html"), ("inspect", "base", "math"),
        ("compare", "math", "code"), ("push", "merged", "owner/name", "--dry-run"), ("plan", "meta/msd-tiny"),
        ("sweep", "merge/task_arithmetic-tiny", "--over", "method.scale=0.1,0.2", "--dry-run"),
    ]  # fmt: skip
    for words in commands:
        code, _, err = spolia(*words)
        assert code == 0, (words, err)
    assert (place / "merged/README.md").read_text().startswith("---")
    assert unplugged == []


# --- 5. why should I believe it? -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_report_gives_its_reasons(twice: tuple[Path, Path]) -> None:
    page = (twice[1] / "report.html").read_text()
    for part in ("expert upright", "expert turned", "base", "average", "task_arithmetic", "baseline"):
        assert part in page
    for part in ("95 %", "Wilson", "labelled", "weights only", "digits that nothing before had seen", "seed"):
        assert part in page
    env = json.loads((twice[1] / "env.json").read_text())
    assert env["command"] and env["command"].split()[0] in page and env["versions"]["torch"] in page


# --- what goes wrong -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("out", ["my.yaml/run", "/proc/nowhere/run"])
def test_a_folder_that_cannot_be_written(place: Path, out: str) -> None:
    """Under a file, and where nobody may write, root included."""
    for words in (("run", "my.yaml", "-o", out), ("merge", "my.yaml", out)):
        code, stdout, err = spolia(*words)
        assert (code, stdout) == (2, "") and out.split("/run")[0] in err and "mend: " in err, err
        assert len(err.splitlines()) <= SCREEN and "Traceback" not in err
    assert not (place / "runs").exists()


@contextlib.contextmanager
def files_of(most: int) -> Iterator[None]:
    """Inside, no file grows beyond `most` bytes: what a full disk does, and it needs no disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (most, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("verb", [("run", "my.yaml", "-o", "out"), ("merge", "my.yaml", "out")], ids=["run", "merge"])
def test_a_full_disk(place: Path, verb: tuple[str, ...]) -> None:
    with files_of(20_000):  # the model has 32 kB
        code, _, err = spolia(*verb)
    assert code == 2 and "mend: " in err and "Traceback" not in err and "mistake of its own" not in err
    assert not list(place.glob("out/**/README.md"))  # nothing looks whole
    assert spolia(*verb)[0] == 0  # with room, the same command goes on
    assert list(place.glob("out/**/model.safetensors"))


@pytest.mark.slow
def test_a_disk_that_fills_up_while_it_learns(tmp_path: Path) -> None:
    words = ["run", "merge/ties-tiny", "pool.domains=[upright, turned]", "-o", tmp_path / "out"]
    with files_of(60_000):  # enough for plan and recipe, not for a checkpoint
        code, _, err = spolia(*words)
    assert code == 2 and "mend: " in err and "mistake of its own" not in err, err


@pytest.mark.slow
def test_no_terminal(place: Path) -> None:
    """As a job runs it: nothing on stdin, no TERM, no HOME; and a reader that goes away."""
    words = [sys.executable, "-c", "from spolia.cli import main; main()"]
    bare = {"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*words, "run", "my.yaml"], stdin=subprocess.DEVNULL, capture_output=True, text=True, env=bare, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "merge: 100%" in done.stderr and "\x1b" not in done.stdout + done.stderr
    with subprocess.Popen([*words, "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as gone:
        assert gone.stdout is not None and gone.stderr is not None
        gone.stdout.close()
        assert "Traceback" not in gone.stderr.read()


def test_a_sweep_of_200_runs_is_listed_from_one_file(tmp_path: Path, listed_lightly: Callable[[Path], str]) -> None:
    """Not by the clock: no run's folder is looked into, and nothing heavy is imported."""
    folder = tmp_path / "big"
    number = {"metric": "accuracy", "unit": "%", "mean": 90.0, "low": None, "high": None, "n": 1}
    runs = []
    for i in range(200):
        name = f"method.scale={i // 5},seed={i % 5}"
        run = {"name": name, "values": {"method.scale": str(i // 5)}, "seed": i % 5, "overrides": [], "state": "done"}
        runs.append(run | {"line": "x", "number": number})
        (folder / name).mkdir(parents=True)
        with (folder / name / "metrics.jsonl").open("w") as stream:
            stream.truncate(10**9)  # a hole: whoever reads it whole is killed for memory or time
    kept = {"recipe": "r", "digest": 0, "overrides": [], "search": None, "metric": None, "runs": runs}
    (folder / "sweep.json").write_text(json.dumps(kept))
    assert "200 done" in listed_lightly(folder)
