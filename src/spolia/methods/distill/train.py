"""Distilling: trains a student on a teacher's logits, with any loss of this room, for classes or for the next token.

For whoever holds a large model and inputs, and wants a small one. Hinton, Vinyals, Dean, Distilling the knowledge in a neural
network, 2015, arXiv 1503.02531; the loop and its defaults are those of the CIFAR-100 recipe named below.

    theta <- theta - lr(step) update( grad_theta  1/N sum_i loss(student(x_i; theta), teacher(x_i), y_i) )

| usual name | here |
|---|---|
| the loss, with its weights | `objective`: what `kd`, `dkd`, `rkkd` … make; its share of training done is step / steps |
| N | all examples, or counted tokens, of a step: over micro batches, accumulated batches and processes together |
| epoch | one reading of the data; all that is not an epoch is in steps |
| last, best | the step trained last; the one that did best on `validation`, which is returned |

Data touched: inputs, labels where the loss asks for them; `validation` alone chooses the step. Nothing is tested here.

The weights are the same bits after a kill: batches, dropout and views follow from seed and step, all else is kept in the
journal. Micro batches and processes add up to the gradient of the whole batch, but for what looks at a batch as a whole: batch
normalisation (running statistics are averaged over processes) and losses between examples (dist, rkd, mlkd).

Departures from common trainers: the step that did best on a validation split is returned, never on the test; a loss that is
no number ends the run.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from spolia.core.dist import joined
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.distill.batches import source
from spolia.methods.distill.checks import checked
from spolia.methods.distill.kd import kd
from spolia.methods.distill.objective import Objective
from spolia.methods.distill.passes import Augment, Passes
from spolia.methods.distill.run import Evaluate, Run
from spolia.methods.distill.schedule import RECIPE, Factory, Pace
from spolia.parts.network import outputs_of
from spolia.parts.teacher import Teachers

if TYPE_CHECKING:
    from torch import nn

    from spolia.parts.network import Outputs

_OURS = "ours"


class Training(Pace):
    """Settings of `distill`; those of the loss are the loss's own."""

    epochs: float = setting(240, "readings of the data", source=RECIPE, gt=0)
    steps: int | None = setting(None, "steps instead of epochs", source=_OURS, ge=1)
    batch: int = setting(64, "inputs of a batch, where the data comes without batches", source=RECIPE, ge=1)
    accumulate: int = setting(1, "batches of a step", source=_OURS, ge=1)
    micro_batch: int | Literal["auto"] | None = setting(
        None,
        "inputs of a forward pass, at most; by default the batch; auto: that, and halves where memory runs out",
        source=_OURS,
    )
    task: Literal["classes", "tokens"] = setting(
        "classes", "logits against the labels, or position i against token i + 1", source=_OURS
    )
    pad: int | None = setting(None, "token that is no target, where no attention_mask tells", source=_OURS, ge=0)
    rest: Literal["spread", "class"] = setting(
        "spread", "logits a cache did not keep: shared out evenly, or one class more", source=_OURS
    )
    precision: Literal["fp32", "bf16", "fp16"] = setting(
        "fp32", "of the forward passes (autocast); fp16 scales the loss and needs a GPU", source=_OURS
    )
    clip: float | None = setting(None, "largest norm of the gradient", source=_OURS, gt=0)
    ema: float | None = setting(
        None, "decay a step of the averaged weights that are judged and returned", source=_OURS, gt=0, lt=1
    )
    check_every: int | None = setting(
        None, "steps between looks at `validation`; by default an epoch", source=_OURS, ge=1
    )
    watch: Literal["accuracy", "loss"] = setting("accuracy", "what decides which step is best", source=_OURS)
    patience: int | None = setting(None, "looks without a better one after which it ends", source=_OURS, ge=1)
    keep: Literal["best", "last"] = setting("best", "step that is returned, where there is validation", source=_OURS)

    @field_validator("micro_batch")
    @classmethod
    def _one_at_least(cls, value: int | str | None) -> int | str | None:
        if isinstance(value, int) and value < 1:
            raise ValueError("give 1 or more, or auto")
        return value


def distill(
    student: nn.Module,
    teacher: Any,
    loader: Any,
    settings: Training | None = None,
    *,
    objective: Objective | None = None,
    validation: Any = None,
    evaluate: Evaluate | None = None,
    optimizer: Factory | None = None,
    augment: Augment | Sequence[Augment] = (),
    outputs: Outputs = outputs_of,
    journal: Journal | str | Path | None = None,
    seed: int = 0,
    in_place: bool = False,
    facts: dict[str, Any] | None = None,
) -> nn.Module:
    """The student, trained, in eval mode: a copy unless `in_place`. The teacher is as it was.

    `teacher`: a module, a function of a batch, a list of them, `Teachers`, or what `cached` gave. `loader`: Examples, tensors
    (inputs, labels), a mapping with `labels`, or batches that can be read again and again; `validation` likewise.
    `objective`: by default `kd()`. `augment`: what both see of a batch, or one function for each view of the loss.
    `optimizer` makes one of parameter groups. A folder as `journal` is gone on from. `facts` is filled with what was seen.
    SpoliaError before any work where the parts do not fit, and when the loss is no number.
    """
    settings = settings or Training()
    asked = Teachers.of(teacher, outputs)
    if in_place and any(student is model for model in getattr(asked, "models", ())):
        raise SpoliaError("is the student itself", where="teacher", mend="leave out in_place, or give a copy")
    with joined() as (rank, ranks), torch.random.fork_rng(_gpus(student)):
        if not isinstance(journal, Journal):
            journal = Journal(journal, follow=rank > 0)
        model = student if in_place else copy.deepcopy(student)
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        data = source(loader, settings.batch, seed, "loader")
        held = None if validation is None else source(validation, settings.batch, seed, "validation")
        views = tuple(augment) if isinstance(augment, Sequence) else (augment,)
        with asked.at_rest():
            passes = Passes(
                asked,
                objective or kd(),
                outputs,
                device,
                tokens=settings.task == "tokens",
                pad=settings.pad,
                rest_as_class=settings.rest == "class",
                precision=settings.precision,
            )
            fitted = checked(model, passes, settings, data, held, views, seed)
            run = Run(model, fitted, settings, data, held, views, optimizer, seed, (rank, ranks))
            run.train(journal, evaluate)
        if facts is not None:
            facts.update(run.facts())
        return run.result()


def _gpus(student: nn.Module) -> list[int]:
    """Whose random state is put back afterwards, beside the processor's."""
    return sorted({p.device.index or 0 for p in student.parameters() if p.device.type == "cuda"})
