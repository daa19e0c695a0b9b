"""One step of learning from inputs without labels: losses on a network's outputs, task by task, batch by batch.

Each forward pass has its graph to itself; gradients add up in the weights. Tasks with few inputs share a pass, for every
backward pass reads and writes a gradient as large as the model. Processes share a batch among them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.dist import summed, world
from spolia.core.divergence import kl
from spolia.core.lazy import np, torch
from spolia.core.outputs import cross_entropy, diversity, entropy, mean_distribution
from spolia.errors import Problems
from spolia.parts.combination import Combination
from spolia.parts.examples import Examples
from spolia.parts.network import Network
from spolia.parts.statistics import reestimated
from spolia.parts.watch import Watch

if TYPE_CHECKING:
    from torch import Tensor

_STATED = 512  # inputs of a task that running statistics are found on, at most
_PASS = 8  # inputs of a forward pass where nothing is said and a batch has no more: most of the gain, little memory


@dataclass(frozen=True)
class Teacher:
    """What a task's expert answers to the inputs that will be drawn: logits [inputs, ...], and the row of each place."""

    logits: Tensor
    row: np.ndarray


@dataclass(frozen=True)
class Batch:
    """Inputs of a task that a step looks at: their places, and the weight of their mean loss."""

    task: str
    places: np.ndarray
    weight: float = 1.0


@dataclass(frozen=True)
class _Part:
    """What a forward pass takes of a batch."""

    batch: Batch
    places: np.ndarray
    inputs: Any
    mean: Tensor | None  # the mean distribution of the whole batch


@dataclass(frozen=True)
class Objective:
    """The loss of a task. `settings` has objective, diversity, batch and micro_batch; see AdaMerging."""

    inputs: Mapping[str, Examples]
    settings: Any
    teachers: Mapping[str, Teacher]

    @property
    def uses_labels(self) -> bool:
        return self.settings.objective == "labels"

    def backward(self, network: Network, batches: Sequence[Batch]) -> dict[str, float]:
        """Add the gradient of every batch's mean loss, times its weight, to the weights. This process's part of the losses."""
        found = dict.fromkeys((batch.task for batch in batches), 0.0)
        for parts in self._passes(network, batches):
            outputs = network.joined([(part.batch.task, part.inputs) for part in parts])
            losses = [self._share(part, logits) for part, logits in zip(parts, outputs, strict=True)]
            torch.autograd.backward([loss * part.batch.weight for part, loss in zip(parts, losses, strict=True)])
            for part, loss in zip(parts, losses, strict=True):
                found[part.batch.task] += float(loss.detach())
        return found

    def losses(self, task: str, places: np.ndarray, logits: Tensor, mean: Tensor | None = None) -> Tensor:
        """Of every input [batch(, tokens)]. `mean`: the mean distribution of the whole batch, where this is a part of it."""
        kind = self.settings.objective
        if kind == "expert":
            teacher = self.teachers[task]
            rows = torch.from_numpy(teacher.row[places])
            return kl(logits, teacher.logits[rows].to(logits))
        if kind == "labels":
            return cross_entropy(logits, self.inputs[task].labels_at(places).to(logits.device))
        found = entropy(logits)
        if kind == "normalised_entropy":
            return found / math.log(max(logits.shape[-1], 2))
        if kind == "information":
            if mean is None:
                mean = mean_distribution(logits) * logits.shape[-1] / logits.numel()
            return found - self.settings.diversity * diversity(logits, mean)
        return found

    def everywhere(self, losses: dict[str, float], slopes: Tensor) -> tuple[dict[str, float], Tensor]:
        """Losses and gradients summed over the processes."""
        shared = summed(torch.tensor(list(losses.values()), dtype=torch.float64)).tolist()
        return dict(zip(losses, shared, strict=True)), summed(slopes)

    def _passes(self, network: Network, batches: Sequence[Batch]) -> Iterator[list[_Part]]:
        """All parts in their order, as many to a forward pass as may share it and have room."""
        together: list[_Part] = []
        for part in self._parts(network, batches):
            full = sum(len(other.places) for other in [*together, part]) > self._room
            if together and (full or not network.joins(together[0].inputs, part.inputs)):
                yield together
                together = []
            together.append(part)
        if together:
            yield together

    def _parts(self, network: Network, batches: Sequence[Batch]) -> Iterator[_Part]:
        """This process's share of every batch, in parts that a forward pass has room for."""
        rank, ranks = world()
        for batch in batches:
            chunks = _chunks(batch.places[rank::ranks], self._room)
            mean = None
            if self.settings.objective == "information" and (len(chunks) > 1 or ranks > 1):
                mean = self._mean(network, batch.task, chunks)
            for places in chunks:
                yield _Part(batch, places, self.inputs[batch.task].batch(places), mean)

    @property
    def _room(self) -> int:
        """Inputs of a forward pass, at most."""
        return self.settings.micro_batch or max(self.settings.batch, _PASS)

    def _share(self, part: _Part, logits: Tensor) -> Tensor:
        """What a part adds to the mean loss of its batch."""
        wide = logits if logits.dtype == torch.float64 else logits.float()
        losses = self.losses(part.batch.task, part.places, wide, part.mean)
        return losses.sum() / (len(part.batch.places) * losses[0].numel())

    def _mean(self, network: Network, task: str, chunks: list[np.ndarray]) -> Tensor:
        """The mean distribution over the whole batch, from a pass without graph: [classes], fp64."""
        with torch.no_grad():
            classes = network.logits(task, self.inputs[task].batch([0])).shape[-1]
            total = torch.zeros(classes, dtype=torch.float64)
            for chunk in chunks:
                total += mean_distribution(network.logits(task, self.inputs[task].batch(chunk))).cpu()
        total = summed(total)
        return (total / total.sum()).to(next(network.module.parameters()).device)


