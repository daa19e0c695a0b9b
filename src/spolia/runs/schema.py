"""The shape of a recipe, as pydantic models: what may be written, and nothing else."""

from __future__ import annotations

import difflib
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema, model_serializer

from spolia.errors import Problems, SpoliaWarning
from spolia.runs import yamlmarks
from spolia.runs.sizes import parse_size, write_size

VERSION = 1
UPGRADES: dict[int, Callable[[dict[str, Any]], dict[str, Any]]] = {}  # of an older form to the next; so far none
DType = Literal["bfloat16", "float16", "float32", "float64"]
Domain = Literal["upright", "turned", "inverted", "permuted", "mirrored", "noisy"]  # as data.digits, without torch


class Shape(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class ModelEntry(Shape):
    """A model on disk; in a recipe a bare path will do, its last part is then the name."""

    name: str = Field(description="what the report calls it", min_length=1)
    path: Path = Field(description="folder with the weights, one file, or a hub id")
    lora: Path | None = Field(None, description="LoRA adapter on top of it")

    @model_serializer(mode="wrap")
    def _without_none(self, write: Any) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value is not None}


def _entry(value: Any) -> Any:
    if isinstance(value, dict) and isinstance(value.get("path"), str) and "name" not in value:
        return {"name": _name_of(value["lora"] if isinstance(value.get("lora"), str) else value["path"]), **value}
    return {"name": _name_of(value), "path": value} if isinstance(value, str | Path) else value


def _name_of(path: str | Path) -> str:
    return Path(os.path.abspath(at_home(path))).name or str(path)


def at_home(path: str | Path) -> Path:
    """`~` as the home folder; that of a user whom the system does not know stays as it is written."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


_ENTRY_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "description": "folder with the weights, one file, a hub id, or either +ADAPTER"},
        {
            "type": "object",
            "additionalProperties": False,
            "required": ["path"],
            "properties": {"name": {"type": "string"}, "path": {"type": "string"}, "lora": {"type": "string"}},
        },
    ]
}
Entry = Annotated[ModelEntry, BeforeValidator(_entry), WithJsonSchema(_ENTRY_SCHEMA)]
Size = Annotated[
    int,
    BeforeValidator(parse_size),
    PlainSerializer(write_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"type": "string", "examples": ["5GB", "1GiB"]}]}),
]
Device = Annotated[
    str,
    Field(
        pattern=r"^(cpu|cuda(:\d{1,3})?|mps|auto)$",
        json_schema_extra={"kind": "cpu, cuda, a card as cuda:1, mps, or auto"},
    ),
]


class _Sparse(Shape):
    """Fields that may be left away are written only where they say something."""

    @model_serializer(mode="wrap")
    def _without_empty(self, write: Any) -> dict[str, Any]:
        return {key: value for key, value in write(self).items() if value not in (None, {}) or key == "base"}


class DataPart(_Sparse):
    """Inputs of one task, from a file or by the name that the library `datasets` knows; a bare path will do."""

    path: Path | None = Field(
        None,
        description="npz file; texts as .tsv, .csv, .jsonl or .txt, also .gz; or a folder with one of images a class",
    )
    dataset: str | None = Field(None, description="what `datasets` loads, in the place of a file")
    config: str | None = Field(None, description="its configuration")
    split: str | None = Field(None, description="which part of the file or data set: train, test …")
    most: int | None = Field(None, description="inputs taken, from the first on", ge=1)


def _part(value: Any) -> Any:
    return {"path": value} if isinstance(value, str | Path) else value


_PART_SCHEMA: dict[str, Any] = {"anyOf": [{"type": "string"}, DataPart.model_json_schema()]}
Part = Annotated[DataPart, BeforeValidator(_part), WithJsonSchema(_PART_SCHEMA)]


class TaskData(_Sparse):
    """What is known of one task: inputs to adapt on, labelled ones to test on, and how both are read."""

    unlabelled: Part | None = Field(None, description="inputs that the method looks at; their labels are left aside")
    test: Part | None = Field(None, description="labelled inputs that everything is judged on")
    inputs: str | list[str] | None = Field(None, description="array or column of the inputs; two columns make pairs")
    labels: str | None = Field(None, description="array or column of the labels")
    classes: list[str] | None = Field(None, description="names of the classes, in the head's order")
    head: Path | None = Field(None, description="safetensors with `weight` [classes, d], for models without a head")
    length: int = Field(128, description="tokens of a text, at most; of a language model's window", ge=2)


class FoldersPool(_Sparse):
    """Models that stand on disk."""

    source: Literal["folders"] = Field("folders", description="models on disk")
    base: Entry | None = Field(None, description="the model that the experts started from")
    experts: list[Entry] = Field(description="the fine-tuned models, in order", min_length=1)
    tasks: dict[str, TaskData] = Field(default_factory=dict, description="data of each task, by its expert's name")
    heads: Literal["merged"] | list[str] | None = Field(
        None, description="modules that stay each expert's own; null: found; merged: none"
    )
    network: dict[str, Any] | None = Field(
        None, description="what config.json would say, for plain state dicts: model_type, architectures, sizes"
    )


class DigitsPool(Shape):
    """scikit-learn's digits (real scans, inside its package): one expert is trained for each domain, then merged."""

    source: Literal["digits"] = Field(description="real digits, no download")
    domains: list[Domain] = Field(
        default_factory=lambda: list(get_args(Domain)[:4]),
        description="how the images are shown to each expert",
        min_length=1,
    )


