"""Metrics by hand, both rules from one run, and a run that is killed and goes on with the same bits."""

from __future__ import annotations

import json
import math
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spolia.bench import continual_scores as judge
from spolia.bench.continual import Protocol, run
from spolia.core.journal import Interrupted, Journal
from spolia.errors import SpoliaError
from spolia.methods.continual.derpp import DerPp, DerPpLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.refresh import Refresh, RefreshLearner
from spolia.parts.stream import Stream, class_incremental, domain_incremental

ORACLE = [[90.0, 0.0, 0.0], [70.0, 80.0, 0.0], [60.0, 75.0, 85.0]]


def blobs(each: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    centres = 3 * torch.randn(6, 5, generator=torch.Generator().manual_seed(99))
    y = torch.arange(6).repeat(each)
    return centres[y] + torch.randn(len(y), 5, generator=draws), y


@pytest.fixture(scope="module")
def stream() -> Stream:
    return class_incremental(blobs(12, 0), blobs(5, 1), tasks=3)


def network(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.2), nn.Tanh(), nn.Linear(8, 6))


class Told:
    """Answers that are made up: the label's logit is largest where `knows` says so, else that of another class."""

    def __init__(self, stream: Stream, knows):
        self.knows, self.at, self.stream = knows, -1, stream
        parts = [test.examples.batch(slice(None)) for test in stream.tests]
        self.labels = {tuple(x.tolist()): int(y) for part in parts for x, y in zip(*part, strict=True)}

    def begin(self, experience) -> None:
        self.at = experience.place

    def observe(self, batch) -> None:
        pass

    def end(self, experience) -> None:
        pass

    def predict(self, x: Tensor) -> Tensor:
        logits = torch.zeros(len(x), 6)
        for row, one in zip(logits, x, strict=True):
            self.knows(self.at, self.labels[tuple(one.tolist())], row)
        return logits


def test_metrics_by_hand() -> None:
    assert judge.average(ORACLE) == pytest.approx(220 / 3)
    assert judge.incremental_average(ORACLE) == pytest.approx((90 + 75 + 220 / 3) / 3)
    assert judge.backward_transfer(ORACLE) == -17.5
    assert judge.forgetting(ORACLE) == 17.5
    assert judge.forward_transfer([[9, 30.0, 0], [0, 0, 50.0], [0, 0, 0]], [7.0, 10.0, 20.0]) == 25.0
    assert judge.pooled(ORACLE, [10, 30, 20], 1) == pytest.approx((10 * 70 + 30 * 80) / 40)
    assert judge.harmonic(60.0, 30.0) == 40.0 and judge.harmonic(0.0, 0.0) == 0.0


def test_forgetting_may_be_negative_unless_clipped() -> None:
    better = [[50.0, 0.0], [60.0, 70.0]]
    assert judge.forgetting(better) == -10.0 and judge.forgetting(better, clip=True) == 0.0
    kept = [row[:] for row in better]
    assert kept == better  # nothing is padded or changed in place


def test_both_rules_come_from_the_same_answers(stream: Stream) -> None:
    """The label is always best of its own task; a class of the first task is above it once the second has come."""

    def knows(at: int, label: int, row: Tensor) -> None:
        row[label] = 1.0
        if at >= 1 and label >= 2:
            row[0] = 2.0

    outcome = run(Told(stream, knows), stream, Protocol(batch=8))
    assert outcome.task_matrix == [[100.0] * 3] * 3
    assert outcome.matrix == [[100.0, 0.0, 0.0], [100.0, 0.0, 0.0], [100.0, 0.0, 0.0]]
    assert outcome.numbers()["average"] == pytest.approx(100 / 3) and outcome.numbers()["task average"] == 100.0


def test_only_classes_seen_compete_unless_asked(stream: Stream) -> None:
    def knows(at: int, label: int, row: Tensor) -> None:
        row[label], row[5] = 1.0, 2.0

    seen, everything = (run(Told(stream, knows), stream, Protocol(batch=8, among=a)).matrix for a in ("seen", "all"))
    assert seen[0] == [100.0, 0.0, 0.0] and everything[0] == [0.0, 0.0, 50.0]


def test_an_answer_that_is_no_number_is_wrong(stream: Stream) -> None:
    def knows(at: int, label: int, row: Tensor) -> None:
        row[label] = 1.0
        row[(label + 1) % 2] = math.nan

    assert run(Told(stream, knows), stream, Protocol(batch=8)).matrix[2] == [0.0, 0.0, 0.0]


def test_few_shot_numbers(stream: Stream) -> None:
    few = class_incremental(blobs(12, 0), blobs(5, 1), tasks=[4, 1, 1], shots=3)

    def knows(at: int, label: int, row: Tensor) -> None:
        row[label if label < 4 or at < 2 else 0] = 1.0

    found = run(Told(few, knows), few, Protocol(batch=8)).fewshot()
    wanted = {"first": 100.0, "last": 100 * 20 / 30, "base": 100.0, "novel": 0.0, "harmonic": 0.0}
    wanted |= {"mean": (100 + 100 + 200 / 3) / 3, "performance drop": 100 / 3, "retention": 2 / 3}
    assert found == pytest.approx(wanted)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["class", "domain", "free"])
