"""What a name of a model means: a path, a model of the hub, or either with a LoRA adapter after `+`; and what is near it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from spolia.data.hub import fetch, split_id
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.adapter import Adapter, is_adapter
from spolia.parts.inputs import base_of, parted
from spolia.runs.packaged import packaged
from spolia.runs.request import ModelRef


def located(text: str | os.PathLike[str]) -> str:
    """`text` with hub ids in it replaced by their folders; what exists, or may be a misspelt path, stays as it is."""
    path, lora = parted(text)
    return fetched(os.fspath(text)) if lora is None else f"{fetched(str(path))}+{fetched(str(lora))}"


def fetched(text: str) -> str:
    """The folder of a hub id, fetched if need be; anything else unchanged."""
    return str(fetch(text)) if is_hub_id(text) else text


def is_hub_id(text: str, folders: Sequence[Path] = ()) -> bool:
    """Whether `text` can only mean a model of the hub: nothing here has that path or the folder it would stand in."""
    found = split_id(text)
    if found is None:
        return False
    owner = found[0].partition("/")[0]
    places = [folder / part for folder in (*folders, Path.cwd()) for part in (text, owner)]
    return not any(map(os.path.exists, places))


def names_in(folder: Path, wanted: Callable[[Path], bool]) -> list[str]:
    """Names in `folder` of what is wanted, sorted; none where it cannot be looked into."""
    try:
        return sorted(entry.name for entry in folder.iterdir() if wanted(entry))
    except (OSError, ValueError):
        return []


def reference(text: str | os.PathLike[str], name: str | None = None) -> ModelRef:
    """The model that a call names. Paths that do not exist are told when they are opened."""
    path, lora = parted(located(text))
    return ModelRef(name or Path(text).name or str(text), path, lora)


def settled(ref: ModelRef, base: ModelRef | None) -> ModelRef:
    """An adapter alone becomes base and adapter: the pool's base, else the one its config names."""
    if ref.lora is not None or not is_adapter(ref.path):
        return ref
    if base is not None:
        plain = base.lora is None and not is_adapter(base.path)
        return replace(ref, path=base.path, lora=ref.path) if plain else ref
    try:
        return replace(ref, path=base_of(Adapter.open(ref.path)), lora=ref.path)
    except SpoliaError:
        return ref  # told when it is opened


def near_model(path: Path) -> str:
    plain = path.as_posix().replace("\\", "/")
    if plain != path.as_posix():  # a path of Windows: elsewhere a backslash is a letter
        if os.path.exists(plain):
            return f"did you mean `{os.path.normpath(plain)}`? Here / stands between folders"
        return "write / between folders, as ./models/code"
    names = names_in(path.parent, lambda p: p.is_dir() or p.suffix == ".safetensors")
    if names:
        return did_you_mean(path.name, names[:20])
    return "write a path, or a model of the hub as OWNER/NAME"


def near_recipes(name: str) -> str:
    path = Path(name)
    if path.suffix in (".yaml", ".yml"):
        folder = path.parent if os.path.exists(path.parent) else Path()
        files = [(folder / file).as_posix() for file in names_in(folder, _is_yaml)]
        return did_you_mean(name, files) if files else "check the path; `spolia new METHOD -o my.yaml` writes a recipe"
    ends = {known.rpartition("/")[2]: known for known in packaged()}
    key = name.rpartition("/")[2].lower().replace("-tiny", "").replace("-", "_") + "-tiny" * name.endswith("-tiny")
    if key in ends:
        return f"did you mean `{ends[key]}`?"
    return did_you_mean(name, packaged())


def _is_yaml(file: Path) -> bool:
    return file.suffix in (".yaml", ".yml")


def recipes_in(folder: Path) -> str:
    files = [(folder / file).as_posix() for file in names_in(folder, _is_yaml)]
    return f"it holds {', '.join(files[:5])}" if files else "give a YAML file or the name of a packaged recipe"
