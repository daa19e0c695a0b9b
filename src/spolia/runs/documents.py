"""What lies beside the weights of a merged model: config and tokenizer, recipe, manifest, and the facts of its card."""

from __future__ import annotations

import hashlib
import json
import re
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import Method
from spolia.core.checkpoint import Checkpoint
from spolia.core.staging import Staging
from spolia.parts.align import Aligned
from spolia.parts.expert import Expert, ExpertPool
from spolia.parts.masks import file_of, mask_bytes
from spolia.runs.preprocessing import went_through

if TYPE_CHECKING:
    from spolia.runs.merging import Card, Prepared


def accompany(prepared: Prepared, staging: Staging, card: Card | None) -> None:
    request = prepared.request
    for file in prepared.beside.copied:
        staging.copy(file)
    for name, text in prepared.beside.texts.items():
        staging.write_text(name, text)
    if request.recipe:
        staging.write_text(request.recipe_name, request.recipe)
    staging.write_text("spolia.json", manifest_text(prepared))
    if card is not None:
        staging.write_text("README.md", card(prepared, staging.target.name))


def manifest_text(prepared: Prepared) -> str:
    return json.dumps(manifest(prepared), indent=2) + "\n"


def manifest(prepared: Prepared) -> dict[str, Any]:
    """What made these weights: names and digests, no paths of this machine, no date, so equal runs give equal bytes."""
    request = prepared.request
    masks = masks_beside(request.method, prepared.aligned, prepared.pool)
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
                    for f, size, _, digest in checkpoint_of(model).fingerprint
                ],
            }
            for model in prepared.pool.models
        ],
        "tied": prepared.tied,
        **({"masks": list(masks)} if masks else {}),
        **({"preprocess": [step.to_dict() for step in request.preprocess]} if request.preprocess else {}),
    }


def card_facts(prepared: Prepared, name: str) -> dict[str, Any]:
    """What the model card of the merged folder `name` says; names only, no paths."""
    request, pool = prepared.request, prepared.pool
    return {
        "name": name,
        "method": request.method.name,
        "summary": request.method.summary + went_through(request.preprocess),
        "paper": request.method.paper,
        "base": described(pool.base) if pool.base is not None else None,
        "experts": [described(expert) for expert in pool.experts],
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


def described(expert: Expert) -> dict[str, Any]:
    """Name and licence, when the model's own card states one."""
    card = checkpoint_of(expert).folder / "README.md"
    found = None
    if card.is_file() and card.stat().st_size < 1_000_000:
        match = re.match(r"---\n(.*?)\n---", card.read_text(errors="replace"), re.DOTALL)
        licence = re.search(r"^license:\s*([\w.\-]+)\s*$", match[1], re.MULTILINE) if match else None
        found = licence[1] if licence else None
    return {"name": expert.name, "license": found}


def masks_beside(method: Method, aligned: list[Aligned], pool: ExpertPool) -> dict[str, int]:
    """The mask files that the merged folder will hold, with their sizes."""
    if not method.settings_class().masked:
        return {}
    shapes = {tensor.name: tensor.shape for tensor in aligned if tensor.arithmetic}
    return {str(file_of(Path(), e.name)): mask_bytes(shapes, e.name, method.name) for e in pool.experts}


def checkpoint_of(model: Expert) -> Checkpoint:
    assert model.weights.checkpoint is not None  # requests name models on disk
    return model.weights.checkpoint
