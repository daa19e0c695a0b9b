"""Learned coefficients as a recipe: the merge made again by streaming, without network or inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spolia.errors import SpoliaError
from spolia.parts.inputs import parted
from spolia.parts.learned import Learned


def recipe_of(learned: Learned, experts: Mapping[str, Any], base: Any, folder: Path | None = None) -> str:
    """A mergekit recipe (task_arithmetic, a weight a tensor) that makes the weights again from the models alone.

    `experts` and `base` are paths, or whatever else was merged: that goes by its name. Paths are written as seen from
    `folder`, where the recipe will stand. SpoliaError where the coefficients
    belong to changed task vectors, which no recipe of sums repeats.
    """
    if learned.coefficients is None:
        raise SpoliaError("this merge has no coefficients", where="recipe", mend="keep the weights: out=FOLDER")
    prepared = [step["name"] for step in learned.facts.get("preprocess", [])]
    if prepared:
        what = (
            f"the coefficients belong to task vectors changed by {' and '.join(prepared)}; a sum of plain ones differs"
        )
        raise SpoliaError(what, where="recipe", mend="keep the weights: out=FOLDER")
    # a filter matches as a part of a name, the first one counts: the longest names come first
    names = sorted(learned.coefficients, key=lambda name: (-len(name), name))
    lines = [f"# coefficients that {learned.facts.get('method', 'spolia')} learned; lambda is 1"]
    lines += ["merge_method: task_arithmetic", f"base_model: {_quoted(_place(base, 'base', folder))}", "models:"]
    for k, (name, given) in enumerate(experts.items()):
        lines += [f"  - model: {_quoted(_place(given, name, folder))}", "    parameters:", "      weight:"]
        values = {name: learned.coefficients[name][k] for name in names}
        if len(set(values.values())) > 1:
            lines += [f"        - {{filter: {_quoted(name)}, value: {value!r}}}" for name, value in values.items()]
            lines.append(f"        - {{value: {1 / len(experts)!r}}}")  # what is no sum: see the notes
        else:
            lines[-1] += f" {next(iter(values.values()), 0.0)!r}"
    return "\n".join(lines) + "\n"


def _place(given: Any, name: str, folder: Path | None) -> str:
    if not isinstance(given, str | os.PathLike):
        return f"./{name}"
    parts = [part for part in parted(given) if part is not None]
    here = [os.path.relpath(part, folder) if folder is not None and part.exists() else str(part) for part in parts]
    return "+".join(here)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
