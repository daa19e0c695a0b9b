"""Do these models fit together? Tensor by tensor, from names, shapes and dtypes alone, before anything is read."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, Literal

from spolia.core.checkpoint import Dtype, natural
from spolia.errors import Problem, Problems
from spolia.parts.expert import Entry, Expert, ExpertPool

# Buffers that some exports store and others leave out; whoever has them lends them.
_OPTIONAL = re.compile(
    r"(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|num_batches_tracked|token_type_ids)$"
)
_HEADS = {"lm_head.weight", "embed_out.weight", "output.weight", "cls.predictions.decoder.weight"}
_EMBEDDINGS = (
    "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "embed_tokens.weight", "tok_embeddings.weight",
    "shared.weight", "gpt_neox.embed_in.weight", "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight", "language_model.model.embed_tokens.weight",
)  # fmt: skip
_MANY = 4  # missing tensors of one model that are still listed one by one


@dataclass(frozen=True)
class Aligned:
    """One output tensor and where its inputs lie: (model index in `pool.models`, tensor name there)."""

    name: str
    shape: tuple[int, ...]
    stored: Dtype  # type of the donor's copy
    base: tuple[int, str] | None
    experts: tuple[tuple[int, str], ...]
    places: tuple[int, ...]  # which experts those are
    arithmetic: bool  # False: copied from the first that has it

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def align(
    pool: ExpertPool, problems: Problems, on_size_mismatch: Literal["refuse", "truncate"] = "refuse"
) -> tuple[list[Aligned], dict[str, str]]:
    """Output tensors in natural order, and the names left out because they are tied: alias -> the tensor they repeat.

    Everything that does not fit goes into `problems`, naming model, tensor and cure.
    """
    models = pool.models
    _same_architecture(models, problems)
    tied = _tied(models)
    names = sorted({n for m in models for n in m.weights.entries if n not in tied}, key=natural)
    found = {name: [_resolve(m, name) for m in models] for name in names}
    lacking = _missing(models, found, problems)
    aligned = []
    for name in names:
        if name in lacking:
            continue
        have = [(i, source) for i, source in enumerate(found[name]) if source is not None]
        entries = [models[i].weights.entries[source] for i, source in have]
        shape = _common_shape(name, models, have, entries, problems, on_size_mismatch)
        floating = {entry.dtype.floating for entry in entries}
        if len(floating) == 2:
            kinds = ", ".join(f"{models[i].name} {e.dtype.torch_name}" for (i, _), e in zip(have, entries, strict=True))
            problems.add(
                name, f"is a number in one model and an integer in another: {kinds}", "use the same release of all"
            )
            continue
        if shape is None:
            continue
        first = 1 if pool.base is not None else 0
        base = next(((i, s) for i, s in have if i < first), None)
        experts = tuple((i, s) for i, s in have if i >= first)
        merges = True in floating and bool(experts) and (pool.base is None or base is not None)
        if True in floating and not merges:
            problems.warn(
                name, f"copied from {models[have[0][0]].name}: " + ("no expert has it" if base else "the base lacks it")
            )
        aligned.append(
            Aligned(name, shape, entries[0].dtype, base, experts, tuple(i - first for i, _ in experts), merges)
        )
    return aligned, tied


def _resolve(model: Expert, name: str) -> str | None:
    """The model's own name for `name`; a head that it does not store is its input embedding, if it ties the two."""
    if name in model.weights.entries:
        return name
    if name in _HEADS and (model.weights.config or {}).get("tie_word_embeddings", True):
        return next((e for e in _EMBEDDINGS if e in model.weights.entries), None)
    return None


