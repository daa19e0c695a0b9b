"""Looking around, as functions: what `spolia list`, `show`, `new`, `schema` and `doctor` tell, as values."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from spolia.catalog import find, search
from spolia.runs import describe
from spolia.runs.doctor import Finding, examine


def list_methods(text: str = "") -> list[dict[str, Any]]:
    """Name, family, paper, needs and cost of every method, or of those that `text` is like."""
    return describe.list_data(search(text))


def show(method: str) -> dict[str, Any]:
    """Everything about one method: settings with their sources, its page with the equations, its recipes."""
    return describe.show_data(find(method, "method"))


def new(method: str, out: str | os.PathLike[str] | None = None, *, tiny: bool = False) -> str | Path:
    """A commented recipe to start from: its text, or with `out` the file it was written to. `tiny`: on real digits."""
    from spolia.runs.new import recipe_text, write_recipe

    found = find(method, "method")
    if out is None:
        return recipe_text(found, tiny=tiny, file="my.yaml")
    return write_recipe(found, Path(out), tiny=tiny)


def schema() -> dict[str, Any]:
    """The JSON Schema of recipes, for editors."""
    from spolia.runs.editors import json_schema

    return json_schema()


def doctor(*, deep: bool = False) -> list[Finding]:
    """What this machine can do and what stands in the way; `deep` imports torch too."""
    return examine(deep=deep)
