"""Masks of a merge, and models with one of them put on: the doors `spolia.masks` and `spolia.attach`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import METHODS, find
from spolia.core.settings import MergeSettings
from spolia.errors import Problems, SpoliaError

if TYPE_CHECKING:
    from spolia.parts.expert import ExpertPool
    from spolia.parts.masks import Mask

GB = 1_000_000_000


def masks(
    experts: Mapping[str, Any] | Sequence[Any],
    *,
    base: Any,
    method: str,
    settings: Mapping[str, Any] | MergeSettings | None = None,
    threads: int | None = None,
    chunk_memory: int = GB,
) -> dict[str, Mask]:
    """The masks, by expert, that belong to `merge` with the same experts, base, method and settings.

    Only for methods that make them (emr, tall_masks). A merge to a folder writes them itself; this is for merges in
    memory. One bit a weight and expert.
    """
    from spolia.core.stream import cores
    from spolia.parts.align import align
    from spolia.parts.expert import ExpertPool
    from spolia.parts.masks import make_masks
    from spolia.parts.merging import Merge
    from spolia.runs.merging import fit_pool
    from spolia.runs.verbs import check_settings

    chosen = find(method, "method")
    if chosen.masks() is None:
        able = ", ".join(m.name for m in METHODS if getattr(m.settings_class(), "masked", False))
        raise SpoliaError(f"{chosen.name} makes no masks", where="method", mend=f"these do: {able}")
    checked = check_settings(chosen, settings, len(experts))
    problems = Problems()
    pool = ExpertPool.of(experts if isinstance(experts, Mapping) else list(experts), base)
    fit_pool(chosen, pool, problems)
    check_names(pool, problems)
    problems.raise_if_any()
    aligned, _ = align(pool, problems)
    problems.raise_if_any()
    job = Merge(
        pool, aligned, chosen.function(), None, lambda name: checked, {}, 0, threads or cores(), chunk_memory
    )  # fmt: skip
    with pool.opened():
        return {mask.expert: mask for mask in make_masks(job, chosen)}


def check_names(pool: ExpertPool, problems: Problems) -> None:
    """Masks are called by their expert's name, and so are their files."""
    from spolia.parts.masks import fits

    names = [expert.name for expert in pool.experts]
    for name in sorted({name for name in names if names.count(name) > 1}):
        problems.add(name, "is the name of two experts; masks go by it", "give each a name of its own")
    for name in dict.fromkeys(name for name in names if not fits(name)):
        shown = name.encode("utf-8", "replace").decode()[:60]
        problems.add(shown, "cannot be the name of a file, and that of its mask", "give the expert a short, plain name")


def attach(
    merged: Any,
    expert: str | Mask,
    *,
    base: Any,
    out: str | os.PathLike[str] | None = None,
    dtype: str | None = None,
    threads: int | None = None,
    chunk_memory: int = GB,
    max_shard_size: int = 5 * GB,
    overwrite: bool = False,
    progress: Any = None,
) -> Any:
    """The merged model with the mask of `expert` put on: base + rescaler * mask * (merged - base).

    `merged` is a folder that a masked method wrote, then `expert` may be a name; or a module or state dict, then it is a
    mask from `spolia.masks`. `base` is the base of that merge. Returns the state dict, in `dtype` or the base's types;
    or, with `out`, writes a model folder there and returns its path. Nothing given is changed.
    """
    from spolia.parts.masks import ATTACH, Attached, Mask
    from spolia.runs.asked import request_from
    from spolia.runs.memory import merge_in_memory
    from spolia.runs.verbs import card_of

    if isinstance(expert, Mask):
        mask = expert
    elif not isinstance(expert, str):
        cure = "write the name of an expert"
        raise SpoliaError(f"a {type(expert).__name__} is no expert's name", where="expert", mend=cure)
    elif isinstance(merged, str | os.PathLike):
        mask = Mask.of(Path(merged), expert)
    else:
        cure = "pass the mask itself, from `spolia.masks`"
        raise SpoliaError(f"a {type(merged).__name__} in memory holds no masks", where="merged", mend=cure)
    _check_shapes(merged, mask)
    settings = Attached(mask=mask, expert=mask.expert)
    models = {"merged": merged}
    if out is None:
        return merge_in_memory(models, base, ATTACH, settings, dtype, 0, threads, chunk_memory, progress)
    from spolia.runs.merging import run_merge

    return run_merge(
        request_from(models, base, ATTACH, settings, dtype, 0),
        Path(out),
        max_shard_size=max_shard_size,
        chunk_memory=chunk_memory,
        threads=threads,
        overwrite=overwrite,
        progress=progress,
        card=card_of,
    )


def _check_shapes(merged: Any, mask: Mask) -> None:
    from spolia.parts.expert import ExpertPool

    problems = Problems()
    entries = ExpertPool.of({"merged": merged}).experts[0].weights.entries
    for name, shape in mask.shapes.items():
        has = entries[name].shape if name in entries else None
        if has != shape:
            what = f"is {list(shape)} in the mask of {mask.expert}, " + (f"{list(has)} in" if has else "missing from")
            problems.add(name, f"{what} the merged model", "use the masks of the same merge")
    problems.raise_if_any()
