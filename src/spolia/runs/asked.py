"""From what a user gives, a call or a native recipe, to settings that are checked and a merge that can be asked for."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core.settings import MergeSettings, Settings, each
from spolia.errors import Problems, SpoliaError, did_you_mean

if TYPE_CHECKING:
    from spolia.parts.preprocessed import Step
    from spolia.runs.recipe import Recipe
    from spolia.runs.request import MergeRequest
    from spolia.runs.studies import StudyRecipe


def check_settings(method: Method, given: Mapping[str, Any] | Settings | None, experts: int) -> Any:
    """The method's settings object. SpoliaError names every field that is wrong."""
    from pydantic import ValidationError

    kind = method.settings_class()
    if isinstance(given, Settings):
        if not isinstance(given, kind):
            raise SpoliaError(f"{type(given).__name__} are not the settings of {method.name}", where="settings")
        checked = given
    else:
        try:
            checked = kind(**(given or {}))
        except ValidationError as error:
            problems = Problems()
            for item in error.errors():
                where = ".".join(["settings", *map(str, item["loc"][:1])])
                unknown = item["type"] == "extra_forbidden"
                what = f"{method.name} has no such setting" if unknown else item["msg"].removeprefix("Value error, ")
                problems.add(where, what, did_you_mean(str(item["loc"][-1]), kind.model_fields) if unknown else "")
            problems.raise_if_any()
            raise
    for field in kind.model_fields:
        value = getattr(checked, field)
        if isinstance(value, tuple):
            try:
                each(value, experts)
            except ValueError as error:
                raise SpoliaError(
                    str(error), where=f"settings.{field}", mend="give one number, or one an expert"
                ) from None
    return checked


def read_request(path: str | os.PathLike[str]) -> MergeRequest:
    """The merge that a recipe file asks for, in either form."""
    from spolia.runs.mergekit import is_mergekit, read_mergekit
    from spolia.runs.recipe import check_recipe, read_source

    source = read_source(str(path))
    if source.documents:
        what = f"{len(source.documents)} documents in one file"
        raise SpoliaError(what, where=str(path), mend=f"spolia merge {path} OUT")
    if is_mergekit(source.marked.value):
        request = read_mergekit(source.marked, folder=source.folder)
        request.recipe, request.recipe_name = source.text, "mergekit_config.yml"
        return request
    return request_of(check_recipe(source))


def request_of(recipe: Recipe | StudyRecipe) -> MergeRequest:
    """The merge that a native recipe over folders asks for. Models of the hub are fetched."""
    from spolia.runs.recipe import Recipe
    from spolia.runs.references import fetched, settled
    from spolia.runs.request import MergeRequest, ModelRef
    from spolia.runs.schema import FoldersPool

    if not isinstance(recipe, Recipe):
        raise SpoliaError(
            f"{recipe.method.name} is no merge", where=recipe.name, mend=f"run it: spolia run {recipe.name}"
        )
    if not isinstance(recipe.pool, FoldersPool):
        raise SpoliaError(
            "trains its own experts: there are no folders to merge", where=recipe.name, mend=f"spolia run {recipe.name}"
        )
    if recipe.method.data or recipe.surgery is not None:
        looking = recipe.surgery[0] if recipe.surgery is not None and not recipe.method.data else recipe.method
        what = f"{looking.name} looks at {looking.data}: more than a merge of weights"
        raise SpoliaError(what, where=recipe.name, mend="run it: spolia run RECIPE")
    models = [entry for entry in (recipe.pool.base, *recipe.pool.experts) if entry is not None]
    refs = [ModelRef(e.name, Path(fetched(str(e.path))), e.lora and Path(fetched(str(e.lora)))) for e in models]
    base = refs.pop(0) if recipe.pool.base is not None else None
    return MergeRequest(
        recipe.method,
        [settled(ref, base) for ref in refs],
        lambda name: recipe.settings,
        base,
        recipe.output.dtype,
        seed=recipe.seed,
        preprocess=recipe.preprocess,
        recipe=recipe.to_yaml(),
    )


def request_from(
    experts: Any,
    base: Any,
    method: Method,
    settings: MergeSettings,
    dtype: str | None,
    seed: int,
    steps: tuple[Step, ...] = (),
) -> MergeRequest:
    """The merge that a call asks for, whose models are all on disk."""
    from spolia.runs.references import reference, settled
    from spolia.runs.request import MergeRequest, ModelRef

    def ref(given: Any, name: str | None = None) -> ModelRef:
        if not isinstance(given, str | os.PathLike):
            raise SpoliaError(
                f"a {type(given).__name__} cannot be streamed to a folder",
                where=name or "experts",
                mend="pass folders, or leave `out` away and save the returned state dict",
            )
        return reference(given, name)

    named = experts.items() if isinstance(experts, Mapping) else [(None, expert) for expert in experts]
    start = ref(base) if base is not None else None
    listed = [settled(ref(given, name), start) for name, given in named]
    call = {
        "spolia": 1,
        "seed": seed,
        "pool": {"base": start.name if start else None, "experts": [e.name for e in listed]},
        **({"preprocess": [step.to_dict() for step in steps]} if steps else {}),
        "method": {"name": method.name, **settings.model_dump(mode="json")},
        "output": {"dtype": dtype},
    }
    return MergeRequest(
        method,
        listed,
        lambda name: settings,
        start,
        checked_dtype(dtype),
        None,
        seed,
        preprocess=steps,
        recipe=json.dumps(call, indent=2) + "\n",
    )


def checked_dtype(name: str | None) -> str | None:
    """`name` again. SpoliaError unless it is a type that results can be stored in."""
    known = ("bfloat16", "float16", "float32", "float64")
    if name is not None and name not in known:
        raise SpoliaError(f"`{name}` is not a type to write", where="dtype", mend=did_you_mean(name, known))
    return name
