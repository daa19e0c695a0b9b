"""Do these models fit together? Tensor by tensor, from names, shapes and dtypes alone, before anything is read."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from spolia.core.checkpoint import Dtype, natural
from spolia.errors import Problem, Problems
from spolia.parts.expert import Entry, Expert, ExpertPool, Weights

# Buffers that some exports store and others leave out; whoever has them lends them.
_OPTIONAL = re.compile(
    r"(rotary_emb\.inv_freq|position_ids|masked_bias|attn\.bias|num_batches_tracked|token_type_ids)$"
)
_HEADS = {
    "lm_head.weight",
    "embed_out.weight",
    "output.weight",
    "cls.predictions.decoder.weight",
    "language_model.lm_head.weight",
}
_EMBEDDINGS = (
    "model.embed_tokens.weight", "transformer.wte.weight", "wte.weight", "embed_tokens.weight", "tok_embeddings.weight",
    "shared.weight", "gpt_neox.embed_in.weight", "bert.embeddings.word_embeddings.weight",
    "roberta.embeddings.word_embeddings.weight", "language_model.model.embed_tokens.weight",
    "model.language_model.embed_tokens.weight",
)  # fmt: skip
_ROWS = re.compile(
    r"(^|\.)(embed_tokens(_per_layer)?|wte|tok_embeddings|word_embeddings|shared|embed_in|embed_out|lm_head|"
    r"predictions\.decoder)\.(weight|bias)$|^output\.weight$|predictions\.bias$|final_logits_bias$"
)
_MANY = 4  # missing tensors of one model that are still listed one by one
Where = tuple[int, str]
"""A tensor of a pool: index in `pool.models`, name there."""


@dataclass(frozen=True)
class Wire:
    """Which tensors go into one output tensor, where that is not the tensor of the same name in every model."""

    base: Where | None
    experts: tuple[Where, ...]

    @property
    def ends(self) -> tuple[Where, ...]:
        return (*((self.base,) if self.base is not None else ()), *self.experts)


@dataclass(frozen=True)
class Aligned:
    """One output tensor and where its inputs lie: (model index in `pool.models`, tensor name there)."""

    name: str
    shape: tuple[int, ...]
    stored: Dtype  # type of the donor's copy
    base: Where | None
    experts: tuple[Where, ...]
    places: tuple[int, ...]  # which experts those are
    arithmetic: bool  # False: copied from the first that has it
    wide: bool = False  # True where some model stores it in fp64, so that the arithmetic is

    @property
    def ends(self) -> tuple[Where, ...]:
        return (*((self.base,) if self.base is not None else ()), *self.experts)

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


def align(
    pool: ExpertPool,
    problems: Problems,
    on_size_mismatch: Literal["refuse", "truncate"] = "refuse",
    wiring: Mapping[str, Wire] | None = None,
) -> tuple[list[Aligned], dict[str, str]]:
    """Output tensors in natural order, and the names left out because they are tied: alias -> the tensor they repeat.

    `wiring` names the inputs of every output tensor; without it they are the tensors of its name in all models.
    Everything that does not fit goes into `problems`, naming model, tensor and cure.
    """
    models = pool.models
    _same_architecture(models, problems)
    tied = _tied(models)
    if wiring is not None:
        tied = {alias: name for alias, name in tied.items() if alias in wiring and name in wiring}
    wires = _straight(pool) if wiring is None else wiring
    wires = {name: wires[name] for name in sorted(wires, key=natural) if name not in tied}
    lacking = _missing(models, wires, problems)
    aligned = []
    for name, wire in wires.items():
        if name not in lacking and (tensor := _line_up(name, wire, pool, problems, on_size_mismatch)) is not None:
            aligned.append(tensor)
    return aligned, tied


def _straight(pool: ExpertPool) -> dict[str, Wire]:
    """Every name with all models."""
    names = dict.fromkeys(name for model in pool.models for name in model.weights.entries)
    first = 0 if pool.base is None else 1
    places = range(first, len(pool.models))
    return {name: Wire((0, name) if first else None, tuple((i, name) for i in places)) for name in names}


def _line_up(name: str, wire: Wire, pool: ExpertPool, problems: Problems, on_mismatch: str) -> Aligned | None:
    models, first = pool.models, 0 if pool.base is None else 1
    ends = [(i, resolve(models[i], wanted)) for i, wanted in wire.ends]
    have = [(i, source) for i, source in ends if source is not None]
    if not have:
        return None  # an optional tensor that none of them has
    base = have[0] if wire.base is not None and ends[0][1] is not None else None
    experts = tuple(have[1:] if base is not None else have)
    entries = [models[i].weights.entries[source] for i, source in have]
    shape = _common_shape(name, models, have, entries, problems, on_mismatch)
    floating = {entry.dtype.floating for entry in entries}
    if len(floating) == 2:
        kinds = ", ".join(f"{models[i].name} {e.dtype.torch_name}" for (i, _), e in zip(have, entries, strict=True))
        problems.add(
            name, f"is a number in one model and an integer in another: {kinds}", "use the same release of all"
        )
        return None
    if shape is None:
        return None
    merges = True in floating and bool(experts) and (wire.base is None or base is not None)
    if True in floating and not merges:
        why = "no expert has it" if base else "the base lacks it"
        problems.warn(name, f"copied from {models[have[0][0]].name}: {why}")
    wide = any(entry.dtype.code == "F64" for entry in entries)
    return Aligned(name, shape, entries[0].dtype, base, experts, tuple(i - first for i, _ in experts), merges, wide)


def resolve(model: Expert, name: str) -> str | None:
    """The model's own name for `name`; a head that it does not store is its input embedding, if it ties the two."""
    if name in model.weights.entries:
        return name
    if name in _HEADS and ties(model.weights.config) is not False:
        return next((e for e in _EMBEDDINGS if e in model.weights.entries), None)
    return None


