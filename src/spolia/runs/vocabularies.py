"""What the models of a pool say beside their weights: tokenizers and configs, and where they differ from the base."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from spolia.parts.expert import ExpertPool
from spolia.parts.vocabulary import Vocabulary, read_vocabulary

# Says who saved the model and how, not what it is.
_BESIDE = {"_name_or_path", "name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}


def vocabularies(pool: ExpertPool) -> list[dict[str, Any]]:
    """For each model, base first: size of its tokenizer, added tokens, config's vocab_size, and what differs from the base."""
    found: list[dict[str, Any]] = []
    first: Vocabulary | None = None
    for model in pool.models:
        place = model.weights.checkpoint
        own = read_vocabulary(place.folder, model.name) if place is not None else None
        first = own if model is pool.base else first
        config = dict(_flat(model.weights.config or {}))
        sizes = [value for key, value in config.items() if key in ("vocab_size", "text_config.vocab_size")]
        found.append(
            {
                "model": model.name,
                "tokens": len(own.tokens) if own is not None and own.tokens is not None else None,
                "added_tokens": len(own.added) if own is not None and own.data is not None else None,
                "config_vocab_size": sizes[0] if sizes else None,
                "against_base": "" if model is pool.base else _difference(own, first),
            }
        )
    return found


def _difference(own: Vocabulary | None, base: Vocabulary | None) -> str:
    if own is None or base is None:
        return (
            "no tokenizer" if own is None and base is None else "no tokenizer here" if own is None else "base has none"
        )
    if own.same(base):
        return "same"
    if own.tokens is None or base.tokens is None:
        return "another file"
    more, fewer = own.tokens.keys() - base.tokens.keys(), base.tokens.keys() - own.tokens.keys()
    moved = sum(base.tokens.get(token, number) != number for token, number in own.tokens.items())
    counts = [(len(more), "more"), (len(fewer), "fewer"), (moved, "with another id")]
    return "tokens: " + ", ".join(f"{count} {what}" for count, what in counts if count)


def config_differences(pool: ExpertPool) -> list[dict[str, Any]]:
    """Config entries on which the models that have a config do not agree: key, and value by model (null: absent)."""
    configs = {m.name: dict(_flat(m.weights.config)) for m in pool.models if m.weights.config is not None}
    found = []
    for key in dict.fromkeys(key for config in configs.values() for key in config):
        values = {name: config.get(key) for name, config in configs.items()}
        if key.rpartition(".")[2] not in _BESIDE and any(v != next(iter(values.values())) for v in values.values()):
            found.append({"key": key, "values": values})
    return found


def _flat(config: Mapping[str, Any], above: str = "", depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Nested mappings as `text_config.vocab_size`; deeper than eight levels they stay as they are."""
    for key, value in config.items():
        if isinstance(value, Mapping) and depth < 8:
            yield from _flat(value, f"{above}{key}.", depth + 1)
        else:
            yield f"{above}{key}", value