def _size(default: str, help: str) -> Any:
    kind = {"kind": "bytes, or a size such as 512MB, 5GB or 1GiB"}
    return Field(default, description=help, validate_default=True, json_schema_extra=kind)  # type: ignore[arg-type]


class Output(Shape):
    """How the merged model is written."""

    dtype: DType | None = Field(
        None, description="stored type; null keeps what each tensor has in the base, else in the first expert"
    )
    max_shard_size: Size = _size("5GB", "largest file of the result")
    chunk_memory: Size = _size("1GB", "most memory for tensors in flight")


class Head(Shape):
    """The top level. `pool` and `method` have shapes of their own."""

    spolia: int = Field(description="version of the recipe's form")
    seed: int = Field(0, description="every random draw follows from it", ge=0)
    seeds: int = Field(1, description="repeats, each with its own seed (digits pools)", ge=1)
    pool: dict[str, Any] = Field(description="the base and the experts")
    preprocess: Any = Field(None, description="list of what is done to the task vectors first")
    method: dict[str, Any] = Field(description="name and settings of the method")
    surgery: dict[str, Any] | None = Field(None, description="name and settings of a surgery that follows the merge")
    output: Output = Field(default_factory=Output, description="how the merged model is written")


class StudyHead(Shape):
    """The top level of a recipe whose family works on a problem. `problem` and `method` have shapes of their own."""

    spolia: int = Field(description="version of the recipe's form")
    seed: int = Field(0, description="every random draw follows from it", ge=0)
    seeds: int = Field(1, description="repeats, each with its own seed", ge=1)
    problem: dict[str, Any] = Field(description="what the method works on and is judged by")
    method: dict[str, Any] = Field(description="name and settings of the method")


POOLS: dict[str, type[FoldersPool] | type[DigitsPool]] = {"folders": FoldersPool, "digits": DigitsPool}


def check_version(raw: dict[str, Any], where: Callable[[yamlmarks.Path], str], problems: Problems) -> None:
    """A recipe of an older form becomes one of this form in `raw` itself, and a warning shows what changed."""
    version = raw.get("spolia")
    if version is None:
        problems.add(
            where(()), "the recipe does not say which version of the form it has", f"add `spolia: {VERSION}` on top"
        )
        raw["spolia"] = VERSION  # told; the rest is still checked
    elif isinstance(version, int) and not isinstance(version, bool) and version != VERSION:
        if version in UPGRADES:
            _upgrade(raw, where(("spolia",)))
        elif version > VERSION:
            what, mend = f"written for version {version}; this spolia reads {VERSION}", "pip install --upgrade spolia"
            problems.add(where(("spolia",)), what, mend)
        else:
            problems.add(where(("spolia",)), f"there is no version {version}", f"write `spolia: {VERSION}`")


def _upgrade(raw: dict[str, Any], where: str) -> None:
    version, before = raw["spolia"], _lines(raw)
    for step in range(version, VERSION):
        changed = UPGRADES[step](raw) | {"spolia": step + 1}
        raw.clear()
        raw.update(changed)
    told = difflib.unified_diff(before, _lines(raw), f"version {version}", f"version {VERSION}", n=1, lineterm="")
    what = f"{where}: read as version {VERSION} of the form; write it so to be asked no more"
    warnings.warn("\n".join([what, *("    " + line for line in told)]), SpoliaWarning, stacklevel=2)


def _lines(raw: dict[str, Any]) -> list[str]:
    return yaml.safe_dump(raw, sort_keys=False, allow_unicode=True).splitlines()
