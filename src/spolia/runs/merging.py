"""Merging checkpoints on disk: check everything headers can show, lay the output out, stream, and rename when whole."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core.checkpoint import BY_TORCH_NAME, Checkpoint, Dtype
from spolia.core.claims import Claims
from spolia.core.layout import Layout, Slot
from spolia.core.lazy import torch
from spolia.core.shared import SharedStaging
from spolia.core.staging import Staging, disk_error, free_bytes
from spolia.core.stream import cores
from spolia.errors import Problem, Problems, SpoliaError, SpoliaWarning
from spolia.parts.align import Aligned, align, warnings_of
from spolia.parts.expert import Expert, ExpertPool
from spolia.parts.inputs import Inputs
from spolia.parts.lora import LoraWeights
from spolia.parts.masks import FOLDER, make_masks
from spolia.parts.merging import Merge
from spolia.runs.along import Beside, beside, dress
from spolia.runs.cost import Machine, cost_of
from spolia.runs.documents import accompany, checkpoint_of, masks_beside
from spolia.runs.masking import check_names
from spolia.runs.plan import Input, Phase, Plan
from spolia.runs.preprocessing import chained, went_through
from spolia.runs.request import MergeRequest, ModelRef
from spolia.runs.target import agreement, check_target, is_made, is_newer, key_of

if TYPE_CHECKING:
    from torch import Tensor

GB = 1_000_000_000
Card = Callable[["Prepared", str], str]  # (prepared, name of the folder) -> text


@dataclass
class Prepared:
    """A request whose models are open and known to fit."""

    request: MergeRequest
    pool: ExpertPool
    aligned: list[Aligned]
    tied: dict[str, str]
    dtypes: dict[str, Dtype]
    layout: Layout
    beside: Beside
    warnings: list[Problem]


def prepare(request: MergeRequest, out: Path | None = None, max_shard_size: int = 5 * GB) -> Prepared:
    """Open the headers and check that they fit. Raises SpoliaError with everything that is wrong, reads no tensor."""
    problems = Problems()
    problems.warnings.extend(request.warnings)
    pool = _open(request, problems)
    pool.steps = request.preprocess
    problems.raise_if_any()
    dress(pool, request, problems)
    if request.wiring is None:
        fit_pool(request.method, pool, problems)
    if request.method.settings_class().masked:
        check_names(pool, problems)
    aligned, tied = align(pool, problems, request.on_size_mismatch, request.wiring)
    problems.raise_if_any()
    problems.warnings.extend(warnings_of(pool))
    if request.check_tensors is not None:
        problems.warnings.extend(request.check_tensors([tensor.name for tensor in aligned]))
    dtypes = output_dtypes(aligned, request.out_dtype)
    slots = [Slot(tensor.name, dtypes[tensor.name], tensor.shape) for tensor in aligned]
    layout = Layout.of(slots, max_shard_size)
    along = beside(request, aligned, pool)
    if out is not None:
        check_target(out, layout.nbytes + sum(masks_beside(request.method, aligned, pool).values()), request, problems)
    problems.raise_if_any()
    return Prepared(request, pool, aligned, tied, dtypes, layout, along, problems.warnings)


def _open(request: MergeRequest, problems: Problems) -> ExpertPool:
    pool, inputs = ExpertPool([]), Inputs()

    def expert(ref: ModelRef) -> Expert | None:
        try:
            return Expert(ref.name, inputs.open(ref.path, ref.lora, pool.base.weights if pool.base else None))
        except SpoliaError as error:
            problems.errors.extend(p for p in error.problems if p not in problems.errors)
            return None

    pool.base = expert(request.base) if request.base is not None else None
    pool.experts = [e for ref in request.experts if (e := expert(ref)) is not None]
    return pool


def fit_pool(method: Method, pool: ExpertPool, problems: Problems) -> None:
    """The base and the number of experts that the method asks for. A base it has no use for is left aside."""
    settings = method.settings_class()
    fewest, most = settings.experts
    if pool.base is None and settings.base == "required":
        problems.add(method.name, "needs the base model the experts grew from", "give `base`")
    if pool.base is not None and settings.base == "unused":
        if not any(isinstance(expert.weights, LoraWeights) for expert in pool.experts):  # else it was given for them
            what = "does not use the base: it is left aside"
            problems.warn(method.name, what, "list it among the experts if it should take part")
        pool.base = None
    if settings.base_counts:  # slerp: two models in all
        fewest, most = (fewest, most - 1) if pool.base is not None else (fewest + 1, most)
    count = len(pool.experts)
    if count < fewest or (most is not None and count > most):
        wanted = f"{fewest}" if fewest == most else f"at least {fewest}" if most is None else f"{fewest} to {most}"
        beside = " beside the base" if pool.base is not None else ""
        problems.add(
            method.name, f"takes {wanted} experts{beside}, not {count}", "mend the pool, or choose another method"
        )


def output_dtypes(aligned: list[Aligned], wanted: str | None) -> dict[str, Dtype]:
    """The stored type of each tensor, or the wanted one for those that hold numbers."""
    return {t.name: BY_TORCH_NAME[wanted] if wanted and t.stored.floating else t.stored for t in aligned}


def plan_merge(
    request: MergeRequest,
    out: Path | None = None,
    *,
    max_shard_size: int = 5 * GB,
    chunk_memory: int = GB,
    threads: int | None = None,
    machine: Machine | None = None,
) -> Plan:
    """The plan of a merge, from headers alone. `machine`: where it is to run, with `threads` as given there; else here."""
    prepared = prepare(request, out, max_shard_size)
    return describe(prepared, out, chunk_memory, threads, machine)


def describe(
    prepared: Prepared, out: Path | None, chunk_memory: int, threads: int | None, machine: Machine | None = None
) -> Plan:
    """Sizes, memory and time of a prepared merge."""
    request, pool, layout = prepared.request, prepared.pool, prepared.layout
    count = len(pool.experts)
    files = [*layout.sizes, *(["model.safetensors.index.json"] if layout.index else [])]
    files += [*(f.name for f in prepared.beside.copied), *prepared.beside.texts]
    files += ["README.md", request.recipe_name, "spolia.json"]
    masks = masks_beside(request.method, prepared.aligned, pool)
    files += masks
    name, out_bytes = request.method.name, layout.nbytes + sum(masks.values())
    cost = cost_of(prepared, out_bytes, machine or Machine.here(threads), chunk_memory)
    return Plan(
        title=f"{chained(request.preprocess, name)} merge of {count} experts",
        method=name,
        phases=[
            Phase(
                "merge",
                request.method.summary + went_through(request.preprocess),
                "weights only: no training data, no inputs, no labels",
                writes=str(out or ""),
            )
        ],
        inputs=[_input(model, "base" if model is pool.base else "expert") for model in pool.models],
        tensors=len(prepared.aligned),
        dtypes=dict(Counter(d.torch_name for d in prepared.dtypes.values())),
        bytes_in=sum(model.weights.nbytes for model in pool.models),
        bytes_out=out_bytes,
        peak_memory_bytes=cost.peak,
        disk_needed_bytes=out_bytes,
        disk_free_bytes=free_bytes(out or Path.cwd()),
        seconds=round(cost.seconds, 1),
        time_basis=cost.basis,
        cost=cost.to_dict(),
        files=files,
        seeds=[request.seed],
        warnings=[str(warning) for warning in prepared.warnings],
        notes=request.notes
        + [f"`{alias}` is tied to `{name}`: merged once, stored once" for alias, name in prepared.tied.items()],
    )


def _input(model: Expert, role: str) -> Input:
    weights = model.weights
    kinds = dict(Counter(entry.dtype.torch_name for entry in weights.entries.values()))
    return Input(model.name, str(checkpoint_of(model).path), role, len(weights.entries), weights.nbytes, kinds)


def run_merge(
    request: MergeRequest,
    out: Path,
    *,
    max_shard_size: int = 5 * GB,
    chunk_memory: int = GB,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Any = None,
    card: Card | None = None,
    share: bool = False,
) -> Path:
    """Merge into the folder `out`, which appears when it is whole. The same call goes on after a kill, with equal bits.

    With `share` any number of processes may make this call, on machines that see the same folders, and come and go.
    """
    prepared = prepare(request, out, max_shard_size)
    for warning in prepared.warnings:
        warnings.warn(str(warning), SpoliaWarning, stacklevel=2)
    merge = merge_of(prepared, chunk_memory, threads or cores())
    merge.workers()
    if share:
        return _run_shared(prepared, merge, out, overwrite, progress, card)
    with Staging(out, prepared.layout, key_of(prepared), overwrite=overwrite) as staging:
        with prepared.pool.opened():  # on leaving, that no input changed meanwhile
            _merge_into(staging, merge, prepared, progress)
            _mask(staging, merge, prepared, progress)
        _complete(staging, prepared, card)
    return out


def _run_shared(prepared: Prepared, merge: Merge, out: Path, overwrite: bool, progress: Any, card: Card | None) -> Path:
    """One process's share of a merge: as much of it as the others leave. Returns once the result stands, whoever ended it."""
    shared, entered = SharedStaging(out, prepared.layout, agreement(prepared), overwrite=overwrite), False
    if is_made(out, prepared) and is_newer(out, prepared):
        shared.tidy()
        return out  # the others needed no help
    try:
        with shared as staging:
            entered = True
            if is_made(out, prepared) and is_newer(out, prepared):
                staging.withdraw()
                return out
            with prepared.pool.opened():
                _merge_into(staging, merge, prepared, progress, staging.claims)
                staging.lead()
                _mask(staging, merge, prepared, progress)
            _complete(staging, prepared, card)
    except SpoliaError:  # the others may have finished meanwhile
        over = is_made(out, prepared) and not shared.folder.exists()
        if not over or not (entered or is_newer(out, prepared)):
            raise
    return out


