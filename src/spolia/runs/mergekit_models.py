"""Which folders a mergekit recipe names: model references, and the tokenizer that goes with the result."""

from __future__ import annotations

import difflib
import json
import re
from pathlib import Path
from typing import Any

from spolia.runs.mergekit_settings import LATER, Check
from spolia.runs.request import ModelRef
from spolia.runs.yamlmarks import Path as Place

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_NO_LORA = "merge the adapter into its base first (peft: `model.merge_and_unload()`), save it, and name that folder"
_VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def read_reference(value: Any, at: Place, check: Check, folder: Path) -> ModelRef | None:
    """A path, or mergekit's mapping `{model: {path, revision}, lora, override_architecture}`. None: error told."""
    if isinstance(value, dict):
        check.keys(value, at, ("model", "lora", "override_architecture"))
        if value.get("lora"):
            check.error((*at, "lora"), f"a LoRA adapter {LATER}", _NO_LORA)
            return None
        if value.get("override_architecture"):
            what = "`override_architecture` changes nothing: tensors are matched by name"
            check.warn((*at, "override_architecture"), what, "remove it")
        value, at = value.get("model"), (*at, "model")
        if isinstance(value, dict):
            check.keys(value, at, ("path", "revision"))
            if value.get("revision"):
                check.warn((*at, "revision"), "a folder on disk has no revision; ignored", "remove it")
            value, at = value.get("path"), (*at, "path")
    if not isinstance(value, str) or not value:
        check.error(
            at, f"expected the path of a model, found {value!r}", "write the path of its folder, in quotes if need be"
        )
        return None
    path = _local(value, folder)
    if path is None:
        check.error(at, *_not_here(value, folder))
        return None
    if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
        check.error(at, f"`{value}` is a LoRA adapter, which {LATER}", _NO_LORA)
        return None
    return ModelRef(value, path)


def _local(text: str, folder: Path) -> Path | None:
    """The existing path meant by `text`, even if it holds `+` or `@`: from `folder` on, else from the current one."""
    path = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    for root in (folder, Path.cwd()):
        try:
            if (root / path).exists():
                return (root / path).absolute()
        except (OSError, ValueError):  # a name the system cannot hold
            return None
    return None


def _not_here(text: str, folder: Path) -> tuple[str, str]:
    """What is wrong with a reference that is no path, and the cure."""
    if "+" in text:
        return f"`{text}`: a LoRA adapter (`model+adapter`) {LATER}", _NO_LORA
    plain = text.partition("@")[0]
    parent = folder / Path(plain).parent
    beside = [entry.name for entry in parent.iterdir() if entry.is_dir()] if parent.is_dir() else []
    near = difflib.get_close_matches(Path(plain).name, beside, 1, 0.6)
    if near:
        return f"there is no model at `{text}`", f"did you mean `{Path(plain).with_name(near[0])}`?"
    if _HUB_ID.fullmatch(plain):
        name = plain.partition("/")[2]
        revision = f" --revision {text.partition('@')[2]}" if "@" in text else ""
        mend = f"download the folder first: `hf download {plain}{revision} --local-dir {name}`, then write `{name}`"
        return f"`{text}` is no folder here, and models are not fetched from a hub yet", mend
    return f"there is no model at `{text}`", "write the path of a folder; a model of a hub is downloaded into one first"


def read_tokenizer(value: dict[str, Any], known: list[ModelRef], check: Check, folder: Path) -> ModelRef | None:
    """The model whose tokenizer is copied because the recipe says so. `known`: base first, then the file's order.

    Only models with one vocabulary pass: rows of embeddings are merged where they stand.
    """
    asked = [key for key in ("tokenizer_source", "tokenizer") if key in value]
    if len(asked) == 2:
        check.error(("tokenizer",), "`tokenizer` and `tokenizer_source` exclude each other", "keep one of the two")
    if len(asked) != 1:
        return None
    at: Place = (asked[0],)
    source = value[asked[0]]
    if asked[0] == "tokenizer":
        if not isinstance(source, dict):
            check.error(at, "`tokenizer` must be a mapping", "write `tokenizer: {source: base}`")
            return None
        check.keys(source, at, ("source", "tokens", "pad_to_multiple_of"))
        for key in ("tokens", "pad_to_multiple_of"):
            if source.get(key):
                check.error((*at, key), f"`{key}` {LATER}", "remove it: the vocabulary stays as it is")
        source, at = source.get("source", "union"), (*at, "source")
    if source == "union":
        mend = "write `base` if all models share one vocabulary; else make the tokenizers equal first"
        check.error(at, f"the tokenizer source `union` {LATER}", mend)
        return None
    if not known:
        return None
    donor = known[0] if source == "base" else _listed(source, at, known, check, folder)
    if donor and not check.problems.errors:
        for other in known:
            if _vocabulary(other.path) != _vocabulary(donor.path):
                what = f"`{donor.name}` and `{other.name}` have different vocabularies; reordering embeddings {LATER}"
                mend = f"make the tokenizers equal first, or remove `{asked[0]}` if row i means the same in both"
                check.error(at, what, mend)
    return donor


def _listed(source: Any, at: Place, known: list[ModelRef], check: Check, folder: Path) -> ModelRef | None:
    ref = read_reference(source, at, check, folder)
    if ref is None:
        return None
    match = next((model for model in known if model.path.resolve() == ref.path.resolve()), None)
    if match is None:
        names = ", ".join(f"`{name}`" for name in dict.fromkeys(model.name for model in known))
        check.error(at, f"`{ref.name}` is none of the models that are merged", f"write `base` or one of {names}")
    elif match is not known[0]:
        check.warn(at, f"config and generation files come from `{ref.name}` too, not only the tokenizer")
    return match


def _vocabulary(path: Path) -> Any:
    """What can be compared: tokens and ids of tokenizer.json, else the bytes of another vocabulary file, else None."""
    folder = path if path.is_dir() else path.parent
    file = next((folder / name for name in _VOCABULARIES if (folder / name).is_file()), None)
    if file is None:
        return None
    raw = file.read_bytes()
    if file.suffix != ".json":
        return raw
    try:
        data = json.loads(raw)
        added = {token["content"]: token["id"] for token in data.get("added_tokens", ())}
        return data.get("model", {}).get("vocab"), added
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return raw
