"""Words for the shell's completion: names of methods and recipes, and what can be set in the recipe at hand."""

from __future__ import annotations

from typing import Any

from spolia.catalog import METHODS
from spolia.errors import SpoliaError
from spolia.runs.packaged import packaged


def methods(incomplete: str) -> list[tuple[str, str]]:
    return [(method.name, method.summary) for method in METHODS if method.name.startswith(incomplete)]


def recipes(incomplete: str) -> list[str]:
    return [name for name in packaged() if name.startswith(incomplete)]


def overrides(ctx: Any, incomplete: str) -> list[str]:
    """`method.density=` and the like, for the recipe typed before. Silent where that recipe cannot be read."""
    from spolia.runs.recipe import Recipe, check_recipe, read_source
    from spolia.runs.schema import Head, Output

    try:
        recipe = check_recipe(read_source(str(ctx.params.get("recipe"))), check_paths=False)
    except SpoliaError:
        return []
    paths = [name for name in Head.model_fields if name in ("seed", "seeds")]
    parts = [("method", type(recipe.settings))]
    if isinstance(recipe, Recipe):
        parts += [("pool", type(recipe.pool)), ("output", Output)]
    else:
        parts.append(("problem", type(recipe.problem)))
    for part, model in parts:
        paths += [f"{part}.{name}" for name in model.model_fields]
    return [f"{path}=" for path in paths if path.startswith(incomplete)]
