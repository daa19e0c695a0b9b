"""What is found out before a distillation begins: one small forward pass of both models, and a look at all labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.seeds import generator
from spolia.errors import Problems, SpoliaError
from spolia.methods.distill.batches import Loader, Places
from spolia.methods.distill.passes import Augment, Passes, views_of
from spolia.parts.teacher import CachedTeacher

if TYPE_CHECKING:
    from torch import Tensor, nn

_ROWS = 2  # inputs of the first pass


@dataclass(frozen=True)
class Fitted:
    """The passes with the loss as it begins, the names of its terms, the samples of an input, classes, whether labelled."""

    passes: Passes
    names: list[str]
    inner: int
    classes: int
    labelled: bool


def checked(
    student: nn.Module,
    passes: Passes,
    settings: Any,
    data: Places | Loader,
    held: Places | Loader | None,
    views: Sequence[Augment],
    seed: int,
) -> Fitted:
    """SpoliaError where anything does not fit. The student is as it was."""
    _settings_fit(student, passes, settings, held, views)
    batch = data.first().rows(slice(_ROWS)).to(passes.device)
    shown = views_of(batch, views, generator(seed, "views", "first"))
    modes = {part: part.training for part in student.modules()}
    try:
        with torch.no_grad():
            student.eval()
            ours, theirs = passes.both(student, shown)
            _same_shape(ours.logits, theirs.logits)
            for given, where in ((data, "loader"), (held, "validation")):
                if given is not None:
                    labels_fit(given, passes, ours.logits.shape, where)
            begun = passes.objective.begun(ours, theirs, seed)
            passes = replace(passes, objective=begun.to(passes.device))
            names = list(passes.losses(student, shown, 0.0))
    finally:
        for part, mode in modes.items():
            part.training = mode
    inner = ours.logits[(0,) * (2 if len(shown) > 1 else 1)][..., 0].numel()
    labelled = passes.targets(batch) is not None and ("ce" in names or passes.objective.labelled)
    return Fitted(passes, names, inner, ours.logits.shape[-1], labelled)


def _settings_fit(
    student: nn.Module, passes: Passes, settings: Any, held: Places | Loader | None, views: Sequence[Augment]
) -> None:
    problems, objective = Problems(), passes.objective
    cached = isinstance(passes.teacher, CachedTeacher)
    if not any(p.requires_grad for p in student.parameters()):
        problems.add("student", "no weight of it may change", "student.requires_grad_(True)")
    if settings.precision == "fp16" and passes.device.type != "cuda":
        problems.add("precision", "fp16 needs a GPU", "choose bf16 or fp32")
    if settings.patience is not None and held is None:
        problems.add(
            "patience", "nothing to be patient about: no validation is given", "give `validation`, or leave it out"
        )
    if objective.views != max(1, len(views)):
        what = f"the loss looks at {objective.views} views of an input, {len(views)} are made"
        problems.add("augment", what, f"give {objective.views} functions of (inputs, generator)")
    if cached and objective.taps:
        problems.add("teacher", "a cache holds logits, the loss wants features", "give the teacher itself")
    if objective.taps and not cached and len(getattr(passes.teacher, "models", ())) != 1:
        problems.add("teacher", "the loss wants features of one teacher", "give one")
    if passes.rest_as_class and not cached:
        problems.add("rest", "only a cache leaves logits out", "rest: spread, or give what `cached` makes")
    if passes.rest_as_class and (objective.labelled or objective.views > 1):
        what = "the loss asks for the label's own logit or for views, which one class for the rest cannot give"
        problems.add("rest", what, "rest: spread")
    problems.raise_if_any()


def _same_shape(ours: Tensor, theirs: Tensor) -> None:
    if ours.shape == theirs.shape and ours.dim() >= 2:
        return
    what = f"the teacher gives {list(theirs.shape)}, the student {list(ours.shape)}"
    mend = "give models whose outputs are logits [batch, ..., classes] of the same classes in the same order"
    raise SpoliaError(what, where="student and teacher", mend=mend)


def labels_fit(given: Places | Loader, passes: Passes, shape: Sequence[int], where: str) -> None:
    """SpoliaError unless targets have the logits' shape but the last and name its classes. Of a loader: in its first batch."""
    if isinstance(given, Places) and given.examples.labels is not None and not passes.tokens:
        targets: Tensor | None = given.examples.labels
    else:
        targets = passes.targets(given.first())
    if targets is None:
        if passes.objective.labelled and where == "loader":
            raise SpoliaError("no labels are given, the loss needs them", where=where, mend="give (inputs, labels)")
        return
    in_range(targets, shape[-1], where)
    places = list(shape[(2 if passes.objective.views > 1 else 1) : -1])
    if not passes.tokens and list(targets.shape[1:]) != places:
        what = f"labels are {list(targets.shape)}, logits [batch, {', '.join(map(str, [*places, shape[-1]]))}]"
        raise SpoliaError(
            what, where=where, mend="give one class number for each sample; for language models task: tokens"
        )


def in_range(targets: Tensor, classes: int, where: str) -> None:
    """SpoliaError unless targets are whole numbers below `classes`; those below 0 count as nothing."""
    if targets.is_floating_point():
        what = f"labels are {targets.dtype}".replace("torch.", "")
        raise SpoliaError(what, where=where, mend="give class numbers, int64")
    if targets.numel() and int(targets.max()) >= classes:
        what = f"label {int(targets.max())}, the models know {classes} classes"
        raise SpoliaError(what, where=where, mend=f"classes are counted from 0 to {classes - 1}")