def test_every_scenario_runs(kind: str, stream: Stream) -> None:
    if kind == "domain":
        stream = domain_incremental(blobs(4, 0), blobs(2, 1), [None, lambda x: -x])
    elif kind == "free":
        stream = stream.without_boundaries(blur=0.2)
    outcome = run(FinetuneLearner(network(), Finetune()), stream, Protocol(batch=7))
    assert len(outcome.matrix) == len(stream.tests) and not any(math.isnan(a) for row in outcome.matrix for a in row)
    numbers = outcome.numbers()
    assert ("task average" in numbers) == (kind == "class") and ("forward transfer" in numbers) == (kind == "domain")
    assert outcome.stream["scenario"] == kind and outcome.seconds > 0 and outcome.held == 0


class Stopping(Journal):
    """Asks to stop before a given step."""

    def __init__(self, folder, at: int):
        super().__init__(folder, save_every=3600)
        self.at = at

    def steps(self, n, keep=None, *, shared=False) -> Iterator[int]:
        for step in super().steps(n, keep):
            if step == self.at:
                self.request_stop()
            yield step


@pytest.mark.parametrize("at", [0, 3, 9, 10, 17, 29])
def test_killed_at_a_step_it_goes_on_with_the_same_bits(at: int, stream: Stream, tmp_path) -> None:
    """Within an experience, at its end (10 steps each), at the last step; with replay, refresh, dropout and its noise."""

    def learner() -> RefreshLearner:
        return RefreshLearner(DerPpLearner(network(), DerPp(items=12, replay=5)), Refresh(temperature=0.1))

    protocol = Protocol(epochs=2, batch=5)
    whole = learner()
    wanted = run(whole, stream, protocol, seed=1)
    with pytest.raises(Interrupted):
        run(learner(), stream, protocol, Stopping(tmp_path, at), seed=1)
    again = learner()
    found = run(again, stream, protocol, tmp_path, seed=1)
    assert found.matrix == wanted.matrix and found.task_matrix == wanted.task_matrix
    assert found.baseline == wanted.baseline
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, again.parameters, strict=True))
    assert torch.equal(whole.inner.memory.all()["logits"], again.inner.memory.all()["logits"])


TOGETHER = """
import json, sys, torch
from torch import nn
from spolia.bench.continual import Protocol, run
from spolia.methods.continual.er import Er, ErLearner
from spolia.methods.continual.ewc import Ewc, EwcLearner
from spolia.parts.stream import class_incremental
draws = torch.Generator().manual_seed(0)
x, y = torch.randn(48, 5, generator=draws, dtype=torch.float64), torch.arange(48) % 4
stream, found = class_incremental((x, y), (x, y), 2), {}
for name in ("ewc", "er"):
    torch.manual_seed(0)
    network = nn.Linear(5, 4).double()
    learner = EwcLearner(network, Ewc(lr=0.1)) if name == "ewc" else ErLearner(network, Er(items=8, replay=4))
    run(learner, stream, Protocol(batch=8))
    found[name] = [network.weight.tolist(), learner.memory.capacity if name == "er" else 0]
open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same steps, but for the order of sums in fp64; each process has the whole memory."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    world = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", TOGETHER, str(tmp_path / str(r))], env={**os.environ, **world, "RANK": str(r)}
        )
        for r in range(2)
    ]
    assert [process.wait(timeout=110) for process in ranks] == [0, 0]
    monkeypatch.setattr(sys, "argv", ["alone", str(tmp_path / "one")])
    exec(TOGETHER, {})
    first, second, one = (json.loads((tmp_path / name).read_text()) for name in ("0", "1", "one"))
    assert first == second and first["er"][1] == one["er"][1] == 8
    for name in ("ewc", "er"):
        assert torch.allclose(
            torch.tensor(first[name][0]), torch.tensor(one[name][0]), rtol=0, atol=1e-6
        )  # read as fp32


def test_the_callers_random_state_is_left_alone(stream: Stream) -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    run(FinetuneLearner(network(), Finetune()), stream, Protocol(batch=8))
    assert torch.equal(before, torch.get_rng_state())


def test_answers_of_the_wrong_size_are_said(stream: Stream) -> None:
    learner = FinetuneLearner(nn.Linear(5, 4), Finetune())
    with pytest.raises(SpoliaError, match="one for each class of the stream"):
        run(learner, stream, Protocol(batch=8))


def test_a_kept_run_needs_a_learner_that_can_be_kept(stream: Stream, tmp_path) -> None:
    with pytest.raises(SpoliaError, match="learner"):
        run(Told(stream, lambda *_: None), stream, Protocol(batch=8), tmp_path)
