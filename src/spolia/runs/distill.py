"""Distillation as a function: a student, a teacher and a loader go in, a trained student comes out."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from spolia.catalog import METHODS, Method
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.settings import Settings
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.parts.network import outputs_of
from spolia.runs.complaints import validate

if TYPE_CHECKING:
    from torch import nn

    from spolia.methods.distill.passes import Augment
    from spolia.methods.distill.run import Evaluate
    from spolia.methods.distill.schedule import Factory
    from spolia.methods.distill.train import Training
    from spolia.parts.network import Outputs


def distill(
    student: nn.Module,
    teacher: Any,
    loader: Any,
    *,
    method: str = "rkkd",
    settings: Mapping[str, Any] | Settings | None = None,
    training: Mapping[str, Any] | Training | None = None,
    validation: Any = None,
    evaluate: Evaluate | None = None,
    optimizer: Factory | None = None,
    augment: Augment | Sequence[Augment] = (),
    outputs: Outputs = outputs_of,
    journal: Journal | str | os.PathLike[str] | None = None,
    seed: int = 0,
    in_place: bool = False,
    facts: dict[str, Any] | None = None,
) -> nn.Module:
    """Train `student` on what `teacher` answers; a trained copy in eval mode, unless `in_place`.

    `method` names the loss, `settings` are that loss's; `training` says epochs, learning rate and all else of the loop
    (`spolia.methods.distill.train.Training`), and the other parameters are as there. `loader`: batches that can be read
    again and again, tensors (inputs, labels), Examples, or a mapping with `labels`. With `journal`, a folder, the same call
    goes on after a kill. Raises SpoliaError with what does not fit, before anything is trained.
    """
    from spolia.methods.distill.train import Training
    from spolia.methods.distill.train import distill as train

    problems = Problems()
    chosen = _method(method)
    own = checked(chosen.settings_class(), settings, "settings", problems)
    pace = checked(Training, training, "training", problems)
    if not isinstance(student, torch.nn.Module):
        problems.add("student", f"a {type(student).__name__} cannot be trained", "give a torch.nn.Module")
    problems.raise_if_any()
    return train(
        student,
        teacher,
        loader,
        pace,
        objective=chosen.function()(own),
        validation=validation,
        evaluate=evaluate,
        optimizer=optimizer,
        augment=augment,
        outputs=outputs,
        journal=journal if isinstance(journal, Journal) or journal is None else os.fspath(journal),
        seed=seed,
        in_place=in_place,
        facts=facts,
    )


def _method(name: str) -> Method:
    known = [m.name for m in METHODS if m.family == "distill"]
    chosen = next((m for m in METHODS if m.family == "distill" and name in (m.name, *m.aliases)), None)
    if chosen is None:
        other = next((m for m in METHODS if name in (m.name, *m.aliases)), None)
        what = f"`{name}` is of the family {other.family}" if other else f"no loss is called `{name}`"
        raise SpoliaError(what, where="method", mend=did_you_mean(name, known))
    return chosen


def checked(kind: Any, given: Mapping[str, Any] | Settings | None, where: str, problems: Problems) -> Any:
    """`given` as settings of `kind`, or None after adding to `problems` what is wrong with it."""
    if isinstance(given, kind):
        return given
    if isinstance(given, Settings) or not isinstance(given, Mapping | None):
        what = f"a {type(given).__name__} is no {kind.__name__}"
        problems.add(where, what, f"give {kind.__name__}(…), or a mapping of its fields")
        return None
    return validate(kind, dict(given or {}), (where,), lambda path: ".".join(map(str, path)), problems)
