"""Merging checkpoints on disk: check everything headers can show, lay the output out, stream, and rename when whole."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core.checkpoint import BY_TORCH_NAME, Checkpoint, Dtype
from spolia.core.layout import Layout, Slot, Staging, disk_error, free_bytes
from spolia.core.lazy import torch
from spolia.core.stream import cores
from spolia.errors import Problem, Problems, SpoliaError, SpoliaWarning
from spolia.parts.align import Aligned, align, warnings_of
from spolia.parts.expert import Expert, ExpertPool
from spolia.parts.inputs import Inputs
from spolia.parts.lora import LoraWeights
from spolia.parts.masks import FOLDER, file_of, make_masks, mask_bytes
from spolia.parts.merging import Merge, affordable_workers, bytes_needed
from spolia.runs.along import copied, digest, dress, result_config, texts
from spolia.runs.masking import check_names
from spolia.runs.plan import Input, Phase, Plan
from spolia.runs.request import MergeRequest, ModelRef

if TYPE_CHECKING:
    from torch import Tensor

GB = 1_000_000_000
_TORCH_BYTES = 230_000_000  # a process that has imported torch and read a recipe
# Input bytes a second that two cores merge with warm pages: docs/results/merge_speed.json.
_RATES = {
    "average": 1.5e9, "task_arithmetic": 1.3e9, "slerp": 0.6e9, "ties": 0.33e9, "dare": 0.55e9, "dare_ties": 0.49e9,
    "della": 0.18e9, "della_linear": 0.18e9, "breadcrumbs": 0.28e9, "breadcrumbs_ties": 0.28e9,
    "consensus_ta": 0.9e9, "tall_masks": 0.9e9, "emr": 0.3e9, "pcb": 0.15e9,
    # for matrices 1024 wide; a matrix k times as wide takes k times as long a byte
    "iso_c": 30e6, "tsv": 8e6, "iso_cts": 7e6, "wudi": 1e6,
}  # fmt: skip


@dataclass
class Prepared:
    """A request whose models are open and known to fit."""

    request: MergeRequest
    pool: ExpertPool
    aligned: list[Aligned]
    tied: dict[str, str]
    dtypes: dict[str, Dtype]
    layout: Layout
    warnings: list[Problem]


def prepare(request: MergeRequest, out: Path | None = None, max_shard_size: int = 5 * GB) -> Prepared:
    """Open the headers and check that they fit. Raises SpoliaError with everything that is wrong, reads no tensor."""
    problems = Problems()
    problems.warnings.extend(request.warnings)
    pool = _open(request, problems)
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
    if out is not None:
        _check_target(out, layout.nbytes + sum(_masks(request.method, aligned, pool).values()), request, problems)
    problems.raise_if_any()
    return Prepared(request, pool, aligned, tied, dtypes, layout, problems.warnings)


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


def _checkpoint(model: Expert) -> Checkpoint:
    assert model.weights.checkpoint is not None  # requests name models on disk
    return model.weights.checkpoint


def output_dtypes(aligned: list[Aligned], wanted: str | None) -> dict[str, Dtype]:
    """The stored type of each tensor, or the wanted one for those that hold numbers."""
    return {t.name: BY_TORCH_NAME[wanted] if wanted and t.stored.floating else t.stored for t in aligned}


def _check_target(out: Path, nbytes: int, request: MergeRequest, problems: Problems) -> None:
    """No model is overwritten, and the disk holds the result."""
    whole = Path(os.path.abspath(out))
    for ref in [*([request.base] if request.base else []), *request.experts]:
        folders = {ref.path if ref.path.is_dir() else ref.path.parent, ref.lora or ref.path}
        if any(Path(os.path.realpath(folder)).is_relative_to(os.path.realpath(whole)) for folder in folders):
            problems.add(str(out), f"is or holds the folder of {ref.name}", "write the merged model somewhere else")
    partial = str(whole) + ".partial"
    held = 0
    with contextlib.suppress(OSError):
        held = sum(entry.stat().st_blocks * 512 for entry in os.scandir(partial) if entry.is_file())
    free = free_bytes(whole) + held
    if nbytes > free:
        what = f"needs {nbytes / GB:.2f} GB, {free / GB:.2f} GB are free"
        problems.add(str(out), what, "free some space, choose another disk, or write bfloat16")


def plan_merge(
    request: MergeRequest,
    out: Path | None = None,
    *,
    max_shard_size: int = 5 * GB,
    chunk_memory: int = GB,
    threads: int | None = None,
) -> Plan:
    """The plan of a merge, from headers alone."""
    prepared = prepare(request, out, max_shard_size)
    return describe(prepared, out, chunk_memory, threads)


def describe(prepared: Prepared, out: Path | None, chunk_memory: int, threads: int | None) -> Plan:
    """Sizes, memory and time of a prepared merge."""
    request, pool, layout = prepared.request, prepared.pool, prepared.layout
    count = len(pool.experts)
    need, _ = bytes_needed(prepared.aligned, count, request.settings_for)
    workers = affordable_workers(prepared.aligned, count, threads or cores(), chunk_memory, request.settings_for)
    read = sum(model.weights.nbytes for model in pool.models)
    rate = _RATES.get(request.method.name, 0.3e9) * workers / 2
    files = [*layout.sizes, *(["model.safetensors.index.json"] if layout.index else [])]
    files += [*(f.name for f in copied(request)), *texts(request)]
    files += ["README.md", request.recipe_name, "spolia.json"]
    masks = _masks(request.method, prepared.aligned, pool)
    files += masks
    name, out_bytes = request.method.name, layout.nbytes + sum(masks.values())
    return Plan(
        title=f"{name} merge of {count} experts",
        method=name,
        phases=[
            Phase(
                "merge",
                request.method.summary,
                "weights only: no training data, no inputs, no labels",
                writes=str(out or ""),
            )
        ],
        inputs=[_input(model, "base" if model is pool.base else "expert") for model in pool.models],
        tensors=len(prepared.aligned),
        dtypes=dict(Counter(d.torch_name for d in prepared.dtypes.values())),
        bytes_in=read,
        bytes_out=out_bytes,
        peak_memory_bytes=_TORCH_BYTES + workers * need,
        disk_needed_bytes=out_bytes,
        disk_free_bytes=free_bytes(out or Path.cwd()),
        seconds=round(2.0 + read / rate, 1),
        time_basis=f"2 s to start, then {rate / GB:.2f} GB of input a second: {name}, {workers} threads, warm pages; "
        "a slower disk sets the pace",
        files=files,
        seeds=[request.seed],
        warnings=[str(warning) for warning in prepared.warnings],
        notes=request.notes
        + [f"`{alias}` is tied to `{name}`: merged once, stored once" for alias, name in prepared.tied.items()],
    )


def _input(model: Expert, role: str) -> Input:
    weights = model.weights
    kinds = dict(Counter(entry.dtype.torch_name for entry in weights.entries.values()))
    return Input(model.name, str(_checkpoint(model).path), role, len(weights.entries), weights.nbytes, kinds)


def run_merge(
    request: MergeRequest,
    out: Path,
    *,
    max_shard_size: int = 5 * GB,
    chunk_memory: int = GB,
    threads: int | None = None,
    overwrite: bool = False,
    progress: Any = None,
    card: Callable[[Prepared, str], str] | None = None,
) -> Path:
    """Merge into the folder `out`, which appears when it is whole. The same call goes on after a kill, with equal bits."""
    prepared = prepare(request, out, max_shard_size)
    for warning in prepared.warnings:
        warnings.warn(str(warning), SpoliaWarning, stacklevel=2)
    merge = merge_of(prepared, chunk_memory, threads or cores())
    merge.workers()
    with Staging(out, prepared.layout, key_of(prepared), overwrite=overwrite) as staging:
        with prepared.pool.opened():  # on leaving, that no input changed meanwhile
            _merge_into(staging, merge, prepared, progress)
        _accompany(prepared, staging, card)
        Checkpoint.open(staging.folder)  # what was written can be read back
        staging.finish()
    return out


def _merge_into(staging: Staging, merge: Merge, prepared: Prepared, progress: Any) -> None:
    if progress is not None:
        sizes = [merge.dtypes[tensor.name].size for tensor in merge.tensors]
        progress.start("merge", sum(size * t.numel for size, t in zip(sizes, merge.tensors, strict=True)), "B")
        finished = [part for part in merge.parts() if part.key in staging.done]
        progress.advance(sum((part.stop - part.start) * sizes[part.index] for part in finished))
    merge.run(_FileSink(staging, prepared.dtypes), staging.done, progress)
    if progress is not None:
        progress.finish()
    if prepared.request.method.masks() is not None:
        try:
            make_masks(merge, prepared.request.method, staging.folder, progress)
        except OSError as error:
            raise disk_error(error, staging.folder / FOLDER) from None


def _masks(method: Method, aligned: list[Aligned], pool: ExpertPool) -> dict[str, int]:
    """The mask files that the merged folder will hold, with their sizes."""
    if not method.settings_class().masked:
        return {}
    shapes = {tensor.name: tensor.shape for tensor in aligned if tensor.arithmetic}
    return {str(file_of(Path(), e.name)): mask_bytes(shapes, e.name, method.name) for e in pool.experts}


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


def key_of(prepared: Prepared) -> str:
    """Digest of everything the output depends on: only the same merge of the same files is gone on with."""
    request, pool = prepared.request, prepared.pool
    parts: list[Any] = [
        version("spolia"),
        request.method.name,
        request.seed,
        request.on_size_mismatch,
        *digest(request),
    ]
    parts += [[m.name, _checkpoint(m).fingerprint] for m in pool.models]
    parts += [[t.name, t.base, t.experts, t.shape, repr(request.settings_for(t.name))] for t in prepared.aligned]
    parts += [sorted((f, h.hex()) for f, h in prepared.layout.headers.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _accompany(prepared: Prepared, staging: Staging, card: Callable[[Prepared, str], str] | None) -> None:
    request = prepared.request
    for file in copied(request):
        if file.name != "config.json":
            staging.copy(file)
    for name, text in texts(request).items():
        staging.write_text(name, text)
    config = result_config(request, prepared.aligned, prepared.pool)
    if config is not None:
        staging.write_text("config.json", json.dumps(config, indent=2) + "\n")
    if request.recipe:
        staging.write_text(request.recipe_name, request.recipe)
    staging.write_text("spolia.json", json.dumps(_manifest(prepared), indent=2) + "\n")
    if card is not None:
        staging.write_text("README.md", card(prepared, staging.target.name))


def _manifest(prepared: Prepared) -> dict[str, Any]:
    """What made these weights: names and digests, no paths of this machine, no date, so equal runs give equal bytes."""
    request = prepared.request
    masks = _masks(request.method, prepared.aligned, prepared.pool)
    return {
        "made_by": f"spolia {version('spolia')}",
        "method": request.method.name,
        "seed": request.seed,
        "dtype": request.out_dtype,
        "recipe_sha256": hashlib.sha256(request.recipe.encode()).hexdigest(),
        "models": [
            {
                "name": model.name,
                "role": "base" if model is prepared.pool.base else "expert",
                "files": [
                    {"file": f, "bytes": size, "header_sha256": digest}
                    for f, size, _, digest in _checkpoint(model).fingerprint
                ],
            }
            for model in prepared.pool.models
        ],
        "tied": prepared.tied,
        **({"masks": list(masks)} if masks else {}),
    }


def card_facts(prepared: Prepared, name: str) -> dict[str, Any]:
    """What the model card of the merged folder `name` says; names only, no paths."""
    request, pool = prepared.request, prepared.pool
    return {
        "name": name,
        "method": request.method.name,
        "summary": request.method.summary,
        "paper": request.method.paper,
        "base": _described(pool.base) if pool.base is not None else None,
        "experts": [_described(expert) for expert in pool.experts],
        "dtype": request.out_dtype or ", ".join(sorted({d.torch_name for d in prepared.dtypes.values() if d.floating})),
        "parameters": sum(t.numel for t in prepared.aligned if t.arithmetic),
        "tensors": len(prepared.aligned),
        "recipe": request.recipe,
        "recipe_name": request.recipe_name,
        "data": {"merge": "weights only: no training data, no inputs, no labels"},
        "config": pool.models[0].weights.config,
        "results": None,
        "seed": request.seed,
        "versions": {"spolia": version("spolia"), "torch": version("torch")},
        "warnings": [str(warning) for warning in prepared.warnings],
        "limits": ["Not evaluated: a merge can be worse than every model that went into it. Test it on your tasks."],
    }


def _described(expert: Expert) -> dict[str, Any]:
    """Name and licence, when the model's own card states one."""
    card = _checkpoint(expert).folder / "README.md"
    found = None
    if card.is_file() and card.stat().st_size < 1_000_000:
        match = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        licence = re.search(r"^license:\s*([\w.\-]+)\s*$", match[1], re.MULTILINE) if match else None
        found = licence[1] if licence else None
    return {"name": expert.name, "license": found}