def ties(config: Mapping[str, Any] | None) -> bool | None:
    """Whether the config says that the head is the input embedding; None when it does not say."""
    for place in (config or {}, (config or {}).get("text_config")):
        if isinstance(place, Mapping) and "tie_word_embeddings" in place:
            return bool(place["tie_word_embeddings"])
    return None


def tied_embedding(weights: Weights) -> str | None:
    """The input embedding that is the head as well, which is then not stored."""
    if any(head in weights.entries for head in _HEADS) or ties(weights.config) is not True:
        return None
    return next((e for e in _EMBEDDINGS if e in weights.entries), None)


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
    if ties(donor.config):
        embedding = next((e for e in _EMBEDDINGS if e in donor.entries), None)
        for head in sorted(_HEADS & {name for m in models for name in m.weights.entries}):
            owners = [m.weights for m in models if head in m.weights.entries]
            if embedding is not None and all(
                ties(w.config) and w.entries[head].shape[1:] == donor.entries[embedding].shape[1:] for w in owners
            ):
                tied[head] = embedding
    return tied


def _shares(entries: dict[str, Entry], a: str, b: str) -> bool:
    return a in entries and b in entries and entries[a].storage == entries[b].storage


def _missing(models: list[Expert], wires: Mapping[str, Wire], problems: Problems) -> set[str]:
    """Output names for which some model lacks its tensor without leave."""
    lacking: dict[int, list[tuple[str, str]]] = {}  # model -> (output name, the tensor it lacks)
    owners: dict[str, int] = {}
    for name, wire in wires.items():
        found = [(i, wanted, resolve(models[i], wanted)) for i, wanted in wire.ends]
        if all(source is not None for _, _, source in found) or _OPTIONAL.search(name) or name in _HEADS:
            continue
        owners[name] = next((i for i, _, source in found if source is not None), found[0][0])
        for i, wanted, source in found:
            if source is None:
                lacking.setdefault(i, []).append((name, wanted))
    for i, pairs in lacking.items():
        name, wanted = pairs[0]
        owner = models[owners[name]]
        if len(pairs) > _MANY:
            cure = f"{_layers(models[i], owner)}merge only models of one architecture and depth"
            problems.add(models[i].name, f"lacks {len(pairs)} tensors that {owner.name} has, first `{wanted}`", cure)
            continue
        for name, wanted in pairs:
            owner = models[owners[name]]
            own = [other for other in models[i].weights.entries if other not in owner.weights.entries]
            near = difflib.get_close_matches(wanted, own, 1, 0.85)
            cure = f"it has `{near[0]}`: rename that; or " if near else ""
            what = f"lacks tensor `{wanted}`, which {owner.name} has"
            problems.add(models[i].name, what, cure + "use complete fine-tunes of one base")
    return {name for pairs in lacking.values() for name, _ in pairs}