def _merge_into(
    staging: Staging, merge: Merge, prepared: Prepared, progress: Any, claims: Claims | None = None
) -> None:
    if progress is not None:
        sizes = [merge.dtypes[tensor.name].size for tensor in merge.tensors]
        progress.start("merge", sum(size * t.numel for size, t in zip(sizes, merge.tensors, strict=True)), "B")
        finished = [part for part in merge.parts() if part.key in staging.done]
        progress.advance(sum((part.stop - part.start) * sizes[part.index] for part in finished))
    merge.run(_FileSink(staging, prepared.dtypes), staging.done, progress, claims)
    if progress is not None:
        progress.finish()


def _mask(staging: Staging, merge: Merge, prepared: Prepared, progress: Any) -> None:
    if prepared.request.method.masks() is not None:
        try:
            make_masks(merge, prepared.request.method, staging.folder, progress)
        except OSError as error:
            raise disk_error(error, staging.folder / FOLDER) from None


def _complete(staging: Staging, prepared: Prepared, card: Card | None) -> None:
    accompany(prepared, staging, card)
    Checkpoint.open(staging.folder)  # what was written can be read back
    staging.finish()


def merge_of(prepared: Prepared, chunk_memory: int, threads: int) -> Merge:
    request = prepared.request
    return Merge(
        prepared.pool,
        prepared.aligned,
        request.method.function(),
        request.method.survey(),
        request.settings_for,
        prepared.dtypes,
        request.seed,
        threads,
        chunk_memory,
    )


@dataclass
class _FileSink:
    staging: Staging
    dtypes: dict[str, Dtype]

    def write(self, name: str, start: int, values: Tensor) -> None:
        data = memoryview(values.contiguous().view(torch.uint8).numpy())
        self.staging.write(name, start * self.dtypes[name].size, data)

    def done(self, part: str) -> None:
        self.staging.mark(part)
