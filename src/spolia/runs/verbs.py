"""The verbs as functions: everything the command does, for programs and notebooks."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method, find
from spolia.core.settings import MergeSettings, each
from spolia.errors import Problems, SpoliaError, SpoliaWarning, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.runs.merging import Prepared
    from spolia.runs.plan import Plan
    from spolia.runs.recipe import Recipe
    from spolia.runs.request import MergeRequest

GB = 1_000_000_000


def merge(
    experts: Mapping[str, Any] | Sequence[Any],
    *,
    base: Any = None,
    method: str = "average",
    settings: Mapping[str, Any] | MergeSettings | None = None,
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    seed: int = 0,
    threads: int | None = None,
    chunk_memory: int = GB,
    max_shard_size: int = 5 * GB,
    overwrite: bool = False,
    progress: Any = None,
) -> Any:
    """Merge fine-tuned models into one.

    `experts` and `base` are model folders or files, hub ids, modules or state dicts (experts as a list, or a mapping that
    names them); a LoRA adapter is `BASE+ADAPTER`, or its folder alone where `base` is given. Returns the merged state
    dict, in `dtype` or each tensor's own type; or, with `out`, writes a model folder there and returns its path (then all
    models must be on disk). Nothing given is changed. Raises SpoliaError with everything that does not fit, before any
    tensor is merged.
    """
    if isinstance(experts, str | os.PathLike):
        raise SpoliaError("one path is given", where="experts", mend="give a list of models: [PATH, PATH]")
    chosen = find(method, "method")
    checked = check_settings(chosen, settings, len(experts))
    if out is None:
        return _merge_in_memory(experts, base, chosen, checked, dtype, seed, threads, chunk_memory, progress)
    from spolia.runs.merging import run_merge

    request = _request(experts, base, chosen, checked, dtype, seed)
    return run_merge(
        request,
        Path(out),
        max_shard_size=max_shard_size,
        chunk_memory=chunk_memory,
        threads=threads,
        overwrite=overwrite,
        progress=progress,
        card=card_of,
    )


def check_settings(method: Method, given: Mapping[str, Any] | MergeSettings | None, experts: int) -> MergeSettings:
    """The method's settings object. SpoliaError names every field that is wrong."""
    from pydantic import ValidationError

    kind = method.settings_class()
    if isinstance(given, MergeSettings):
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
                what = f"{method.name} has no such setting" if unknown else item["msg"]
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


def _merge_in_memory(
    experts: Any,
    base: Any,
    method: Method,
    settings: MergeSettings,
    dtype: str | None,
    seed: int,
    threads: int | None,
    memory: int,
    progress: Any,
) -> dict[str, Tensor]:
    from spolia.core.stream import cores
    from spolia.parts.align import align
    from spolia.parts.expert import ExpertPool
    from spolia.parts.merging import MemorySink, Merge
    from spolia.runs.merging import fit_pool, output_dtypes
    from spolia.runs.references import located

    problems = Problems()
    pool = ExpertPool.of(experts, base, located)
    fit_pool(method, pool, problems)
    problems.raise_if_any()
    aligned, tied = align(pool, problems)
    problems.raise_if_any()
    for warning in problems.warnings:
        warnings.warn(str(warning), SpoliaWarning, stacklevel=3)
    dtypes = output_dtypes(aligned, _dtype(dtype))
    sink = MemorySink.like(aligned, dtypes)
    job = Merge(
        pool,
        aligned,
        method.function(),
        method.survey(),
        lambda name: settings,
        dtypes,
        seed,
        threads or cores(),
        memory,
    )
    with pool.opened():
        if progress is not None:
            progress.start("merge", sum(tensor.numel * dtypes[tensor.name].size for tensor in aligned), "B")
        job.run(sink, (), progress)
        if progress is not None:
            progress.finish()
    merged = sink.tensors | {alias: sink.tensors[name] for alias, name in tied.items()}
    order = pool.models[0].weights.entries
    return {name: merged[name] for name in [*(n for n in order if n in merged), *(n for n in merged if n not in order)]}


def _dtype(name: str | None) -> str | None:
    known = ("bfloat16", "float16", "float32", "float64")
    if name is not None and name not in known:
        raise SpoliaError(f"`{name}` is not a type to write", where="dtype", mend=did_you_mean(name, known))
    return name


