"""How a learner on a stream is judged: one run, the accuracy matrix by two rules, what is made of it, and what it cost.

    outcome = run(learner, stream, Protocol(epochs=5, batch=10))
    outcome.numbers()                                # {"average": …, "forgetting": …, "task average": …, …}

R[i][j] is the accuracy in per cent on test j after experience i. Class-incremental: the largest logit of all classes seen;
task-incremental: of the test's own classes. Both come from the same answers of the same learner. All means are unweighted
over tests but `pooled`, which is correct answers over all.

Killed and run again with the same journal it goes on and ends with the same bits, if the learner's state_dict() holds what
changes. Batches follow from seed and step; a step's global random numbers (dropout) do too.
"""

from __future__ import annotations

import math
import os
import time
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, Literal

from spolia.bench.continual_scores import (
    average,
    backward_transfer,
    forgetting,
    forward_transfer,
    harmonic,
    incremental_average,
    pooled,
)
from spolia.core.dist import joined
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.seeds import entropy
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError
from spolia.parts.stream import Batch

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.bench.continual_scores import Matrix
    from spolia.methods.continual.learner import Meets
    from spolia.parts.stream import Experience, Stream

TABLES = "mammoth's tables"
OURS = "our choice"
_LOGGED = 50  # steps from one line of numbers to the next
_MOST = 1 << 63  # manual_seed takes no more


class Protocol(Settings):
    """How a stream is run. Batch sizes change what replay reaches: both are told with every result."""

    epochs: float = setting(1.0, "readings of each experience; a free stream is read once", source=TABLES, gt=0)
    batch: int = setting(32, "examples of a step", source=TABLES, ge=1)
    among: Literal["seen", "all"] = setting("seen", "classes that a class-incremental answer chooses from", source=OURS)
    ahead: bool = setting(True, "tests of later experiences too: forward transfer needs them", source=OURS)
    lot: int = setting(512, "test inputs at a time", source=OURS, ge=1)


@dataclass(frozen=True)
class Outcome:
    """What a run found. Accuracies in per cent; NaN where nothing was asked."""

    stream: dict[str, Any]
    protocol: Protocol
    matrix: list[list[float]]
    task_matrix: list[list[float]]
    baseline: list[float]  # of the untrained learner, class-incremental
    task_baseline: list[float]
    sizes: list[int]  # of the tests
    steps: int
    seconds: float  # of begin, observe and end
    held: int | None  # bytes that the learner keeps besides network and optimiser, where it says

    def numbers(self) -> dict[str, float]:
        """Every metric that the stream has; `task …` by the task-incremental rule."""
        found = self._by_rule(self.matrix, "")
        if self.stream["scenario"] == "class":
            found |= self._by_rule(self.task_matrix, "task ")
            if len(self.matrix) > 1 and self.protocol.ahead:
                found["task forward transfer"] = forward_transfer(self.task_matrix, self.task_baseline)
        elif self.stream["scenario"] == "domain" and len(self.matrix) > 1 and self.protocol.ahead:
            found["forward transfer"] = forward_transfer(self.matrix, self.baseline)
        found["milliseconds a step"] = 1000 * self.seconds / max(1, self.steps)
        return found if self.held is None else found | {"megabytes held": self.held / 1e6}

    def fewshot(self) -> dict[str, float]:
        """What few-shot class-incremental tables show, from pooled accuracies after each experience."""
        seen = [pooled(self.matrix, self.sizes, i) for i in range(len(self.matrix))]
        last = self.matrix[-1]
        novel = sum(n * a for n, a in zip(self.sizes[1:], last[1:], strict=True)) / max(1, sum(self.sizes[1:]))
        found = {"mean": fmean(seen), "first": seen[0], "last": seen[-1], "base": last[0], "novel": novel}
        found |= {"performance drop": seen[0] - seen[-1], "retention": seen[-1] / seen[0] if seen[0] else math.nan}
        return found | {"harmonic": harmonic(last[0], novel)}

    def _by_rule(self, matrix: Matrix, mark: str) -> dict[str, float]:
        found = {f"{mark}average": average(matrix)}
        if len(matrix) == len(self.sizes):
            found[f"{mark}incremental average"] = incremental_average(matrix)
            if len(matrix) > 1:
                found[f"{mark}backward transfer"] = backward_transfer(matrix)
                found[f"{mark}forgetting"] = forgetting(matrix)
        return found


# --- one run ---------------------------------------------------------------------------------------------------------


def run(
    learner: Meets,
    stream: Stream,
    protocol: Protocol | None = None,
    journal: Journal | str | os.PathLike[str] | None = None,
    seed: int = 0,
    phase: str = "stream",
) -> Outcome:
    """Lead the learner through the stream. A folder as `journal` is gone on from; the learner then needs state_dict().

    `phase`: what the journal calls it. Several learners in one journal need names of their own.
    """
    protocol = protocol or Protocol()
    with joined() as (rank, ranks), torch.random.fork_rng(_gpus(learner)):
        if not isinstance(journal, Journal):
            journal = Journal(None if journal is None else Path(journal), follow=rank > 0)
        course = _Course(learner, stream, protocol, seed, (rank, ranks))
        with journal.phase(phase):
            keep = (
                None if journal.folder is None else {"learner": learner, "found": course.found, "clock": course.clock}
            )
            for step in journal.steps(course.steps, keep, shared=True):
                loss = course.move(step)
                if step % _LOGGED == 0 or step in course.looks:
                    journal.log(**course.said(step, loss))
    return course.outcome()


