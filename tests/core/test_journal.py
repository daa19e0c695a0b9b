from __future__ import annotations

import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spolia.core import kept
from spolia.core.journal import Interrupted, Journal
from spolia.errors import SpoliaError

# --- the skeleton ----------------------------------------------------------------------------------------------------

PLAIN = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
KEYS = st.integers() | st.text(max_size=5) | st.booleans() | st.none() | st.tuples(st.integers(), st.text(max_size=3))
TENSORS = st.sampled_from(
    [
        torch.tensor(2.5), torch.arange(6).reshape(2, 3), torch.zeros(0, 4), torch.tensor([True, False]),
        torch.tensor([1.5, math.inf, math.nan], dtype=torch.bfloat16), torch.arange(12).reshape(3, 4).T,
        np.arange(3, dtype=np.uint32), np.float32(0.1), np.array(7, dtype=np.uint64),
    ]
)  # fmt: skip
VALUES = st.recursive(
    PLAIN | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3) | st.tuples(inner, inner) | st.just(())
    ),
    max_leaves=12,
)


def alike(a, b) -> bool:
    """Same types and same bits all the way down; NaN equals NaN, and 0.0 differs from -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        same = a.dtype == b.dtype and a.shape == b.shape
        return same and torch.equal(a.contiguous().reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))
    if isinstance(a, np.ndarray | np.generic):
        return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    if isinstance(a, dict):
        return len(a) == len(b) and all(
            alike(k, m) and alike(v, w) for (k, v), (m, w) in zip(a.items(), b.items(), strict=True)
        )
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(alike, a, b))
    return a == b


@given(VALUES)
def test_skeleton_round_trip_through_strict_json(value):
    tensors: dict[str, torch.Tensor] = {}
    text = json.dumps(kept.encode(value, tensors), allow_nan=False)
    assert alike(kept.decode(json.loads(text), tensors), value)


def test_file_round_trip_keeps_order_and_shared_memory_apart(tmp_path):
    weight = torch.randn(4, 4, generator=torch.Generator().manual_seed(0))
    value = {"tied": [weight, weight, weight[1:]], "z": 1, "a": {3: (1.0, -0.0, math.inf)}}
    kept.save(tmp_path / "x.safetensors", value)
    back = kept.load(tmp_path / "x.safetensors")
    assert alike(back, value)
    assert [f.name for f in tmp_path.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("value", [{1, 2}, b"x", object(), 1j, {"a": [{"b": {1}}]}, np.str_("a")])
def test_what_needs_pickle_is_refused_by_place(value):
    with pytest.raises(SpoliaError, match="without pickle"):
        kept.encode(value, {})


def test_every_flipped_byte_is_noticed(tmp_path):
    file = tmp_path / "x.safetensors"
    kept.save(file, {"w": torch.arange(8.0), "n": 3})
    good = file.read_bytes()
    rng = random.Random(0)
    for at in rng.sample(range(len(good)), 60):
        file.write_bytes(good[:at] + bytes([good[at] ^ 0x11]) + good[at + 1 :])
        with pytest.raises(kept.Damaged):
            kept.load(file)
    for size in (0, 4, len(good) // 2, len(good) - 1):
        file.write_bytes(good[:size])
        with pytest.raises(kept.Damaged):
            kept.load(file)


# --- loops -----------------------------------------------------------------------------------------------------------


class Problem:
    """A small training with every kind of state a loop may keep."""

    def __init__(self):
        self.draws = torch.Generator().manual_seed(1)
        self.shuffles = np.random.default_rng(2)
        self.model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        with torch.no_grad():
            for p in self.model.parameters():
                p.copy_(torch.randn(p.shape, generator=self.draws))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.05)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, 40)
        self.mean = torch.zeros(3)
        self.history: list[float] = []
        self.best = {"loss": math.inf, "at": (0, 0)}

    @property
    def keep(self):
        return {
            "model": self.model, "optimizer": self.optimizer, "schedule": self.schedule, "draws": self.draws,
            "shuffles": self.shuffles, "mean": self.mean, "history": self.history, "best": self.best,
        }  # fmt: skip

    def step(self, step: int) -> float:
        x = torch.randn(8, 3, generator=self.draws)[self.shuffles.permutation(8).copy()]
        loss = (self.model(x) - x.sum(1, keepdim=True)).square().mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        self.mean += x.mean(0)
        self.history.append(loss.item())
        if loss.item() < self.best["loss"]:
            self.best.update(loss=loss.item(), at=(step, 1))
        return loss.item()

    def train(self, journal: Journal, n: int = 40, stop_after: int | None = None) -> Problem:
        with journal.phase("train"):
            for step in journal.steps(n, keep=self.keep):
                journal.log(loss=self.step(step))
                if step == stop_after:
                    journal.request_stop()
        return self

    @property
    def state(self):
        return {name: kept.capture(name, value) for name, value in self.keep.items()}


def checkpoints(folder):
    return sorted(folder.rglob("step-*.safetensors"))


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_without_a_folder_a_plain_counter():
    journal = Journal()
    assert list(journal.steps(3)) == [0, 1, 2]
    for _ in journal.steps(2, keep={"draws": torch.Generator()}):
        journal.log(loss=1.0)
        assert list(journal.steps(2)) == [0, 1]  # a plain loop inside


@pytest.mark.parametrize("stop_after", [0, 7, 38])
def test_interrupted_and_resumed_equals_uninterrupted(tmp_path, stop_after):
    whole = Problem().train(Journal())
    with pytest.raises(Interrupted):
        Problem().train(Journal(tmp_path), stop_after=stop_after)
    assert kept.load(checkpoints(tmp_path)[-1])["done"] == stop_after + 1
    resumed = Problem().train(Journal(tmp_path))
    assert alike(resumed.state, whole.state)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(40))
    assert [line["loss"] for line in metrics(tmp_path)] == whole.history
    times = [line["time"] for line in metrics(tmp_path)]
    assert times == sorted(times)


def test_finished_loops_are_skipped_and_their_state_restored(tmp_path):
    whole = Problem().train(Journal(tmp_path))
    again, journal, seen = Problem(), Journal(tmp_path), []
    with journal.phase("train"):
        seen = list(journal.steps(40, keep=again.keep))
    assert seen == []
    assert alike(again.state, whole.state)


def test_metrics_of_steps_done_again_are_not_doubled(tmp_path):
    with pytest.raises(ZeroDivisionError):
        journal, problem = Journal(tmp_path, save_every=1e9), Problem()
        with journal.phase("train"):
            journal.log(start=1)
            for step in journal.steps(40, keep=problem.keep):
                journal.log(loss=problem.step(step))
                if step == 5:
                    raise ZeroDivisionError  # nothing saved so far: six lines will be written again
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 3, "pha')
    journal, problem = Journal(tmp_path), Problem()
    with journal.phase("train"):
        journal.log(start=1)
        for step in journal.steps(40, keep=problem.keep):
            journal.log(loss=problem.step(step))
    assert [line["step"] for line in metrics(tmp_path)] == [None, *range(40)]


def test_two_loops_of_one_phase_are_kept_apart(tmp_path):
    for _ in range(2):
        journal, counts = Journal(tmp_path), {"a": 0, "b": 0}
        for name in counts:
            box = {"count": 0}
            with journal.phase("same"):
                for _ in journal.steps(3 if name == "a" else 5, keep={"box": box}):
                    box["count"] += 1
                    journal.log(count=box["count"])
            counts[name] = box["count"]
        assert counts == {"a": 3, "b": 5}
    assert [line["phase"] for line in metrics(tmp_path)] == ["same"] * 3 + ["same (2)"] * 5


@pytest.mark.slow
def test_the_last_two_checkpoints_are_kept_and_a_damaged_one_is_passed_over(tmp_path):
    Problem().train(Journal(tmp_path, save_every=0))
    older, newest = checkpoints(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-100])
    (newest.parent / "step-00000040.safetensorsabc.part").write_bytes(b"half")
    journal, problem, seen = Journal(tmp_path), Problem(), []
    with journal.phase("train"):
        for step in journal.steps(40, keep=problem.keep):
            problem.step(step)
            seen.append(step)
    assert seen == [39]
    assert alike(problem.state, Problem().train(Journal()).state)
    assert {f.name for f in newest.parent.iterdir()} == {older.name, newest.name}


@pytest.mark.parametrize(
    ("n", "change", "match"),
    [
        (41, lambda keep: keep, "kept as a loop of 40 steps, now asked for 41"),
        (40, lambda keep: {k: v for k, v in keep.items() if k != "mean"}, "now asked to keep"),
        (40, lambda keep: keep | {"mean": [0.0]}, r"mean \(list\)"),
        (40, lambda keep: keep | {"mean": torch.zeros(4)}, "`mean` no longer fits"),
        (40, lambda keep: keep | {"model": torch.nn.Linear(2, 2)}, "`model` no longer fits"),
        (40, lambda keep: keep | {"mean": 3}, "cannot be restored in place"),
    ],
)
def test_a_changed_loop_is_refused(tmp_path, n, change, match):
    Problem().train(Journal(tmp_path))
    journal = Journal(tmp_path)
    with pytest.raises(SpoliaError, match=match) as error, journal.phase("train"):
        next(journal.steps(n, keep=change(Problem().keep)))
    assert error.value.problems[0].mend


def test_a_kept_loop_inside_another_is_refused(tmp_path):
    journal = Journal(tmp_path)
    with pytest.raises(SpoliaError, match="inside another"), journal.phase("outer"):
        for _ in journal.steps(2, keep={"a": []}):
            list(journal.steps(2, keep={"b": []}))
    assert list(journal.steps(2, keep={"b": []})) == [0, 1]  # the journal is usable afterwards


def test_progress_and_metrics_are_told(tmp_path):
    told = []
    journal = Journal(tmp_path, progress=lambda *args: told.append(args))
    with journal.phase("outer"), journal.phase("inner"):
        for _ in journal.steps(2):
            journal.log(loss=torch.tensor(1.5), bad=math.nan)
    assert [t[:3] for t in told] == [("outer / inner", 1, 2), ("outer / inner", 2, 2)]
    assert told[0][3]["loss"] == 1.5
    assert metrics(tmp_path)[1] | {"time": 0} == {
        "time": 0, "phase": "outer / inner", "step": 1, "loss": 1.5, "bad": None,
    }  # fmt: skip
    assert set(journal.seconds) == {"outer", "outer / inner"}


KILLED = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("problem", sys.argv[1])
module = importlib.util.module_from_spec(spec); spec.loader.exec_module(module)
from spolia.core.journal import Journal
print("ready", flush=True)
class Slow(module.Problem):
    def step(self, step):
        print(step, flush=True)
        return super().step(step)
Slow().train(Journal(sys.argv[2], save_every=0))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL")
def test_killed_at_any_step_and_run_again_gives_the_same_bits(tmp_path):
    whole = Problem().train(Journal())
    rng = random.Random(3)
    command = [sys.executable, "-c", KILLED, __file__, str(tmp_path)]
    for target in (rng.randrange(1, 15), rng.randrange(16, 36)):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for line in process.stdout:
                if line.strip() == str(target):
                    time.sleep(rng.random() * 0.01)  # anywhere inside a step or a save
                    process.send_signal(signal.SIGKILL)
                    break
        assert process.returncode == -signal.SIGKILL
    assert checkpoints(tmp_path)
    resumed = Problem().train(Journal(tmp_path))
    assert alike(resumed.state, whole.state)
    assert [line["loss"] for line in metrics(tmp_path)] == whole.history