def check_inputs(network: Network, given: Mapping[str, Examples], labels: bool = False) -> None:
    """SpoliaError unless the network takes the inputs of every task, and labels are there where they are asked for."""
    network.check_tasks(list(given))
    problems = Problems()
    for task, examples in given.items():
        where = f"unlabelled.{task}"
        try:
            with torch.no_grad():
                logits = network.logits(task, examples.batch([0]))
        except Exception as error:  # whatever a user's module raises on inputs that are not its own
            said = " ".join(str(error).split())[:200]
            what = f"the network fails on its inputs: {type(error).__name__}: {said}"
            problems.add(where, what, "give inputs as the network takes them, and the head of that task")
            continue
        if logits.ndim < 2 or len(logits) != 1:
            what = f"one input gives outputs {list(logits.shape)}, not [1, classes]"
            problems.add(where, what, "give Network(outputs=...), a function that returns logits or features")
        elif labels and examples.labels is None:
            problems.add(where, "no labels are given", "give Examples(inputs, labels), or another `objective`")
        elif labels and int(examples.labels.max()) >= logits.shape[-1]:  # type: ignore[union-attr]
            what = f"label {int(examples.labels.max())}, but {logits.shape[-1]} classes"  # type: ignore[union-attr]
            problems.add(where, what, "number the classes from 0")
    problems.raise_if_any()


def consulted(
    combination: Combination, watch: Watch, inputs: Mapping[str, Examples], settings: Any, steps: int, seed: int
) -> dict[str, Teacher]:
    """Run every expert once: for the watch and, with the objective `expert`, on all inputs that will be drawn."""
    teachers = {}
    first = 1 if combination.pool.base is not None else 0
    for k, (task, examples) in enumerate(inputs.items()):
        combination.show(first + k)
        watch.ask(combination.network, task)
        if settings.objective == "expert":
            numbers = range(steps * settings.batches_per_step)
            drawn = [examples.drawn(settings.batch, seed, number) for number in numbers]
            places = np.unique(np.concatenate(drawn)) if drawn else np.empty(0, np.int64)
            row = np.full(len(examples), -1)
            row[places] = np.arange(len(places))
            with torch.no_grad():
                parts = [
                    combination.network.logits(task, examples.batch(p)).cpu() for p in _chunks(places, watch.batch)
                ]
            teachers[task] = Teacher(torch.cat(parts) if parts else torch.empty(0), row)
    combination.show(0)  # what no coefficient moves is the base's again
    return teachers


def restated(combination: Combination, inputs: Mapping[str, Examples], batch: int) -> None:
    """Set the running statistics to those of the weights at present, over inputs of all tasks."""
    rank, ranks = world()

    def batches() -> Iterator[Any]:
        for examples in inputs.values():
            parts = _chunks(np.arange(min(len(examples), _STATED)), max(batch, 2))
            for places in parts[rank::ranks]:
                yield examples.batch(places)

    combination.restate(reestimated(combination.network, batches()))


def _chunks(places: np.ndarray, size: int) -> list[np.ndarray]:
    return [places[i : i + size] for i in range(0, len(places), size)]