def _request(
    experts: Any, base: Any, method: Method, settings: MergeSettings, dtype: str | None, seed: int
) -> MergeRequest:
    import json

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
        "method": {"name": method.name, **settings.model_dump(mode="json")},
        "output": {"dtype": dtype},
    }
    return MergeRequest(
        method, listed, lambda name: settings, start, _dtype(dtype), None, seed, json.dumps(call, indent=2) + "\n"
    )


def card_of(prepared: Prepared, name: str) -> str:
    """The model card of the merged folder `name`."""
    from spolia.report.card import render_card
    from spolia.runs.merging import card_facts

    return render_card(card_facts(prepared, name))


def merge_recipe(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    max_shard_size: int = 5 * GB,
    chunk_memory: int = GB,
    threads: int | None = None,
    overwrite: bool = False,
    seed: int | None = None,
    dry_run: bool = False,
    progress: Any = None,
) -> Path | Plan:
    """Merge what a recipe file (mergekit's form or ours, with a pool of folders) describes into the folder `out`."""
    from dataclasses import replace

    from spolia.runs.merging import plan_merge, run_merge
    from spolia.runs.recipe import read_source

    source = read_source(str(path))
    if source.documents:
        from spolia.runs.mergekit_multi import Job, arrange

        job = Job(
            arrange(list(source.documents)), source.folder, source.text, seed, max_shard_size, chunk_memory, threads
        )
        return (
            job.plan(Path(out)) if dry_run else job.run(Path(out), overwrite=overwrite, progress=progress, card=card_of)
        )
    request = read_request(path)
    if seed is not None:
        request = replace(request, seed=seed)
    if dry_run:
        return plan_merge(request, Path(out), max_shard_size=max_shard_size, chunk_memory=chunk_memory, threads=threads)
    return run_merge(
        request,
        Path(out),
        max_shard_size=max_shard_size,
        chunk_memory=chunk_memory,
        threads=threads,
        overwrite=overwrite,
        progress=progress,
        card=card_of,
    )


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


def request_of(recipe: Recipe) -> MergeRequest:
    """The merge that a native recipe over folders asks for. Models of the hub are fetched."""
    from spolia.runs.references import fetched, settled
    from spolia.runs.request import MergeRequest, ModelRef
    from spolia.runs.schema import FoldersPool

    if not isinstance(recipe.pool, FoldersPool):
        raise SpoliaError(
            "trains its own experts: there are no folders to merge", where=recipe.name, mend=f"spolia run {recipe.name}"
        )
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
        recipe=recipe.to_yaml(),
    )


def plan(recipe: str | os.PathLike[str] | Recipe, overrides: Sequence[str] = ()) -> Plan:
    """What running `recipe` would do, from headers alone: nothing is trained, read or written."""
    from spolia.runs.engine import plan_recipe
    from spolia.runs.recipe import Recipe, check_recipe, read_source

    if isinstance(recipe, Recipe):
        return plan_recipe(recipe)
    source = read_source(str(recipe))
    if source.is_mergekit:
        from spolia.runs.merging import plan_merge

        _no_overrides(overrides)
        return plan_merge(read_request(recipe))
    return plan_recipe(check_recipe(source, overrides))


def _no_overrides(overrides: Sequence[str]) -> None:
    if overrides:
        raise SpoliaError(
            "mergekit files take no overrides", where=overrides[0], mend="edit the file, or use a recipe of our form"
        )


def run(
    recipe: str | os.PathLike[str] | Recipe,
    folder: str | os.PathLike[str] | None = None,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
    dry_run: bool = False,
    progress: Any = None,
) -> Path | Plan:
    """Run a recipe into a run folder (default `runs/NAME`), going on where an unchanged one stopped. Returns the
    folder, or with `dry_run` the plan."""
    from spolia.runs.engine import run_recipe
    from spolia.runs.recipe import Recipe, check_recipe, read_source
    from spolia.runs.store import RunFolder

    if not isinstance(recipe, Recipe):
        source = read_source(str(recipe))
        if source.is_mergekit:
            raise SpoliaError("is a mergekit recipe", where=str(recipe), mend=f"spolia merge {recipe} OUT")
        recipe = check_recipe(source, overrides)
    target = Path(folder) if folder is not None else Path("runs") / recipe.short_name
    return run_recipe(recipe, RunFolder(target), fresh=fresh, dry_run=dry_run, progress=progress)


def report(folder: str | os.PathLike[str]) -> Path:
    """Write `report.html` of a run folder, finished or not, and return its path."""
    from spolia.report.html import write_report

    return write_report(Path(folder))