def _layers(a: Expert, b: Expert) -> str:
    def said(model: Expert, key: str) -> Any:
        config = model.weights.config or {}
        text = config.get("text_config")  # where models with several towers keep the language model's
        return config.get(key, text.get(key) if isinstance(text, Mapping) else None)

    for key in ("num_hidden_layers", "n_layer", "num_layers"):
        mine, theirs = said(a, key), said(b, key)
        if mine is not None and theirs is not None and mine != theirs:
            return f"{a.name} has {mine} layers, {b.name} {theirs}: "
    return ""


def _same_architecture(models: list[Expert], problems: Problems) -> None:
    """By type; where configs do not say it, by the first of their architectures."""
    types: list[tuple[str, Any]] = []
    architectures: list[tuple[str, Any]] = []
    for model in models:
        config = model.weights.config or {}
        listed = config.get("architectures")
        if config.get("model_type"):
            types.append((model.name, config["model_type"]))
        elif isinstance(listed, list) and listed and listed[0] is not None:
            architectures.append((model.name, listed[0]))
    for known in (types, architectures):
        for name, other in known[1:]:
            if other != known[0][1]:
                what = f"is a {str(other)[:60]} model, {known[0][0]} a {str(known[0][1])[:60]}"
                problems.add(name, what, "merge models of one architecture")


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
    rows_only = len({shape[1:] for shape in shapes}) == 1 and len(shapes[0]) in (1, 2) and vocabulary_rows(name)
    if rows_only and on_mismatch == "truncate":
        rows = min(shape[0] for shape in shapes)
        problems.warn(name, f"cut to its first {rows} rows", "vocabularies differ in size")
        return (rows, *shapes[0][1:])
    cure = "merge fine-tunes of one base"
    if rows_only:
        cure = (
            "the vocabularies differ: line the tokens up (`tokenizer: {source: union}` in a mergekit recipe), or set "
            "`on_size_mismatch: truncate`"
        )
    problems.add(
        name,
        f"is {list(shapes[0])} in {models[have[0][0]].name} but {list(shapes[other])} in {models[have[other][0]].name}",
        cure,
    )
    return None


def vocabulary_rows(name: str) -> bool:
    """True for a tensor with one row a token: input embedding, head, and the head's bias."""
    return bool(_ROWS.search(name)) and not re.search(r"\.\d+\.|position|token_type", name)


def warnings_of(pool: ExpertPool) -> list[Problem]:
    """What headers show to be odd without being wrong."""
    found = []
    for model in pool.models:
        found += [Problem(model.name, note) for note in getattr(model.weights.checkpoint, "notes", ())]
        unlisted = model.weights.checkpoint.unlisted if model.weights.checkpoint is not None else []
        if unlisted:
            found.append(
                Problem(model.name, f"{len(unlisted)} tensors lie in shards but not in the index, e.g. `{unlisted[0]}`")
            )
    return found
