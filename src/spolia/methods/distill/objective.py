"""Objective: what a student is trained to. One call gives the loss of every sample, whatever the method.

    objective = kd(Kd(temperature=4))                        # every method of this room makes one from its Settings
    loss = mean(objective(student_logits, teacher_logits, labels), labels)

Logits are [..., C]; all leading axes are samples, the loss is [...]. Labels are class numbers [...]; where one is below 0
(-100) the whole loss of that sample is 0, and `core.divergence.mean` does not count it. Without labels there is no
cross-entropy. The teacher gets no gradient. Autocast is switched off inside: half precision is computed in fp32.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, NamedTuple

from spolia.core.divergence import check_labels, check_pair, cross_entropy, wide
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


class Outputs(NamedTuple):
    """What a network makes of a batch: logits [..., C], and the features that the objective's taps name, in order."""

    logits: Tensor
    features: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Seen:
    """What a term is computed from: logits in fp32 or wider, nothing of the teacher's in the graph."""

    student: Outputs
    teacher: Outputs
    labels: Tensor | None
    progress: float  # share of the training that is done
    learned: Mapping[str, Tensor]

    @property
    def kept(self) -> Tensor | None:
        """Which samples count [...]; None for all."""
        return None if self.labels is None else self.labels >= 0

    def among(self, relate: Callable[[Tensor, Tensor], Tensor], student: Tensor, teacher: Tensor) -> Tensor:
        """`relate` on the samples that count, [n, d] each -> [n] or a scalar for all of them; 0 for the others: [...]."""
        shape = self.student.logits.shape[:-1]
        student, teacher = student.reshape(shape.numel(), -1), teacher.reshape(shape.numel(), -1)
        if self.kept is None:
            return relate(student, teacher).expand(shape.numel()).reshape(shape)
        places = self.kept.flatten().nonzero().squeeze(-1)
        losses = relate(student[places], teacher[places]).expand(len(places))
        return losses.new_zeros(shape.numel()).index_copy(0, places, losses).reshape(shape)


Terms = Callable[[Seen], dict[str, "Tensor"]]
Begin = Callable[[Outputs, Outputs, int], dict[str, "Tensor"]]


@dataclass(frozen=True)
class Objective:
    """Weighted terms of a loss, and what they need of a training loop.

    `terms` gives them by name, without cross-entropy, whose weight is `ce`. `taps`: (student's module, teacher's module)
    whose outputs are asked for as features. `views`: 2 where logits are [2, ..., C], a weak and a strong view of the same
    inputs. `learned`: tensors trained together with the student, made by `begun` where sizes must be known first.
    """

    terms: Terms
    ce: float = 0.0
    labelled: bool = False  # its own terms need labels
    taps: tuple[tuple[str, str], ...] = ()
    views: int = 1
    learned: Mapping[str, Tensor] = field(default_factory=dict)
    begin: Begin | None = None

    def __call__(
        self,
        student: Tensor | Outputs,
        teacher: Tensor | Outputs,
        labels: Tensor | None = None,
        progress: float = 1.0,
    ) -> Tensor:
        """The loss of every sample [...]. `progress`, from 0 to 1, is what schedules go by; at 1 they have ended."""
        return torch.stack(list(self.parts(student, teacher, labels, progress).values())).sum(0)

    def parts(
        self,
        student: Tensor | Outputs,
        teacher: Tensor | Outputs,
        labels: Tensor | None = None,
        progress: float = 1.0,
    ) -> dict[str, Tensor]:
        """The same by name, cross-entropy first: weighted, [...] each."""
        seen = self._seen(_outputs(student), _outputs(teacher), labels, progress)
        shape = seen.student.logits.shape[:-1]
        with torch.autocast(seen.student.logits.device.type, enabled=False):
            found = {}
            if seen.labels is not None and self.ce:
                found["ce"] = self.ce * cross_entropy(seen.student.logits, seen.labels)
            found |= {name: _spread(term, shape) for name, term in self.terms(seen).items()}
        if seen.kept is None:
            return found
        return {name: term.masked_fill(~seen.kept, 0.0) for name, term in found.items()}

    def plus(self, name: str, term: Callable[[Seen], Tensor]) -> Objective:
        """With one more term of its own, already weighted."""
        return replace(self, terms=lambda seen: self.terms(seen) | {name: term(seen)})

    def begun(self, student: Tensor | Outputs, teacher: Tensor | Outputs, seed: int = 0) -> Objective:
        """Ready to be trained, given the outputs of one batch: with all of `learned`. Call it before the optimiser is made."""
        if self.begin is None:
            return self
        with torch.no_grad():
            made = self.begin(_outputs(student), _outputs(teacher), seed)
        return replace(self, learned={**self.learned, **made}, begin=None)

    def to(self, device: torch.device | str) -> Objective:
        """With `learned` on `device`; the same tensors, moved."""
        for tensor in self.learned.values():
            tensor.data = tensor.data.to(device)
        return self

    def _seen(self, student: Outputs, teacher: Outputs, labels: Tensor | None, progress: float) -> Seen:
        """What the terms see, after everything that can be wrong with it."""
        check_pair(student.logits, teacher.logits)
        if self.begin is not None:
            mend = "objective = objective.begun(student outputs, teacher outputs)"
            raise SpoliaError("what is learned with the student has not been made", where="objective", mend=mend)
        if not 0 <= progress <= 1:
            raise SpoliaError(f"progress is {progress:g}", where="objective", mend="the share of training done, 0 to 1")
        if self.views > 1 and (student.logits.dim() < 3 or len(student.logits) != self.views):
            what = f"logits are {list(student.logits.shape)}"
            raise SpoliaError(what, where="objective", mend="stack both views of the same inputs: [2, ..., classes]")
        if labels is not None and self.views > 1 and labels.shape == student.logits.shape[1:-1]:
            labels = labels.expand(student.logits.shape[:-1])
        if labels is not None:
            check_labels(student.logits, labels)
        elif self.labelled:
            raise SpoliaError("this loss needs labels", where="labels", mend="objective(student, teacher, labels)")
        self._check_features(student, teacher)
        ours = Outputs(wide(student.logits), student.features)
        theirs = Outputs(wide(teacher.logits).detach(), tuple(f.detach() for f in teacher.features))
        return Seen(ours, theirs, labels, progress, self.learned)

    def _check_features(self, student: Outputs, teacher: Outputs) -> None:
        for owner, given, place in (("student", student, 0), ("teacher", teacher, 1)):
            if len(given.features) != len(self.taps):
                names = ", ".join(tap[place] for tap in self.taps) or "none"
                what = f"{len(given.features)} features of the {owner}; asked for: {names}"
                mend = "give Outputs(logits, features), the features as parts.taps.tapped reads them"
                raise SpoliaError(what, where="objective", mend=mend)


def _outputs(given: Tensor | Outputs) -> Outputs:
    return given if isinstance(given, Outputs) else Outputs(given)


def _spread(term: Tensor, shape: torch.Size) -> Tensor:
    """A term for all samples [...]: of fewer axes, such as one number an image, repeated; of more, their mean."""
    if term.dim() > len(shape):
        term = term.flatten(len(shape)).mean(-1)
    if term.shape != shape[: term.dim()]:
        what = f"features of samples {list(term.shape)}, logits of samples {list(shape)}"
        raise SpoliaError(what, where="objective", mend="features and logits of one forward pass have the same samples")
    return term.reshape([*term.shape, *[1] * (len(shape) - term.dim())]).expand(shape)
