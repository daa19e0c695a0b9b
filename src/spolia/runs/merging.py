"""Merging checkpoints on disk: check everything headers can show, lay the output out, stream, and rename when whole."""

from __future__ import annotations

import hashlib
import json
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
from spolia.core.layout import Layout, Slot, Staging, free_bytes
from spolia.core.lazy import torch
from spolia.core.stream import cores, worker_bytes
from spolia.errors import Problem, Problems, SpoliaError, SpoliaWarning
from spolia.parts.align import Aligned, align, warnings_of
from spolia.parts.expert import Expert, ExpertPool, FileWeights
from spolia.parts.merging import Merge, affordable_workers
from spolia.runs.plan import Input, Phase, Plan
from spolia.runs.request import MergeRequest, ModelRef

if TYPE_CHECKING:
    from torch import Tensor

GB = 1_000_000_000
_TORCH_BYTES = 230_000_000  # a process that has imported torch and read a recipe
_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)$|\.index\.json$")
_DONATED = re.compile(
    r"^(.*config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|chat_template\..*|.*\.jinja|.*\.tiktoken|.*\.py)$"
)
# Input bytes a second that two cores merge with warm pages: docs/results/merge_speed.json.
_RATES = {
    "average": 1.8e9, "task_arithmetic": 1.8e9, "slerp": 1.3e9, "ties": 0.40e9, "dare": 0.7e9, "dare_ties": 0.6e9,
    "della": 0.11e9, "della_linear": 0.11e9, "breadcrumbs": 0.35e9, "breadcrumbs_ties": 0.33e9,
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
    fit_pool(request.method, pool, problems)
    aligned, tied = align(pool, problems, request.on_size_mismatch)
    problems.raise_if_any()
    problems.warnings.extend(warnings_of(pool))
    if request.check_tensors is not None:
        problems.warnings.extend(request.check_tensors([tensor.name for tensor in aligned]))
    dtypes = output_dtypes(aligned, request.out_dtype)
    slots = [Slot(tensor.name, dtypes[tensor.name], tensor.shape) for tensor in aligned]
    layout = Layout.of(slots, max_shard_size)
    if out is not None:
        _check_target(out, layout, pool, problems)
    problems.raise_if_any()
    return Prepared(request, pool, aligned, tied, dtypes, layout, problems.warnings)


def _open(request: MergeRequest, problems: Problems) -> ExpertPool:
    pool, opened = ExpertPool([]), dict[Path, FileWeights]()

    def expert(ref: ModelRef) -> Expert | None:
        try:
            if ref.path not in opened:
                opened[ref.path] = FileWeights.open(ref.path)
            return Expert(ref.name, opened[ref.path])
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
        what = "does not use the base: it is left aside"
        problems.warn(method.name, what, "list it among the experts if it should take part")
        pool.base = None
    if settings.base == "optional":  # slerp: two models in all
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


def _check_target(out: Path, layout: Layout, pool: ExpertPool, problems: Problems) -> None:
    for model in pool.models:
        if out.resolve() == _checkpoint(model).folder.resolve():
            problems.add(str(out), f"is the folder of {model.name}", "write the merged model somewhere else")
    partial = out.with_name(out.name + ".partial")
    held = sum(f.stat().st_blocks * 512 for f in partial.iterdir() if f.is_file()) if partial.is_dir() else 0
    free = free_bytes(out) + held
    if layout.nbytes > free:
        what = f"needs {layout.nbytes / GB:.2f} GB, {free / GB:.2f} GB are free"
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
    count, wide = len(pool.experts), any(t.stored.code == "F64" for t in prepared.aligned)
    workers = affordable_workers(prepared.aligned, count, threads or cores(), chunk_memory, request.settings_for)
    read = sum(model.weights.nbytes for model in pool.models)
    rate = _RATES.get(request.method.name, 0.3e9) * workers / 2
    files = [*layout.sizes, *(["model.safetensors.index.json"] if layout.index else [])]
    files += [f.name for f in _donated(prepared)] + ["README.md", request.recipe_name, "spolia.json"]
    name = request.method.name
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
        bytes_out=layout.nbytes,
        peak_memory_bytes=_TORCH_BYTES + workers * worker_bytes(count, wide),
        disk_needed_bytes=layout.nbytes,
        disk_free_bytes=free_bytes(out or Path.cwd()),
        seconds=round(2.0 + read / rate, 1),
        time_basis=f"2 s to start, then {rate / GB:.2f} GB of input a second: {name}, {workers} threads, warm pages; "
        "a slower disk sets the pace",
        files=files,
        seeds=[request.seed],
        warnings=[str(warning) for warning in prepared.warnings],
        notes=[f"`{alias}` is tied to `{name}`: merged once, stored once" for alias, name in prepared.tied.items()],
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
    with prepared.pool.opened(), Staging(out, prepared.layout, _key(prepared), overwrite=overwrite) as staging:
        if progress is not None:
            progress.start("merge", prepared.layout.nbytes, "B")
            finished = {part.key: part for part in merge.parts() if part.key in staging.done}
            progress.advance(
                sum((p.stop - p.start) * merge.dtypes[merge.tensors[p.index].name].size for p in finished.values())
            )
        merge.run(_FileSink(staging, prepared.dtypes), staging.done, progress)
        if progress is not None:
            progress.finish()
        _accompany(prepared, staging, card)
        Checkpoint.open(staging.folder)  # what was written can be read back
        staging.finish()
    return out


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


def _key(prepared: Prepared) -> str:
    """Digest of everything the output depends on: only the same merge of the same files is gone on with."""
    request, pool = prepared.request, prepared.pool
    parts: list[Any] = [version("spolia"), request.method.name, request.seed, request.on_size_mismatch]
    parts += [[m.name, _checkpoint(m).fingerprint] for m in pool.models]
    parts += [[t.name, t.base, t.experts, t.shape, repr(request.settings_for(t.name))] for t in prepared.aligned]
    parts += [sorted((f, h.hex()) for f, h in prepared.layout.headers.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def _donor(prepared: Prepared) -> Path | None:
    ref = prepared.request.donor or prepared.request.base or prepared.request.experts[0]
    return ref.path if ref.path.is_dir() else None


def _donated(prepared: Prepared) -> list[Path]:
    """Config, tokenizer and generation files of the donor. Code files go along: a config may name them."""
    donor = _donor(prepared)
    if donor is None:
        return []
    return sorted(f for f in donor.iterdir() if f.is_file() and _DONATED.match(f.name) and not _WEIGHTS.search(f.name))


def _accompany(prepared: Prepared, staging: Staging, card: Callable[[Prepared, str], str] | None) -> None:
    for file in _donated(prepared):
        if file.name != "config.json":
            staging.copy(file)
    donor = _donor(prepared)
    if donor is not None and (donor / "config.json").is_file():
        staging.write_text("config.json", json.dumps(_config(prepared, donor), indent=2) + "\n")
    request = prepared.request
    if request.recipe:
        staging.write_text(request.recipe_name, request.recipe)
    staging.write_text("spolia.json", json.dumps(_manifest(prepared), indent=2) + "\n")
    if card is not None:
        staging.write_text("README.md", card(prepared, staging.target.name))


def _config(prepared: Prepared, donor: Path) -> dict[str, Any]:
    config = json.loads((donor / "config.json").read_bytes())
    if prepared.request.out_dtype:
        for key in ("torch_dtype", "dtype"):
            if key in config:
                config[key] = prepared.request.out_dtype
    for tensor in prepared.aligned:  # a vocabulary that was cut
        if tensor.arithmetic and "embed" in tensor.name and len(tensor.shape) == 2 and "vocab_size" in config:
            entries = [m.weights.entries.get(tensor.name) for m in prepared.pool.models]
            if any(e is not None and e.shape != tensor.shape for e in entries):
                config["vocab_size"] = tensor.shape[0]
    return config


def _manifest(prepared: Prepared) -> dict[str, Any]:
    """What made these weights: names and digests, no paths of this machine, no date, so equal runs give equal bytes."""
    request = prepared.request
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
