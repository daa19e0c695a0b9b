"""A user's checkpoints as a pool of white experts, by a short description: a YAML file, or the same as a mapping.

    size: 32
    mean: [0.485, 0.456, 0.406]
    std: [0.229, 0.224, 0.225]
    network: {model_type: spolia_conv4, hidden_size: 64}     # not needed where config.json or `build` says it
    experts:
      - {path: ./dogs.safetensors, classes: [husky, beagle, boxer, collie, pug]}
      - {path: ./birds.safetensors, classes: [wren, robin, jay, crow, finch]}

Nothing but tensors is taken from a file. A checkpoint is opened when its expert is run; the audit opens all of them once.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import Field

from spolia.core.checkpoint import read_config
from spolia.core.files import is_folder
from spolia.core.pickled import SUFFIXES
from spolia.errors import Problems, SpoliaError
from spolia.parts.white import White, WhitePool
from spolia.runs import yamlmarks
from spolia.runs.complaints import validate
from spolia.runs.schema import Shape, at_home

if TYPE_CHECKING:
    from torch import nn

    Build = Callable[[str], nn.Module]

ENDS = (".safetensors", *SUFFIXES)


class Looks(Shape):
    """How an expert sees images."""

    size: int | None = Field(None, description="pixels of a side of its inputs", ge=1)
    channels: int | None = Field(None, description="colours of its inputs: 1 or 3", ge=1)
    mean: list[float] | None = Field(None, description="of its inputs, by channel, where white is 1")
    std: list[float] | None = Field(None, description="the same for the standard deviation")
    domain: str | None = Field(None, description="classes of one name in one domain are one class")
    network: dict[str, Any] | None = Field(None, description="its architecture, as config.json would say it")


class Entry(Looks):
    """One expert; what it leaves out is that of the whole pool."""

    path: Path = Field(description="folder with the weights, or one file")
    name: str | None = Field(None, description="what the report calls it; by default the path's last part")
    classes: list[str | int] | None = Field(None, description="what its outputs stand for, in order; null: not known")
    claimed: float | None = Field(None, description="accuracy that its owner tells", ge=0, le=1)


class Description(Looks):
    """A pool of classifiers."""

    size: int = Field(32, description="pixels of a side of all inputs", ge=1)
    channels: int = Field(3, description="colours of all inputs: 1 or 3", ge=1)
    images: int | None = Field(
        None, description="pixels of a side of the images that are made; by default the largest", ge=4
    )
    experts: str | list[Entry] = Field(description="a list of checkpoints, or a folder that holds them")


def classifiers(description: str | os.PathLike[str] | Mapping[str, Any], build: Build | None = None) -> WhitePool:
    """The pool that a description, or the YAML file at that path, tells of. Paths in a file are relative to it.

    `build(name)` makes the module of an expert where neither description nor config.json says which. Everything that is
    wrong with the description is raised at once; the experts themselves are looked at by `pool.audit()`.
    """
    if isinstance(description, Mapping):
        marked, home = yamlmarks.Marked("classifiers", dict(description)), Path.cwd()
    else:
        file = Path(description)
        marked, home = yamlmarks.load(_text(file), file.name), file.parent
    problems = Problems()
    told = validate(Description, marked.value or {}, (), marked.where, problems)
    problems.raise_if_any()
    assert told is not None
    entries = _listed(told, home, marked)
    names = [entry.name or _named(entry.path) for entry in entries]
    for name, count in Counter(names).items():
        if count > 1:
            problems.add(marked.where(("experts",)), f"{count} experts are called `{name}`", "give each a `name`")
    for place, entry in enumerate(entries):
        if not os.path.lexists(entry.path):
            problems.add(marked.where(("experts", place)), f"there is no {entry.path}", "check the path")
    problems.raise_if_any()
    experts = [_white(told, entry, name, build) for entry, name in zip(entries, names, strict=True)]
    largest = max(expert.shape[1] for expert in experts)
    side = told.images or 4 * -(-largest // 4)  # generators double twice
    return WhitePool(experts, (max(expert.shape[0] for expert in experts), side, side))


def _text(file: Path) -> str:
    try:
        return yamlmarks.text_of(file, str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise SpoliaError(
            f"cannot be read: {error}", where=str(file), mend="give the YAML file that lists them"
        ) from None


def _listed(told: Description, home: Path, marked: yamlmarks.Marked) -> list[Entry]:
    """The entries with whole paths; of a folder its checkpoints by name, with the class lists that their configs have."""
    if isinstance(told.experts, str):
        folder = home / at_home(told.experts)
        if not is_folder(folder):
            raise SpoliaError(
                f"{folder} is no folder", where=marked.where(("experts",)), mend="name the folder, or list files"
            )
        found = [p for p in sorted(folder.iterdir()) if p.suffix in ENDS or (is_folder(p) and _holds(p))]
        if not found:
            what = f"{folder} holds no checkpoints"
            raise SpoliaError(what, where=marked.where(("experts",)), mend=f"files end in {', '.join(ENDS)}")
        return [Entry(path=path) for path in found]
    return [entry.model_copy(update={"path": home / at_home(entry.path)}) for entry in told.experts]


def _holds(folder: Path) -> bool:
    return any(file.suffix in ENDS for file in folder.iterdir())


def _named(path: Path) -> str:
    return path.stem if path.suffix in ENDS else path.name


def _white(told: Description, entry: Entry, name: str, build: Build | None) -> White:
    from spolia.zoo.classifiers import classifier

    looks = {field: getattr(entry, field) for field in Looks.model_fields}
    looks = {field: getattr(told, field) if value is None else value for field, value in looks.items()}
    shape = (looks["channels"], looks["size"], looks["size"])
    load = partial(classifier, entry.path, name, shape=shape, config=looks["network"], build=build)
    return White(
        name,
        load,
        shape=shape,
        classes=_classes(entry),
        mean=looks["mean"] or (0.0,),
        std=looks["std"] or (1.0,),
        domain=looks["domain"] or "",
        claimed=entry.claimed,
    )


def _classes(entry: Entry) -> list[str | int] | None:
    """As said, else as a folder's own config.json says."""
    if entry.classes is not None or not is_folder(entry.path):
        return entry.classes
    named = (read_config(entry.path) or {}).get("id2label")
    if not isinstance(named, dict) or any(str(word).startswith("LABEL_") for word in named.values()):
        return None
    return [str(named[key]) for key in sorted(named, key=int)]
