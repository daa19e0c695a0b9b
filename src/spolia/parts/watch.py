"""Watching a merge without labels: how often it says what each task's own expert says, on inputs kept apart for that.

Entropy may fall while answers get worse, so it is no yardstick. Agreement with the experts needs no labels either. It does
not see how sure an answer is: where probabilities count, as in a language model, the distance to the experts' does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING, Any

from spolia.core.dist import summed, world
from spolia.core.divergence import kl
from spolia.core.lazy import np, torch
from spolia.core.outputs import entropy, flatness, mean_distribution
from spolia.parts.examples import Examples
from spolia.parts.network import Network

if TYPE_CHECKING:
    from torch import Tensor

COLLAPSED = 0.5  # of log C: a mean distribution below it has forgotten classes (Yang et al.'s failure mode)
_MOST_CLASSES = 1000  # of which a histogram is told


@dataclass
class Watch:
    """The inputs kept apart, by task, and what the experts answer there."""

    held: Mapping[str, Examples]
    batch: int = 64  # inputs a forward pass
    answers: dict[str, Tensor] = field(default_factory=dict)  # classes [inputs(, tokens)] of each task's own expert
    flat: dict[str, float] = field(default_factory=dict)  # of the expert's mean distribution: 1 is even
    measures: bool = False  # whether the distance to the experts is looked at: their logits are kept then
    logits: dict[str, Tensor] = field(default_factory=dict)  # [inputs(, tokens), classes]

    @property
    def tasks(self) -> list[str]:
        """Those with something to look at."""
        return [task for task, examples in self.held.items() if len(examples)]

    def can(self, guard: str) -> bool:
        """Whether there is what the guard goes by: inputs, and labels for accuracy."""
        labelled = [self.held[task].labels is not None for task in self.tasks]
        return all(labelled) and bool(labelled) if guard == "accuracy" else bool(labelled)

    def ask(self, network: Network, task: str) -> None:
        """Note what `network`, now the task's expert, answers."""
        if not len(self.held[task]):
            return
        answers, means, kept = [], [], []
        for _, logits in self._passes(network, task, 0, 1):
            answers.append(logits.argmax(-1).cpu())
            means.append(mean_distribution(logits))
            kept += [logits.cpu()] if self.measures else []
        self.answers[task] = torch.cat(answers)
        if self.measures:
            self.logits[task] = torch.cat(kept)
        mean = torch.stack(means).sum(0)
        self.flat[task] = flatness(mean / mean.sum())

    def look(self, network: Network) -> dict[str, Any]:
        """What the network does now, as JSON: means over tasks, and by task entropy, agreement, accuracy, predictions."""
        tasks = {task: self._one(network, task) for task in self.tasks}
        seen: dict[str, Any] = {"tasks": tasks}
        for name in ("agreement", "entropy", "accuracy", "divergence"):
            values = [one[name] for one in tasks.values() if name in one]
            if values:
                seen[name] = fmean(values)
        return seen

    def collapsed(self, seen: Mapping[str, Any]) -> list[str]:
        """Tasks whose predictions have shrunk to few classes, though their expert finds many in the same inputs."""
        tasks = seen["tasks"]
        return [t for t, one in tasks.items() if one["flatness"] < COLLAPSED <= self.flat[t]]

    def _one(self, network: Network, task: str) -> dict[str, Any]:
        rank, ranks = world()
        totals = torch.zeros(5, dtype=torch.float64)  # predictions, agreeing, right, labelled, nats from the expert
        bits, mean, counts = torch.zeros(1, dtype=torch.float64), None, None
        for places, logits in self._passes(network, task, rank, ranks):
            classes = logits.argmax(-1).cpu()
            totals[0] += classes.numel()
            totals[1] += int((classes == self.answers[task][torch.from_numpy(places)]).sum())
            bits += float(entropy(logits.float()).sum(dtype=torch.float64))
            if self.held[task].labels is not None:
                labels = self.held[task].labels_at(places).cpu()
                totals[2] += int((classes == labels).sum())
                totals[3] += int((labels >= 0).sum())
            if self.measures:
                expert = self.logits[task][torch.from_numpy(places)].to(logits.device).float()
                totals[4] += float(kl(logits.float(), expert).sum(dtype=torch.float64))
            found = torch.bincount(classes.reshape(-1), minlength=logits.shape[-1]).double()
            mean = mean_distribution(logits) + (0 if mean is None else mean)
            counts = found + (0 if counts is None else counts)
        if mean is None or counts is None:  # fewer inputs than processes
            mean = counts = torch.zeros(self._classes(network, task), dtype=torch.float64)
        summed(totals), summed(bits)
        mean, counts = summed(mean.cpu()), summed(counts)
        number = float(totals[0])
        one = {
            "agreement": float(totals[1]) / number,
            "entropy": float(bits) / number,
            "flatness": flatness(mean / number),
        }
        if totals[3]:
            one["accuracy"] = float(totals[2] / totals[3])
        if self.measures:
            one["divergence"] = float(totals[4]) / number
        return one | ({"predicted": [int(c) for c in counts]} if len(counts) <= _MOST_CLASSES else {})

    def _classes(self, network: Network, task: str) -> int:
        with torch.no_grad():
            return network.logits(task, self.held[task].batch([0])).shape[-1]

    def _passes(self, network: Network, task: str, rank: int, ranks: int) -> Iterator[tuple[np.ndarray, Tensor]]:
        """Places and logits of this process's share of the inputs."""
        mine = np.arange(len(self.held[task]))[rank::ranks]
        with torch.no_grad():
            for start in range(0, len(mine), self.batch):
                places = mine[start : start + self.batch]
                yield places, network.logits(task, self.held[task].batch(places))


def better(new: Mapping[str, Any], old: Mapping[str, Any] | None, by: str) -> bool:
    """Whether `new` is to be kept instead of `old`: a better `by`, or as good with less entropy."""
    if old is None:
        return True
    sign = -1 if by == "divergence" else 1
    return (sign * new[by], -new["entropy"]) > (sign * old[by], -old["entropy"])


def told(examples: Mapping[str, Examples], held: Mapping[str, Examples]) -> dict[str, dict[str, int]]:
    """How many inputs of each task are adapted on and kept apart."""
    return {task: {"adapted on": len(part), "kept apart": len(held[task])} for task, part in examples.items()}


def seen_before(evaluation: Examples, others: Sequence[Examples]) -> int:
    """How many inputs of `evaluation` are, bit for bit, among `others`."""
    known = {print_ for examples in others for print_ in examples.prints()}
    return sum(print_ in known for print_ in evaluation.prints())
