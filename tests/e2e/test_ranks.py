"""One run by two processes: the numbers of one, its folder, its errors, its Ctrl-C, and going on with another number."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import spolia
from spolia.core import kept, tensorfile
from spolia.errors import SpoliaError

pytestmark = pytest.mark.slow

TWO = ["pool.domains=[upright, turned]", "seeds=1"]
WEIGHTS = "result/model.safetensors"
IDLE = ("in_proj_bias", "blocks.1.norm.bias", "network.2.bias")
"""A key's bias, and a shift of features that class means are taken of, change no output: their gradient is rounding alone,
which Adam takes for a direction."""
CASES: dict[str, tuple[str, list[str], str]] = {  # adamerging, distill, inner loops and prompts: beside their own tests
    "surgery": ("surgery/surgery-tiny", [*TWO, "method.steps=9"], "result/adapters/adapters.safetensors"),
    "deep": ("surgery/deep-tiny", [*TWO, "method.steps=4"], "result/adapters/adapters.safetensors"),
    "protonet": (
        "meta/protonet-tiny",
        ["seeds=1", "problem.most_steps=3", "problem.episodes=4", "problem.validation=2", "method.tasks=3"],
        "result/learner.safetensors",
    ),
    "datafree": (
        "datafree/free-tiny",
        ["seeds=1", "problem.most_steps=3", "problem.experts=3", "problem.shots=[1]", "problem.episodes=4"],
        "result/learner.safetensors",
    ),
    "continual": ("continual/derpp-tiny", ["seeds=1", "problem.epochs=1", "problem.tasks=2"], WEIGHTS),
    "deepsc": (
        "link/deepsc-tiny",
        [
            "seeds=1",
            "method.steps=3",
            "method.dropout=0",
            "problem.snr=[4]",
            "problem.sentences=4",
            "problem.beside=[]",
        ],
        "result/deepsc.safetensors",
    ),
}


RUNS = """
import json, sys
import spolia
for recipe, overrides, folder in json.loads(sys.argv[1]):
    spolia.run(recipe, folder, overrides=overrides)
"""


def test_two_processes_learn_what_one_does(tmp_path: Path) -> None:
    """Each case alone here; then all of them, one after the other, in a script under torchrun."""
    for name, (recipe, overrides, _) in CASES.items():
        one, two = tmp_path / name / "one", tmp_path / name / "two"
        spolia.run(recipe, one, overrides=overrides)
        for made in (one / "checkpoints").iterdir():  # the same teachers and experts, to save time
            if made.is_dir() and made.name != "loops":
                shutil.copytree(made, two / "checkpoints" / made.name)
        two.mkdir(exist_ok=True)
        shutil.copy(one / "recipe.yaml", two)
    (tmp_path / "runs.py").write_text(RUNS)
    jobs = [(recipe, overrides, str(tmp_path / name / "two")) for name, (recipe, overrides, _) in CASES.items()]
    done = torchrun(str(tmp_path / "runs.py"), json.dumps(jobs))
    assert done.returncode == 0, done.stderr
    for name, (_, _, artefact) in CASES.items():
        compare(tmp_path / name / "one", tmp_path / name / "two", artefact)


def compare(one: Path, two: Path, artefact: str) -> None:
    alone, shared = (tensorfile.read(folder / artefact, "")[1] for folder in (one, two))
    assert alone.keys() == shared.keys()
    for tensor in alone:
        if not tensor.endswith(IDLE):  # sums of fp32 in another order, carried on by a few steps
            torch.testing.assert_close(
                shared[tensor], alone[tensor], rtol=1e-3, atol=1e-5, msg=lambda m, t=tensor: f"{one}: {t}: {m}"
            )
    assert labels(one) == labels(two)
    shared_phases = {phase for (phase, _), _ in metrics(two)}
    told = [line for line in metrics(one) if line[0][0] in shared_phases]
    assert [place for place, _ in metrics(two)] == [place for place, _ in told], "one process writes"
    for (_, numbers), (_, others) in zip(told, metrics(two), strict=True):
        assert others == pytest.approx(numbers, rel=1e-3, abs=1e-4)  # the same rounding
    assert status(two)["state"] == "done" and not (two / ".lock").exists()


def labels(folder: Path) -> list[tuple[str, str, str]]:
    rows = json.loads((folder / "results.json").read_text())["rows"]
    return [(row["method"], row["task"], row["metric"]) for row in rows]


def metrics(folder: Path) -> list[tuple[tuple[str, int | None], dict[str, float]]]:
    """Phase, step and numbers that the loops told, but for what is measured in seconds."""
    file = folder / "metrics.jsonl"  # not there where nothing but a few quiet steps was left to make
    lines = list(map(json.loads, file.read_text().splitlines())) if file.exists() else []
    told = [{name: v for name, v in line.items() if isinstance(v, float) and "seconds" not in name} for line in lines]
    return [
        ((line["phase"], line["step"]), {name: v for name, v in numbers.items() if name != "time"})
        for line, numbers in zip(lines, told, strict=True)
    ]


def status(folder: Path) -> Any:
    return json.loads((folder / "status.json").read_text())


# --- how it ends -----------------------------------------------------------------------------------------------------

SHORT = ["seeds=1", "problem.epochs=1", "problem.tasks=2"]
FAILING = """
import os, signal
if os.environ.get("RANK") == "1":
    from spolia.errors import SpoliaError
    from spolia.runs import engine
    def fails(*_):
        {how}
    engine._run = fails
