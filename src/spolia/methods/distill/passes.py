"""One batch through student and teacher: outputs side by side, targets, and the loss of every example or token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spolia.core.divergence import cross_entropy
from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError
from spolia.methods.distill.batches import Batch
from spolia.methods.distill.objective import Objective, Outputs
from spolia.parts.taps import tapped
from spolia.parts.teacher import CachedTeacher, Teachers

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.network import Outputs as Function

Augment = Callable[[Any, np.random.Generator], Any]
"""Inputs of a batch and a generator to a view of them."""

IGNORED = -100  # a target that counts as nothing


@dataclass(frozen=True)
class Passes:
    """How a batch is run. `tokens`: logits of position i are held against token i + 1, else against the batch's labels."""

    teacher: Teachers | CachedTeacher
    objective: Objective
    outputs: Function
    device: torch.device
    tokens: bool = False
    pad: int | None = None  # a token that is no target
    rest_as_class: bool = False  # how logits that a cache did not keep are read
    precision: str = "fp32"

    def targets(self, batch: Batch) -> Tensor | None:
        """What the logits are held against: int64 [batch] or [batch, length - 1]; IGNORED counts as nothing."""
        if not self.tokens:
            return batch.labels
        ids = self._ids(batch)
        found = (ids if batch.labels is None else batch.labels)[:, 1:]
        if self.pad is not None:
            found = found.masked_fill(ids[:, 1:] == self.pad, IGNORED)
        mask = batch.inputs.get("attention_mask") if isinstance(batch.inputs, dict) else None
        return found if mask is None else found.masked_fill(mask[:, 1:] == 0, IGNORED)

    def logits(self, student: nn.Module, batch: Batch) -> Tensor:
        """The student's logits for `targets`, in the precision trained in."""
        with self._autocast():
            return self._cut(self.outputs(student, batch.inputs))

    def asked(self, batch: Batch) -> Tensor:
        """The teacher's logits for `targets`, on the student's device."""
        with self._autocast():
            return self._cut(self.teacher(batch.inputs).to(self.device))

    def both(self, student: nn.Module, views: Sequence[Batch]) -> tuple[Outputs, Outputs]:
        """Outputs of both for one batch in one or more views, these [views, ...]."""
        pairs = [(self._student(student, view), self._teacher(view)) for view in views]
        if len(pairs) == 1:
            return pairs[0]
        ours, theirs = (torch.stack([pair[side].logits for pair in pairs]) for side in (0, 1))
        return Outputs(ours), Outputs(theirs)

    def losses(self, student: nn.Module, views: Sequence[Batch], progress: float) -> dict[str, Tensor]:
        """The terms of the loss by name, each [(views,) batch, ...] and 0 where a target is ignored."""
        targets = self.targets(views[0])
        if self.rest_as_class:
            return self._beside(student, views[0], targets, progress)
        ours, theirs = self.both(student, views)
        return self.objective.parts(ours, theirs, targets, progress)

    def _beside(self, student: nn.Module, batch: Batch, targets: Tensor | None, progress: float) -> dict[str, Tensor]:
        """Cross-entropy over all classes, the teacher's terms over those it was kept for and one that stands for the rest."""
        assert isinstance(self.teacher, CachedTeacher)
        with self._autocast():
            logits = self.outputs(student, batch.inputs).float()
        ours, theirs = (self._cut(part) for part in self.teacher.beside(batch.inputs, logits))
        hidden = None if targets is None else targets.clamp(IGNORED, 0)  # which places count, and no class
        terms = replace(self.objective, ce=0.0).parts(Outputs(ours), Outputs(theirs), hidden, progress)
        if not self.objective.ce or targets is None:
            return terms
        return {"ce": self.objective.ce * cross_entropy(self._cut(logits), targets)} | terms

    def _student(self, student: nn.Module, batch: Batch) -> Outputs:
        names = [ours for ours, _ in self.objective.taps]
        with self._autocast(), tapped(student, names) as read:
            return Outputs(self._cut(self.outputs(student, batch.inputs)), tuple(read()))

    def _teacher(self, batch: Batch) -> Outputs:
        names = [theirs for _, theirs in self.objective.taps]
        if not names:
            return Outputs(self.asked(batch))
        assert isinstance(self.teacher, Teachers)
        with tapped(self.teacher.models[0], names) as read:
            return Outputs(self.asked(batch), tuple(feature.to(self.device) for feature in read()))

    def _cut(self, logits: Tensor) -> Tensor:
        return logits[:, :-1] if self.tokens else logits

    def _ids(self, batch: Batch) -> Tensor:
        ids = batch.inputs["input_ids"] if isinstance(batch.inputs, dict) else batch.inputs
        if not torch.is_tensor(ids) or ids.dim() != 2 or ids.is_floating_point():
            mend = "give token ids [batch, length], bare or as `input_ids`; or task: classes"
            raise SpoliaError("the inputs are no token ids", where="loader", mend=mend)
        return ids

    def _autocast(self) -> Any:
        dtype = torch.float16 if self.precision == "fp16" else torch.bfloat16
        return torch.autocast(self.device.type, dtype, enabled=self.precision != "fp32")


def views_of(batch: Batch, augment: Sequence[Augment], draws: np.random.Generator) -> list[Batch]:
    """The batch as it is shown to both: as it is, or once through each of `augment`."""
    return [replace(batch, inputs=view(batch.inputs, draws)) for view in augment] or [batch]
