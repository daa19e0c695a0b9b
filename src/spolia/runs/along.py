"""What goes along with merged weights: the donor's config made to fit them, tokenizer files, chat template.

And `dress`: models whose embeddings follow the tokenizer that goes along.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia.errors import Problems, SpoliaError
from spolia.parts.align import Aligned, ties, vocabulary_rows
from spolia.parts.expert import Expert, ExpertPool, Weights
from spolia.parts.inputs import Inputs
from spolia.parts.rows import TokenWeights
from spolia.parts.vocabulary import json_text, read_mapping
from spolia.runs.request import MergeRequest, ModelRef

_WEIGHTS = re.compile(r"\.(safetensors|bin|pt|pth|ckpt|gguf|h5|msgpack|onnx)$|\.index\.json$")
_DONATED = re.compile(
    r"^(.*config\.json|tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|chat_template\..*|.*\.jinja|.*\.tiktoken|.*\.py)$"
)
_TOKENIZER = re.compile(
    r"^(tokenizer.*|special_tokens_map\.json|added_tokens\.json|vocab\..*|merges\.txt|.*\.model|.*\.tiktoken)$"
)
_TEMPLATE = re.compile(r"^(chat_template\..*|.*\.jinja)$")
_REMOVE = "restore the file, or remove it: models work without"
_IDS = re.compile(r"^(bos|eos|pad|unk|sep|cls|mask|decoder_start|forced_bos|forced_eos)_token_id$")


def donor_of(request: MergeRequest) -> Path | None:
    """The folder whose config and generation files go along; None for a model that is one file."""
    ref = request.donor or request.base or request.experts[0]
    return ref.path if ref.path.is_dir() else None


@dataclass(frozen=True)
class Beside:
    """All that stands beside the weights, read before the work: the donor may change meanwhile."""

    copied: list[Path]  # as they are
    texts: dict[str, str]  # written anew, by name; config.json among them


def beside(request: MergeRequest, aligned: Sequence[Aligned], pool: ExpertPool) -> Beside:
    """What goes along with `request`'s result. SpoliaError for a file that must be changed and cannot be read."""
    found = texts(request)
    files = [file for file in copied(request, found) if file.name != "config.json"]
    config = result_config(request, aligned, pool)
    return Beside(files, found if config is None else found | {"config.json": json.dumps(config, indent=2) + "\n"})


def copied(request: MergeRequest, changed: Mapping[str, str]) -> list[Path]:
    """Files that go along as they are, none of those `changed`. Code files too: a config may name them."""
    donor, tokens = donor_of(request), request.tokens
    files = _files(donor)
    if tokens is not None:
        files = [file for file in files if not _TOKENIZER.match(file.name) and not _TEMPLATE.match(file.name)]
        kept = [f for f in _files(tokens.owner.path) if _TOKENIZER.match(f.name) or _TEMPLATE.match(f.name)]
        if tokens.written:  # another vocabulary: the same tokens in other forms would contradict it
            kept = [f for f in kept if _TEMPLATE.match(f.name) or f.name == "special_tokens_map.json"]
        files += kept
    if request.chat_template is not None:
        files = [file for file in files if not _TEMPLATE.match(file.name)]
    return sorted((file for file in files if file.name not in changed), key=lambda file: file.name)


def _files(folder: Path | None) -> list[Path]:
    if folder is None or not folder.is_dir():
        return []
    return [f for f in folder.iterdir() if f.is_file() and _DONATED.match(f.name) and not _WEIGHTS.search(f.name)]


def texts(request: MergeRequest) -> dict[str, str]:
    """Files beside config.json that are written anew, by name."""
    donor, tokens = donor_of(request), request.tokens
    found = dict(tokens.written) if tokens is not None else {}
    if tokens is not None and tokens.renumbered and donor is not None and (donor / "generation_config.json").is_file():
        config = read_mapping(donor / "generation_config.json", _REMOVE)
        found["generation_config.json"] = json_text(renumber(config, tokens.renumbered))
    if request.chat_template is not None:
        found["chat_template.jinja"] = request.chat_template
        owner = tokens.owner.path if tokens is not None else donor
        config = json.loads(found.get("tokenizer_config.json", "{}"))
        if not config and owner is not None and (owner / "tokenizer_config.json").is_file():
            config = read_mapping(owner / "tokenizer_config.json")
        if "chat_template" in config:
            del config["chat_template"]
            found["tokenizer_config.json"] = json_text(config)
    return found


