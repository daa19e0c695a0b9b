"""How fast a student learns: the optimiser, and its learning rate as a function of the step alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal

from pydantic import model_validator

from spolia.core.lazy import torch
from spolia.core.settings import Settings, setting

if TYPE_CHECKING:
    from torch import Tensor, nn

Factory = Callable[[list[dict[str, Any]]], Any]
"""Parameter groups (the student's; what a loss learns, without weight decay) to an optimiser of torch."""

RECIPE = "CIFAR-100 recipe of Tian et al., 2020, arXiv 1910.10699, and those after it"
_OURS = "ours"


class Pace(Settings):
    """Settings of the optimiser and its learning rate."""

    optimizer: Literal["sgd", "adamw"] = setting("sgd", "SGD with momentum, or AdamW", source=RECIPE)
    lr: float = setting(0.05, "learning rate before warm-up and decay", source=RECIPE, gt=0)
    momentum: float = setting(0.9, "of SGD", source=RECIPE, ge=0, lt=1)
    nesterov: bool = setting(False, "Nesterov's form of the momentum", source=RECIPE)
    weight_decay: float = setting(5e-4, "of the student's weights; what a loss learns has none", source=RECIPE, ge=0)
    schedule: Literal["step", "cosine", "linear", "constant"] = setting(
        "step", "how the learning rate falls after warm-up", source=RECIPE
    )
    milestones: tuple[float, ...] = setting(
        (150 / 240, 180 / 240, 210 / 240), "shares of all steps at which `step` falls", source=RECIPE
    )
    factor: float = setting(0.1, "what `step` multiplies with there", source=RECIPE, gt=0, le=1)
    floor: float = setting(0.0, "share of the learning rate that cosine and linear end at", source=_OURS, ge=0, le=1)
    warmup: int = setting(0, "first steps, in which the learning rate rises linearly", source=_OURS, unit="steps", ge=0)

    @model_validator(mode="after")
    def _fits(self) -> Pace:
        if self.nesterov and not self.momentum:
            raise ValueError("nesterov: needs a momentum above 0")
        return self


def rate(pace: Pace, step: int, steps: int) -> float:
    """What the learning rate is multiplied with at `step` of `steps`."""
    if step < pace.warmup:
        return (step + 1) / pace.warmup
    done = (step - pace.warmup) / max(1, steps - pace.warmup)
    match pace.schedule:
        case "cosine":
            return pace.floor + (1 - pace.floor) * (1 + math.cos(math.pi * done)) / 2
        case "linear":
            return pace.floor + (1 - pace.floor) * (1 - done)
        case "step":
            return pace.factor ** sum(step >= share * steps for share in pace.milestones)
    return 1.0


def optimiser(student: nn.Module, learned: Mapping[str, Tensor], pace: Pace, factory: Factory | None) -> Any:
    """Of the student's trainable parameters, and of what the loss learns in a group of its own."""
    groups: list[dict[str, Any]] = [{"params": [p for p in student.parameters() if p.requires_grad]}]
    if learned:
        groups.append({"params": list(learned.values()), "weight_decay": 0.0})
    if factory is not None:
        return factory(groups)
    if pace.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=pace.lr, weight_decay=pace.weight_decay)
    return torch.optim.SGD(
        groups, lr=pace.lr, momentum=pace.momentum, nesterov=pace.nesterov, weight_decay=pace.weight_decay
    )
