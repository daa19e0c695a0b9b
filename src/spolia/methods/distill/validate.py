"""How a student does on examples kept apart for that, over all processes together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from spolia.core.dist import summed, world
from spolia.core.lazy import torch
from spolia.methods.distill.batches import Batch, Loader, Places
from spolia.methods.distill.passes import Passes

if TYPE_CHECKING:
    from torch import Tensor, nn


class Validation:
    """`look` gives `loss` (nats) and `accuracy` by example or token; where there are no labels the teacher's answers
    stand for them, found once, and the second is called `agreement`.
    """

    def __init__(self, source: Places | Loader, passes: Passes):
        self.source, self.passes = source, passes
        self.metric = "accuracy"
        self._answers: dict[int, Tensor] = {}  # by number of the batch

    def ask(self) -> None:
        """Note the teacher's answers where there are no labels."""
        if self.passes.targets(self.source.first()) is not None:
            return
        with torch.no_grad():
            for number, batch in self._mine():
                self._answers[number] = self.passes.asked(batch.to(self.passes.device)).argmax(-1)
        self.metric = "agreement"

    def look(self, student: nn.Module) -> dict[str, float]:
        """The student is put to eval mode for it and back."""
        totals = torch.zeros(3, dtype=torch.float64)  # nats, right, counted
        mode = student.training
        student.eval()
        with torch.no_grad():
            for number, batch in self._mine():
                totals += self._one(student, batch, number)
        student.train(mode)
        nats, right, counted = summed(totals).tolist()
        if not counted:
            return {"loss": float("nan"), self.metric: float("nan")}
        return {"loss": nats / counted, self.metric: right / counted}

    def _mine(self) -> Iterator[tuple[int, Batch]]:
        """This process's share of the batches, by number."""
        rank, ranks = world()
        for number, batch in enumerate(self.source.once()):
            if number % ranks == rank or self.source.shared:
                yield number, batch

    def _one(self, student: nn.Module, batch: Batch, number: int) -> Tensor:
        batch = batch.to(self.passes.device)
        logits = self.passes.logits(student, batch).float()
        targets = self._answers[number] if self._answers else self.passes.targets(batch)
        assert targets is not None
        counted = targets >= 0
        losses = torch.nn.functional.cross_entropy(logits[counted], targets[counted], reduction="none")
        right = logits[counted].argmax(-1) == targets[counted]
        return torch.stack([losses.double().sum(), right.sum().double(), counted.sum().double()]).cpu()


def better(new: dict[str, float], old: dict[str, float] | None, by: str) -> bool:
    """Whether `new` is higher in `by`, lower where that is the loss. What is not a number is never better."""
    if new[by] != new[by]:
        return False
    if old is None or old[by] != old[by]:
        return True
    return new[by] < old[by] if by == "loss" else new[by] > old[by]