class _Course:
    """A stream as one loop of steps, and what was found on the way."""

    def __init__(self, learner: Any, stream: Stream, protocol: Protocol, seed: int, process: tuple[int, int]):
        self.learner, self.stream, self.protocol, self.seed = learner, stream, protocol, seed
        self.rank, self.ranks = process
        self.gpus = _gpus(learner)
        counts = [e.steps(protocol.batch, protocol.epochs) for e in stream.experiences]
        self.ends = list(accumulate(counts))
        self.steps = self.ends[-1]
        rows, tests = len(stream.experiences), len(stream.tests)
        self.looks = {end - 1: i for i, end in enumerate(self.ends)}  # steps after which a row is filled
        if stream.scenario == "free":
            rows = tests
            self.looks = {math.ceil(self.steps * (i + 1) / rows) - 1: i for i in range(rows)}
            if len(self.looks) < rows:
                what = f"{self.steps} steps, and {rows} looks at the tests"
                raise SpoliaError(what, where="batch", mend="give a smaller batch")
        self.found = {
            "matrix": torch.full((rows, tests), math.nan, dtype=torch.float64),
            "task matrix": torch.full((rows, tests), math.nan, dtype=torch.float64),
            "baseline": torch.full((2, tests), math.nan, dtype=torch.float64),
        }
        self.clock = {"seconds": 0.0}

    def move(self, step: int) -> Any:
        """One step; around it what begins and ends an experience."""
        t = bisect_right(self.ends, step)
        experience, at = self.stream.experiences[t], step - (self.ends[t - 1] if t else 0)
        if step == 0:
            self.found["baseline"] = torch.stack(self._tested(experience, True))
        self._seed(step)
        batch = experience.draw(self.protocol.batch, self.seed, at)
        start = time.perf_counter()
        if at == 0:
            self.learner.begin(experience)
        loss = self.learner.observe(batch)
        if step + 1 == self.ends[t]:
            self.learner.end(experience)
        if step in self.looks and torch.cuda.is_available():
            torch.cuda.synchronize()
        self.clock["seconds"] += time.perf_counter() - start
        if step in self.looks:
            rows = self._tested(experience, self.protocol.ahead)
            for name, row in zip(("matrix", "task matrix"), rows, strict=True):
                self.found[name][self.looks[step]] = row
        return loss

    def _seed(self, step: int) -> None:
        """Global random numbers, such as dropout's, follow from the step. torch.manual_seed would cost more than a draw."""
        number = entropy(self.seed, "step", step, self.rank) % _MOST
        torch.default_generator.manual_seed(number)
        for gpu in self.gpus:
            torch.cuda.default_generators[gpu].manual_seed(number)

    def said(self, step: int, loss: Any) -> dict[str, Any]:
        """Numbers for the journal."""
        numbers = {} if loss is None else {"loss": loss}
        if step in self.looks:
            row = self.found["matrix"][self.looks[step]]
            numbers |= {f"accuracy {test.name}": a for test, a in zip(self.stream.tests, row.tolist(), strict=True)}
        return numbers

    def outcome(self) -> Outcome:
        matrix, tasks, baseline = (self.found[name].tolist() for name in ("matrix", "task matrix", "baseline"))
        sizes, about = [len(test.examples) for test in self.stream.tests], self.stream.about()
        held = getattr(self.learner, "held", None)
        return Outcome(
            about,
            self.protocol,
            matrix,
            tasks,
            baseline[0],
            baseline[1],
            sizes,
            self.steps,
            self.clock["seconds"],
            held,
        )

    def _tested(self, experience: Experience, ahead: bool) -> tuple[Tensor, Tensor]:
        """Accuracies on all tests by both rules, in per cent."""
        seen = sorted({c for e in self.stream.experiences[: experience.place + 1] for c in e.classes})
        among = seen if self.protocol.among == "seen" else list(range(self.stream.classes))
        rows = torch.full((2, len(self.stream.tests)), math.nan, dtype=torch.float64)
        last = len(self.stream.tests) if ahead or experience.task is None else experience.place + 1
        for j, test in enumerate(self.stream.tests[:last]):
            right = [0, 0]
            for start in range(0, len(test.examples), self.protocol.lot):
                batch = test.examples.batch(slice(start, start + self.protocol.lot))
                logits = self.learner.predict(batch.x)
                self._check(logits, batch)
                labels = batch.y.to(logits.device)
                for rule, classes in enumerate((among, list(test.classes))):
                    right[rule] += _right(logits, labels, classes)
            rows[:, j] = 100 * torch.tensor(right, dtype=torch.float64) / len(test.examples)
        return rows[0], rows[1]

    def _check(self, logits: Tensor, batch: Batch) -> None:
        if logits.dim() != 2 or len(logits) != len(batch.y) or logits.shape[1] < self.stream.classes:
            what = f"{list(logits.shape)} for {len(batch.y)} inputs and {self.stream.classes} classes"
            mend = "return logits [n, classes]: one for each class of the stream, from the start"
            raise SpoliaError(what, where="predict", mend=mend)


def _right(logits: Tensor, labels: Tensor, classes: list[int]) -> int:
    """How many labels are the largest of the logits of `classes`. A row with a NaN counts as wrong; nothing is changed."""
    own = torch.tensor(classes, device=logits.device)
    some = logits.index_select(1, own)
    return int(((own[some.argmax(1)] == labels) & ~some.isnan().any(1)).sum())


def _gpus(learner: Any) -> list[int]:
    """CUDA devices whose random state has to be put back."""
    network = getattr(learner, "network", None)
    devices = [] if network is None else [p.device for p in network.parameters() if p.device.type == "cuda"]
    return sorted({device.index or 0 for device in devices})
