"""Learners of prompts in two processes, and killed inside the base session."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from spolia.bench.continual import Protocol, run
from spolia.core.journal import Interrupted, Journal
from spolia.methods.continual.asp import Asp, AspLearner
from spolia.parts.encoder import Encoder
from spolia.parts.stream import Stream, class_incremental
from spolia.zoo.vit import ViT

TOGETHER = """
import json, sys, torch
from spolia.bench.continual import Protocol, run
from spolia.methods.continual.asp import Asp, AspLearner
from spolia.methods.continual.l2p import L2p, L2pLearner
from spolia.parts.encoder import Encoder
from spolia.parts.stream import class_incremental
from spolia.zoo.vit import ViT
x, y = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 4
stream, found = class_incremental((x, y), (x, y), tasks=[2, 1, 1], shots=4), {}
encoder = Encoder(ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0)))
for name in ("l2p", "asp"):
    learner = L2pLearner(encoder, L2p(optimizer="sgd", lr=0.1), classes=4)
    learner = AspLearner(encoder, Asp(hidden=4, readings=2), classes=4) if name == "asp" else learner
    run(learner, stream, Protocol(epochs=2, batch=8))
    found[name] = torch.cat([t.detach().flatten() for t in [*learner.parameters, learner.prototypes.means]]).tolist()
open(sys.argv[1], "w").write(json.dumps(found))
"""


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also asp, whose noise is drawn for the whole batch."""
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
    assert first == second
    for name in ("l2p", "asp"):
        assert torch.allclose(torch.tensor(first[name]), torch.tensor(one[name]), rtol=1e-4, atol=1e-5)  # sums in fp32


def sessions() -> Stream:
    x, y = torch.randn(40, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 4
    return class_incremental((x, y), (x, y), tasks=[2, 1, 1], shots=4)


class Stopping(Journal):
    """Asks to stop after so many lines of numbers."""

    def __init__(self, folder: Path, after: int):
        super().__init__(folder)
        self.after = after

    def log(self, **numbers: object) -> None:
        super().log(**numbers)  # type: ignore[arg-type]
        self.after -= 1
        if self.after < 0:
            self.request_stop()


@pytest.mark.slow
def test_killed_in_a_session_it_goes_on_to_the_bit(tmp_path: Path) -> None:
    stream = sessions()

    def learner() -> AspLearner:
        encoder = Encoder(ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0)))
        return AspLearner(encoder, Asp(hidden=4, readings=2), classes=4, base=stream.experiences[0].train)

    protocol, whole = Protocol(epochs=2, batch=8), learner()
    wanted = run(whole, stream, protocol)
    for after in (0, 1):  # before the second step, and after the base session
        with pytest.raises(Interrupted):
            run(learner(), stream, protocol, Stopping(tmp_path / str(after), after))
        again = learner()
        found = run(again, stream, protocol, tmp_path / str(after))
        assert found.matrix == wanted.matrix
        x = stream.tests[0].examples.batch(slice(None)).x
        assert torch.equal(again.predict(x), whole.predict(x)) and torch.equal(again.state["mean"], whole.state["mean"])