def _tied(models: list[Expert]) -> dict[str, str]:
    """Names that repeat another tensor in every model that has them, by shared memory or by the donor's config."""
    donor = models[0].weights
    tied: dict[str, str] = {}
    first_at: dict[object, str] = {}
    for name, entry in donor.entries.items():
        if entry.storage is None:
            continue
        first = first_at.setdefault(entry.storage, name)
        if first != name and all(_shares(m.weights.entries, first, name) for m in models):
            tied[name] = first
    if (donor.config or {}).get("tie_word_embeddings"):
        for head in _HEADS & donor.entries.keys():
            embedding = next((e for e in _EMBEDDINGS if e in donor.entries), None)
            if embedding is not None and donor.entries[embedding].shape == donor.entries[head].shape:
                tied[head] = embedding
    return tied


def _shares(entries: dict[str, Entry], a: str, b: str) -> bool:
    return a in entries and b in entries and entries[a].storage == entries[b].storage


def _missing(models: list[Expert], found: dict[str, list[str | None]], problems: Problems) -> set[str]:
    """Names some model lacks without leave."""
    lacking: dict[int, list[str]] = {}
    for name, sources in found.items():
        if None in sources and not _OPTIONAL.search(name) and name not in _HEADS:
            for i, source in enumerate(sources):
                if source is None:
                    lacking.setdefault(i, []).append(name)
    for i, names in lacking.items():
        owner = next(m for m in models if names[0] in m.weights.entries)
        if len(names) > _MANY:
            cure = f"{_layers(models[i], owner)}merge only models of one architecture and depth"
            problems.add(models[i].name, f"lacks {len(names)} tensors that {owner.name} has, first `{names[0]}`", cure)
            continue
        for name in names:
            problems.add(
                models[i].name, f"lacks tensor `{name}`, which {owner.name} has", "use complete fine-tunes of one base"
            )
    return {name for names in lacking.values() for name in names}


def _layers(a: Expert, b: Expert) -> str:
    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        mine, theirs = ((m.weights.config or {}).get(key) for m in (a, b))
        if mine is not None and theirs is not None and mine != theirs:
            return f"{a.name} has {mine} layers, {b.name} {theirs}: "
    return ""


def _same_architecture(models: list[Expert], problems: Problems) -> None:
    def kind(model: Expert) -> Any:
        config = model.weights.config or {}
        return config.get("model_type") or (config.get("architectures") or [None])[0]

    known = [(m.name, kind(m)) for m in models if kind(m) is not None]
    for name, other in known[1:]:
        if other != known[0][1]:
            problems.add(name, f"is a {other} model, {known[0][0]} a {known[0][1]}", "merge models of one architecture")


def _common_shape(
    name: str,
    models: list[Expert],
    have: list[tuple[int, str]],
    entries: list[Entry],
    problems: Problems,
    on_mismatch: str,
) -> tuple[int, ...] | None:
    shapes = [entry.shape for entry in entries]
    if all(shape == shapes[0] for shape in shapes):
        return shapes[0]
    other = next(n for n, shape in enumerate(shapes) if shape != shapes[0])
    rows_only = len({shape[1:] for shape in shapes}) == 1 and len(shapes[0]) == 2
    if rows_only and on_mismatch == "truncate":
        rows = min(shape[0] for shape in shapes)
        problems.warn(name, f"cut to its first {rows} rows", "vocabularies differ in size")
        return (rows, shapes[0][1])
    cure = "merge fine-tunes of one base"
    if rows_only and ("embed" in name or "wte" in name or name in _HEADS):
        cure = "the vocabularies differ: resize one model's embeddings first, or set `on_size_mismatch: truncate`"
    problems.add(
        name,
        f"is {list(shapes[0])} in {models[have[0][0]].name} but {list(shapes[other])} in {models[have[other][0]].name}",
        cure,
    )
    return None


def warnings_of(pool: ExpertPool) -> list[Problem]:
    """What headers show to be odd without being wrong."""
    found = []
    for model in pool.models:
        unlisted = model.weights.checkpoint.unlisted if model.weights.checkpoint is not None else []
        if unlisted:
            found.append(
                Problem(model.name, f"{len(unlisted)} tensors lie in shards but not in the index, e.g. `{unlisted[0]}`")
            )
    return found
