"""What learners share that hold weights near earlier ones: anchors, importances, and a step that cannot overshoot.

    penalty = strength sum_i F_i (theta_i - theta*_i)^2        no half: a paper's lambda / 2 is the strength here

The penalty's own gradient step diverges where 2 lr strength F > 2. With plain SGD it is taken implicitly, which is exact for
the quadratic and never diverges (core.gradients.pull_implicitly); momentum and Adam get its gradient.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any, Literal

from spolia.core import gradients
from spolia.core.gradients import Kind, pull, pull_implicitly, share
from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.core.settings import setting
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.methods.continual.learner import OURS, Learner, Model, Training

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.stream import Experience

KINDS = Literal["auto", "true", "sampled", "empirical", "weighted", "batch"]
EXACT = 20  # classes up to which `auto` is the true Fisher
_LOT = 256  # examples taken from the stream at a time


class Anchoring(Training):
    """Settings of a quadratic penalty."""

    strength: float = setting(1.0, "of the penalty, without a half", source=OURS, ge=0)
    proximal: bool | None = setting(
        None, "the penalty's step taken implicitly; by default where the optimiser is plain SGD", source=OURS
    )


class Anchored(Learner):
    """`anchors` and `importance` are empty until the first experience has ended."""

    def __init__(self, model: nn.Module | Model, settings: Anchoring, *, seed: int = 0):
        super().__init__(model, settings, seed=seed)
        self.anchors: list[Tensor] = []
        self.importance: list[Tensor] = []
        self.proximal = self.plain if settings.proximal is None else settings.proximal
        if self.proximal and not self.plain:
            what = "an implicit step of the penalty goes with plain SGD only"
            raise SpoliaError(what, where="proximal", mend="leave `proximal` out, or use SGD without momentum")

    def descend(self, loss: Tensor) -> None:
        self.optimizer.zero_grad()
        loss.backward()
        share(self.parameters, 1 / self.ranks)
        self.penalised_step()

    def penalised_step(self) -> None:
        """The step from the gradients that are there, and the penalty's."""
        if not self.importance:
            self.step(shared=True)
            return
        if not self.proximal:
            pull(self.parameters, self.anchors, self.importance, self.strength)
        self.step(shared=True)
        if self.proximal:
            pull_implicitly(self.parameters, self.anchors, self.importance, self.lr * self.strength)

    @property
    def strength(self) -> float:
        return self.settings.strength

    def settle(self, importance: list[Tensor]) -> None:
        """From now on hold the weights where they are."""
        gradients.checked(dict(zip(self.names, importance, strict=True)), "importance")
        self.importance[:], self.anchors[:] = importance, self.copies()
        most = 2 * self.lr * self.strength * max(float(f.max()) for f in importance)
        if self.plain and not self.proximal and most > 2:
            what = f"2 lr strength F reaches {most:.3g}; above 2 the penalty's explicit step diverges"
            warnings.warn(f"{what}. Leave `proximal` out, or lower the strength.", SpoliaWarning, stacklevel=2)

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"anchors": self.anchors, "importance": self.importance}


def information(learner: Learner, experience: Experience, kind: str, samples: int | None) -> list[Tensor]:
    """The diagonal Fisher of the learner's weights on an experience: a mean over examples, as predicting sees them."""
    total, count = None, 0
    with learner.at_rest():
        for x, labels, draws in _lots(learner, experience, samples):
            chosen = _chosen(kind, learner, x)
            found = gradients.fisher(
                learner.logits_with, learner_weights(learner), x, kind=chosen, labels=labels, draws=draws
            )
            total = found if total is None else {name: total[name] + f for name, f in found.items()}
            count += len(labels)
    assert total is not None
    return [total[name].div_(count) for name in learner.names]


def sensitivity(learner: Learner, experience: Experience, samples: int | None) -> list[Tensor]:
    """The same for the mean of |d ||f(x)||^2 / d theta|."""
    total, count = None, 0
    with learner.at_rest():
        for x, labels, _ in _lots(learner, experience, samples):
            found = gradients.sensitivity(learner.logits_with, learner_weights(learner), x)
            total = found if total is None else {name: total[name] + f for name, f in found.items()}
            count += len(labels)
    assert total is not None
    return [total[name].div_(count) for name in learner.names]


def learner_weights(learner: Learner) -> dict[str, Tensor]:
    return dict(zip(learner.names, learner.parameters, strict=False))


def _lots(learner: Learner, experience: Experience, samples: int | None) -> Any:
    """Some examples of an experience, their labels, and a number for each, in lots."""
    draws = generator(learner.seed, "fisher", experience.place)
    places = draws.permutation(len(experience.train))[:samples]
    chances = torch.from_numpy(draws.random(len(places))).to(learner.device)
    for start in range(0, len(places), _LOT):
        own = slice(start, start + _LOT)
        batch = experience.batch(places[own])
        yield learner.shown(batch.x), batch.y.to(learner.device), chances[own]


def _chosen(kind: str, learner: Learner, x: Tensor) -> Kind:
    if kind != "auto":
        return kind  # type: ignore[return-value]
    with torch.no_grad():
        classes = learner.logits(x[:1]).shape[-1]
    return "true" if classes <= EXACT else "sampled"
