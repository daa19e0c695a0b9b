"""Which layer a tensor belongs to, from names alone; and configs whose number of layers changes.

A stack is the prefix before the first `.number.` of a name (`model.layers` of `model.layers.3.mlp.up_proj.weight`). The
main stack is the one that holds most tensors. Other prefixes are stacks if they end in the same word or in one that
stacks of layers are known by; `classifier.0.weight` is none. What is in no stack is loose.
"""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

_LAYER = re.compile(r"(.+?)\.(\d{1,4})\.(.+)")
_STACKS = {"layers", "layer", "h", "block", "blocks", "resblocks"}
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")
_TEXT = ("text_config", "llm_config", "language_config")
_SIGHT = ("vision_config", "vit_config", "audio_config")
# Loose tensors that stand before the layers; all others (final norm, head, pooler) stand after them.
_BEFORE = re.compile(
    r"embed(?!_out)|wte|wpe|project_in|patch|cls_token|class_token|pos_|inv_freq|mask_token|pre_?layrnorm"
)
_PER_LAYER = re.compile(r"layer|block")  # keys of lists with one entry a layer
_NUMBERS = ("mlp_only_layers", "cross_attention_layers")  # keys of lists of layer numbers


class Layers:
    """The stacks of one model. `config` says how many layers the main one has: numbers beyond are extra heads."""

    def __init__(self, names: Iterable[str], config: Mapping[str, Any] | None = None):
        found = [match.groups()[:2] for match in map(_LAYER.match, names) if match]
        tally = Counter(prefix for prefix, _ in found)
        self.main = max(tally, key=tally.__getitem__) if tally else ""
        words = _STACKS | {self.main.rpartition(".")[2]}
        self.depth: dict[str, int] = {}  # layers of each stack
        for prefix, number in found:
            if prefix.rpartition(".")[2] in words:
                self.depth[prefix] = max(self.depth.get(prefix, 0), int(number) + 1)
        for prefix in self.depth:
            self.depth[prefix] = min(self._said(prefix, config) or self.depth[prefix], self.depth[prefix])

    @property
    def count(self) -> int:
        """Layers of the main stack."""
        return self.depth.get(self.main, 0)

    def _said(self, prefix: str, config: Mapping[str, Any] | None) -> int | None:
        if prefix != self.main and len(self.depth) > 1 and not re.search(r"(en|de)coder", prefix):
            return None
        place = count_place(config or {}, prefix)
        return place[0][place[1]] if place else None

    def of(self, tensor: str) -> tuple[str, int, str] | None:
        """(stack, layer, rest of the name); None for a loose tensor."""
        match = _LAYER.match(tensor)
        return (match[1], int(match[2]), match[3]) if match and match[1] in self.depth else None

    def position(self, tensor: str) -> float:
        """t in [0, 1]: layer i of n stands at i/(n-1), a stack's only layer at 1, what is loose at 0. A layer beyond the
        config's count (an extra prediction head) stands at 1."""
        place = self.of(tensor)
        return share(place[1], self.depth[place[0]]) if place else 0.0


def share(layer: int, count: int) -> float:
    """Where layer `layer` of `count` stands between 0 and 1."""
    return min(1.0, layer / (count - 1)) if count > 1 else 1.0


def before(tensor: str) -> bool:
    """True for a loose tensor that stands before the layers, such as the input embedding."""
    return bool(_BEFORE.search(tensor))


def _counted(config: Mapping[str, Any], stack: str) -> list[tuple[Any, str]]:
    """Every mapping in `config`, with its key, that says how many layers the stack has; all say the same."""
    keys = _COUNTS
    if "decoder" in stack:
        keys = ("num_decoder_layers", "decoder_layers", *_COUNTS)
    elif "encoder" in stack:
        keys = ("encoder_layers", *_COUNTS)
    sight = re.search(r"visi|vit\b|audio|image", stack)
    nested = [config[key] for key in (_SIGHT if sight else _TEXT) if isinstance(config.get(key), dict)]
    found = []
    for place in nested if sight else (config, *nested):
        key = next((key for key in keys if type(place.get(key)) is int and place[key] > 0), None)
        if key is not None and (not found or place[key] == found[0][0][found[0][1]]):
            found.append((place, key))
    return found


def count_place(config: Mapping[str, Any], stack: str) -> tuple[Any, str] | None:
    """The first mapping in `config`, and the key there, that say how many layers the stack has."""
    return next(iter(_counted(config, stack)), None)


def restacked(
    config: Mapping[str, Any], stack: str, kept: list[tuple[Mapping[str, Any] | None, int]]
) -> dict[str, Any]:
    """A copy of `config` for a model whose stack is made of `kept`: (config of the model it comes from, layer there).

    The count follows wherever it stands (`num_hidden_layers`, `text_config` …), and so do lists with one entry a layer
    (`layer_types`) and lists of layer numbers (`mlp_only_layers`).
    """
    config = copy.deepcopy(dict(config))
    for place, count in _counted(config, stack):
        before = place[count]
        place[count] = len(kept)
        for key, value in place.items():
            if not isinstance(value, list):
                continue
            if key in _NUMBERS:
                place[key] = [new for new, (of, old) in enumerate(kept) if old in _same(of, stack, key, value)]
            elif len(value) == before and _PER_LAYER.search(key):
                lists = [(_same(of, stack, key, value), old) for of, old in kept]
                place[key] = [own[old] if old < len(own) else value[min(old, before - 1)] for own, old in lists]
    return config


def _same(config: Mapping[str, Any] | None, stack: str, key: str, otherwise: list[Any]) -> list[Any]:
    """The list that another model's config holds under `key`."""
    found = count_place(config or {}, stack)
    value = found[0].get(key) if found else None
    return value if isinstance(value, list) else otherwise


def grouped(names: list[str], granularity: str, named: Mapping[str, str]) -> tuple[list[int], list[str]]:
    """The group of every tensor, as a place among the groups' names, which come second.

    `granularity`: task (one group), tensor, module, or block (a layer of a stack; what is loose goes by its module).
    `named` goes before it: regular expressions for whole names, and the group of what they match.
    """
    layers = Layers(names)

    def group(name: str) -> str:
        for pattern, called in named.items():
            if re.fullmatch(pattern, name):
                return called
        if granularity == "task":
            return "all"
        place = layers.of(name) if granularity == "block" else None
        if place is not None:
            return f"{place[0]}.{place[1]}"
        return name if granularity == "tensor" else name.rpartition(".")[0] or name

    called = [group(name) for name in names]
    order = {name: place for place, name in enumerate(dict.fromkeys(called))}
    return [order[name] for name in called], list(order)
