"""A merge whose result stays in memory: state dicts and modules in, a state dict out."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core.settings import MergeSettings
from spolia.core.stream import cores
from spolia.errors import Problems, SpoliaWarning
from spolia.parts.align import align
from spolia.parts.expert import ExpertPool
from spolia.parts.merging import MemorySink, Merge
from spolia.parts.preprocessed import Step
from spolia.runs.asked import checked_dtype
from spolia.runs.merging import fit_pool, output_dtypes
from spolia.runs.references import located

if TYPE_CHECKING:
    from torch import Tensor


def merge_in_memory(
    experts: Any,
    base: Any,
    method: Method,
    settings: MergeSettings,
    dtype: str | None,
    seed: int,
    threads: int | None,
    memory: int,
    progress: Any,
    steps: tuple[Step, ...] = (),
) -> dict[str, Tensor]:
    """The merged tensors by name, in the first model's order; nothing given is changed."""
    problems = Problems()
    pool = ExpertPool.of(experts, base, located)
    pool.steps = steps
    fit_pool(method, pool, problems)
    problems.raise_if_any()
    aligned, tied = align(pool, problems)
    problems.raise_if_any()
    for warning in problems.warnings:
        warnings.warn(str(warning), SpoliaWarning, stacklevel=3)
    dtypes = output_dtypes(aligned, checked_dtype(dtype))
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