"""


@pytest.mark.parametrize("recipe", ["merge/ties-tiny", "continual/apis-tiny", "link/llm_sc-tiny"])
def test_what_shares_no_work_says_so_before_any(recipe: str, tmp_path: Path) -> None:
    with pytest.raises(SpoliaError, match="2 processes have nothing to share"):
        spolia.run(recipe, tmp_path / "run", nproc=2)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("how", "told"),
    [
        (
            "raise SpoliaError('has no disk', where='machine 2', mend='mount it')",
            "machine 2: has no disk\n  mend: mount it",
        ),
        ("os.kill(os.getpid(), signal.SIGKILL)", "process 1 of 2 was ended by signal 9"),
    ],
)
def test_one_that_fails_ends_all_and_is_told(
    how: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(FAILING.format(how=how))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(SpoliaError) as error:
        spolia.run("continual/finetune-tiny", tmp_path / "run", overrides=SHORT, nproc=2)
    assert told in str(error.value)
    assert signal.getsignal(signal.SIGINT) is before


def test_interrupted_it_goes_on_with_another_number(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "spolia", "run", "continual/derpp-tiny", *SHORT, "-o", str(tmp_path / "run")]
    process = subprocess.Popen([*command, "--nproc", "2"], stderr=subprocess.PIPE, text=True)
    lines = tmp_path / "run" / "metrics.jsonl"
    while not (lines.exists() and len(lines.read_text().splitlines()) > 2):
        assert process.poll() is None, process.stderr and process.stderr.read()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    said = process.communicate()[1]
    assert process.returncode == 130 and status(tmp_path / "run")["state"] == "interrupted", said
    assert said.count("finishing this step") == said.count("Go on with") == 1 and "Traceback" not in said
    assert spolia.run("continual/derpp-tiny", tmp_path / "run", overrides=SHORT)
    whole = spolia.run("continual/derpp-tiny", tmp_path / "whole", overrides=SHORT)
    assert isinstance(whole, Path) and status(tmp_path / "run")["state"] == "done"
    one, other = (kept.load(folder / "result" / "learner.safetensors") for folder in (tmp_path / "run", whole))
    for name, tensor in other["network"].items():
        torch.testing.assert_close(one["network"][name], tensor, rtol=1e-3, atol=1e-5)  # sums of fp32 in another order


def torchrun(*arguments: str) -> subprocess.CompletedProcess[str]:
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    return subprocess.run(
        [*start, *arguments], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def test_torchrun_does_the_same_and_one_speaks(tmp_path: Path) -> None:
    done = torchrun("-m", "spolia", "run", "continual/finetune-tiny", *SHORT, "-o", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    assert status(tmp_path / "run")["state"] == "done" and done.stdout.count("report.html") == 1
    wrong = torchrun("-m", "spolia", "run", "continual/finetune-tiny", "method.lrr=1", "-o", str(tmp_path / "other"))
    assert wrong.returncode and wrong.stderr.count("did you mean") == 1 and not (tmp_path / "other").exists()
