"""Where a merged model goes, and how one tells what is made there: the same merge of the same files, or another."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.staging import free_bytes
from spolia.errors import Problems
from spolia.parts.expert import Weights
from spolia.parts.lora import LoraWeights
from spolia.runs.along import digest
from spolia.runs.documents import checkpoint_of, manifest_text
from spolia.runs.request import MergeRequest

if TYPE_CHECKING:
    from spolia.runs.merging import Prepared

GB = 1_000_000_000
_LONGEST_NAME = 240  # bytes of a folder's name; systems take 255, and `.partial` is put behind it


def check_target(out: Path, nbytes: int, request: MergeRequest, problems: Problems) -> None:
    """No model is overwritten, and the disk holds the result."""
    whole = Path(os.path.abspath(out))
    try:
        if len(os.fsencode(whole.name)) > _LONGEST_NAME or "\0" in str(whole):
            raise ValueError
    except ValueError:
        problems.add(ascii(str(out))[:80], "no folder can be called this", "choose a shorter, plain name")
        return
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


def is_made(out: Path, prepared: Prepared) -> bool:
    """Whether `out` holds a whole merge made from this request."""
    try:
        return (out / "spolia.json").read_text(encoding="utf-8") == manifest_text(prepared)
    except (OSError, UnicodeDecodeError):
        return False


def is_newer(out: Path, prepared: Prepared) -> bool:
    """Whether `out` was finished after its inputs were last put in their place."""
    try:
        made = (out / "spolia.json").stat().st_mtime_ns
        stats = [file.stat() for model in prepared.pool.models for file in _files(model.weights)]
        return all(max(stat.st_mtime_ns, stat.st_ctime_ns) < made for stat in stats)
    except OSError:
        return False


def _files(weights: Weights) -> list[Path]:
    if isinstance(weights, LoraWeights):
        return [*_files(weights.base), *_files(weights.adapter.weights)]
    checkpoint = weights.checkpoint
    return [checkpoint.folder / file for file, *_ in checkpoint.fingerprint] if checkpoint is not None else []


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
    parts += [[m.name, checkpoint_of(m).fingerprint] for m in pool.models]
    parts += [step.to_dict() for step in request.preprocess]
    parts += [[t.name, t.base, t.experts, t.shape, repr(request.settings_for(t.name))] for t in prepared.aligned]
    parts += [sorted((f, h.hex()) for f, h in prepared.layout.headers.items())]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def agreement(prepared: Prepared) -> dict[str, str]:
    """What processes that share a merge must have in common, in words or digests."""
    request = prepared.request

    def short(value: Any) -> str:
        return hashlib.sha256(json.dumps(value).encode()).hexdigest()

    models = [[model.name, checkpoint_of(model).fingerprint] for model in prepared.pool.models]
    return {
        "spolia": version("spolia"),
        "torch": version("torch"),
        "method": request.method.name,
        "seed": str(request.seed),
        "dtype": request.out_dtype or "as stored",
        "models": short(models),
        "settings": short([[t.name, repr(request.settings_for(t.name))] for t in prepared.aligned]),
        "preprocess": short([step.to_dict() for step in request.preprocess]),
        "recipe": short(request.recipe),
        "files of the result": short(sorted((f, h.hex()) for f, h in prepared.layout.headers.items())),
        "all": key_of(prepared),
    }
