"""The preprocessing of a merge as a user writes it: a list of steps, each a name, or a mapping with `name` and settings."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from spolia.catalog import METHODS, Method
from spolia.errors import Problems, did_you_mean
from spolia.parts.preprocessed import Step
from spolia.runs.complaints import validate
from spolia.runs.yamlmarks import Path, dotted

AT: Path = ("preprocess",)
_FORM = "write a list in order: [{name: ties, density: 0.2}, {name: awd}]"


def read_steps(raw: Any, where: Callable[[Path], str], problems: Problems) -> tuple[Step, ...]:
    """The steps that `raw` names; what is wrong goes to `problems`."""
    if raw is None:
        return ()
    if not isinstance(raw, list | tuple):
        problems.add(where(AT), f"a {type(raw).__name__} is no list of steps", _FORM)
        return ()
    from spolia.methods.merge.preprocess import STEPS, step_of  # not without steps: 40 ms

    found = []
    for i, item in enumerate(raw):
        at: Path = (*AT, i)
        fields = dict(item) if isinstance(item, Mapping) else {"name": item}
        name = fields.pop("name", None)
        if name is None:
            problems.add(where(at), "`name` is missing", f"add `name`, one of {', '.join(STEPS)}")
        elif not isinstance(name, str) or name not in STEPS:
            there = (*at, "name") if isinstance(item, Mapping) else at
            problems.add(where(there), f"no preprocessing is called `{name}`", did_you_mean(str(name), STEPS))
        elif (settings := validate(STEPS[name], fields, at, where, problems)) is not None:
            found.append(step_of(name, settings))
    return tuple(found)


def check_steps(
    steps: Sequence[Step], method: Method, experts: int, where: Callable[[Path], str], problems: Problems
) -> None:
    """What `method` and the number of experts ask of the steps."""
    if steps and not getattr(method.settings_class(), "vectors", False):
        able = ", ".join(m.name for m in METHODS if m.family == "merge" and m.settings_class().vectors)
        what = f"{method.name} does not merge task vectors alone, so they cannot be changed before it"
        problems.add(where(AT), what, f"choose another method: {able}")
    for i, step in enumerate(steps):
        for name, value in step.settings:
            if isinstance(value, tuple) and len(value) != experts:
                mend = f"give {experts} numbers in the order of the experts, or one for all"
                problems.add(where((*AT, i, name)), f"{len(value)} values for {experts} experts", mend)


def asked_steps(given: Any, method: Method, experts: int) -> tuple[Step, ...]:
    """The steps of a call. SpoliaError names all that is wrong."""
    problems = Problems()
    steps = read_steps(given, dotted, problems)
    check_steps(steps, method, experts, dotted, problems)
    problems.raise_if_any()
    return steps


def chained(steps: Sequence[Step], *names: str) -> str:
    """`ties + awd + adamerging`."""
    return " + ".join([*(step.name for step in steps), *names])


def went_through(steps: Sequence[Step]) -> str:
    """What follows the summary of a merge."""
    return f"; the task vectors went through {' and '.join(step.name for step in steps)} first" if steps else ""