def result_config(request: MergeRequest, aligned: Sequence[Aligned], pool: ExpertPool) -> dict[str, Any] | None:
    """The donor's config for these tensors: type, depth, vocabulary, and whether the head is tied."""
    donor = donor_of(request)
    if donor is None or not (donor / "config.json").is_file():
        return None
    config = read_mapping(donor / "config.json", "restore the model's config.json")
    if request.reshape is not None:
        config = request.reshape(config)
    if request.out_dtype:
        for place in _places(config):
            for key in ("torch_dtype", "dtype"):
                if key in place:
                    place[key] = request.out_dtype
    if request.tokens is not None:
        config = renumber(config, request.tokens.renumbered)
        if request.tokens.rows is not None:
            _set_vocabulary(config, request.tokens.rows)
    for tensor in aligned:  # a vocabulary that was cut
        if vocabulary_rows(tensor.name) and len(tensor.shape) == 2:
            entries = [pool.models[i].weights.entries[n] for i, n in tensor.ends]
            if any(entry.shape != tensor.shape for entry in entries):
                _set_vocabulary(config, tensor.shape[0])
    names = {tensor.name for tensor in aligned}
    if ties(config) and names & {"lm_head.weight", "embed_out.weight"}:  # a head of its own would be overwritten
        for place in _places(config):
            if "tie_word_embeddings" in place:
                place["tie_word_embeddings"] = False
    return config


def _places(config: dict[str, Any]) -> list[dict[str, Any]]:
    """The config and the one of the language model inside."""
    return [config, *([config["text_config"]] if isinstance(config.get("text_config"), dict) else [])]


def _set_vocabulary(config: dict[str, Any], rows: int) -> None:
    for place in _places(config):
        if "vocab_size" in place:
            place["vocab_size"] = rows


def renumber(config: dict[str, Any], ids: dict[int, int]) -> dict[str, Any]:
    """A copy whose ids of special tokens follow the tokens."""
    config = copy.deepcopy(config)
    for place in _places(config):
        for key, value in place.items():
            if not _IDS.match(key):
                continue
            if isinstance(value, list):
                place[key] = [ids.get(item, item) if type(item) is int else item for item in value]
            elif type(value) is int:
                place[key] = ids.get(value, value)
    return config


def dress(pool: ExpertPool, request: MergeRequest, problems: Problems) -> None:
    """Gives the models embeddings of the one vocabulary that `request.tokens` describes."""
    plan = request.tokens
    if plan is None or plan.rows is None:
        return
    refs = [*([request.base] if request.base is not None else []), *request.experts]
    open_already = {ref.key: model.weights for ref, model in zip(refs, pool.models, strict=True)}
    lenders, extra = [], list[Weights]()
    for ref in plan.lenders:
        weights = open_already.get(ref.key)
        if weights is None:
            try:
                extra.append(weights := Inputs().open(ref.path, ref.lora))
            except SpoliaError as error:
                problems.errors.extend(error.problems)
                return
        lenders.append(Expert(ref.name, weights))
    dressed: dict[int, TokenWeights] = {}
    numbers = {ref.key: number for number, ref in enumerate(plan.lenders)}

    def new(ref: ModelRef, model: Expert) -> Expert:
        inner = model.weights
        if id(inner) not in dressed:
            keep = extra if not dressed else ()
            dressed[id(inner)] = TokenWeights(inner, lenders, plan.maps[numbers[ref.key]], keep)
            dressed[id(inner)].check(model.name, problems)
        return Expert(model.name, dressed[id(inner)], model.task)

    models = [new(ref, model) for ref, model in zip(refs, pool.models, strict=True)]
    if pool.base is not None:
        pool.base, models = models[0], models[1:]
    pool.experts = models


def digest(request: MergeRequest) -> list[Any]:
    """What the weights depend on beyond models, tensors and settings."""
    tokens = request.tokens
    return [] if tokens is None else [tokens.rows, *(map.digest() for map in tokens.maps)]
