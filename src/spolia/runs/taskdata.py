"""The data of a folder pool's tasks, checked before any work: files, arrays, columns, labels, sizes."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from spolia.catalog import Method
from spolia.core.checkpoint import Checkpoint, read_config
from spolia.core.files import read_json
from spolia.core.lazy import np
from spolia.data import pictures, tables
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.runs.pools import Where
from spolia.runs.references import names_in
from spolia.runs.schema import DataPart, FoldersPool, TaskData
from spolia.runs.yamlmarks import Path as At

_HEADS = (
    *("classifier.weight", "score.weight", "classifier.out_proj.weight", "classification_head.out_proj.weight"),
    *("classifier.1.weight", "head.weight", "fc.weight"),
)
_TOKENIZERS = ("tokenizer.json", "tokenizer_config.json", "vocab.txt", "vocab.json", "tokenizer.model", "spiece.model")


@dataclass(frozen=True)
class Known:
    """What an expert's folder says of its inputs and classes, read without torch."""

    folder: Path
    config: dict[str, Any] = field(default_factory=dict)
    classes: int | None = None  # of its head

    @property
    def language(self) -> bool:
        """Whether it predicts the next token."""
        return str((self.config.get("architectures") or [""])[0]).endswith(("ForCausalLM", "LMHeadModel"))

    @property
    def places(self) -> dict[str, int]:
        """Number of each class that the config names."""
        told = self.config.get("id2label")
        return {str(name): int(place) for place, name in told.items()} if isinstance(told, dict) else {}

    @property
    def extent(self) -> tuple[int, int] | None:
        """Height and width of its images, where the config says it."""
        for place in (self.config, self.config.get("vision_config")):
            size = place.get("image_size") if isinstance(place, dict) else None
            if isinstance(size, int | list) and size:
                return (size, size) if isinstance(size, int) else (size[0], size[-1])
        return None

    @property
    def channels(self) -> int | None:
        for place in (self.config, self.config.get("vision_config")):
            if isinstance(place, dict) and isinstance(place.get("num_channels"), int):
                return place["num_channels"]
        return None

    @cached_property
    def look(self) -> dict[str, Any] | None:
        """Its preprocessor_config.json."""
        file = self.folder / "preprocessor_config.json"
        told = read_json(file, "restore the file, or remove it") if file.is_file() else None
        return told if isinstance(told, dict) else None

    @property
    def has_tokenizer(self) -> bool:
        return any((self.folder / name).is_file() for name in _TOKENIZERS)


def known_of(pool: FoldersPool, name: str) -> Known:
    """Of the expert called `name`. A hub's id that is not fetched yet says nothing."""
    path = next(entry.path for entry in pool.experts if entry.name == name)
    config = pool.network or (read_config(path) if path.is_absolute() else None) or {}
    head = pool.tasks[name].head if name in pool.tasks else None
    return Known(path if path.is_dir() else path.parent, config, _classes(path, head, name))


def _classes(path: Path, head: Path | None, name: str) -> int | None:
    """Rows of the head's last matrix."""
    with suppress(SpoliaError, OSError):  # told where the models are opened
        if head is not None:
            held = Checkpoint.open(head).tensors
            return next(held[key].shape[0] for key in ("weight", f"{name}.weight") if key in held)
        held = Checkpoint.open(path).tensors
        return next((held[key].shape[0] for key in _HEADS if key in held and len(held[key].shape) == 2), None)
    return None


def wants_labels(settings: Any) -> bool:
    """Whether the labels of what is adapted on are looked at."""
    return getattr(settings, "objective", "") == "labels" or getattr(settings, "guard", "") == "accuracy"


# --- the recipe's tasks ----------------------------------------------------------------------------------------------


def check_tasks(
    pool: FoldersPool, raw: Any, looking: Method | None, settings: Any, where: Where, problems: Problems
) -> None:
    """Everything that files tell without a model. `looking`: the method that asks for inputs, if one does."""
    listed = list(raw) if isinstance(raw, dict) else []
    if not listed:
        if looking is not None:
            what = f"{looking.name} looks at {looking.data}, and the pool of folders names none"
            mend = "add `tasks: {EXPERT: {unlabelled: FILE, test: FILE}}` to `pool`"
            problems.add(where(("pool",)), what, mend)
        return
    names = [entry.name for entry in pool.experts]
    for name in listed:
        if name not in names:
            mend = did_you_mean(name, names)
            problems.add(where(("pool", "tasks", name)), f"no expert is called `{name}`", mend)
    absent = [name for name in names if name not in listed]
    if absent:
        problems.add(where(("pool", "tasks")), f"nothing for {', '.join(absent)}", "add an entry for every expert")
    for name, task in pool.tasks.items():
        if name in names:
            _check_task(pool, name, task, (looking, wants_labels(settings)), where, problems)


def _check_task(
    pool: FoldersPool, name: str, task: TaskData, asked: tuple[Method | None, bool], where: Where, problems: Problems
) -> None:
    at: At = ("pool", "tasks", name)
    looking, labels = asked
    if looking is not None and task.unlabelled is None:
        mend = "add `unlabelled: FILE`, inputs that it is not tested on"
        problems.add(where(at), f"{looking.name} looks at {looking.data}, and none are named", mend)
    if looking is None and task.test is None:
        problems.add(where(at), "names no inputs", "add `test: FILE`, or leave the tasks away")
    if task.head is not None and not task.head.exists():
        problems.add(where((*at, "head")), f"there is no {task.head}", "check the path")
    try:
        known = known_of(pool, name)
    except SpoliaError as error:
        problems.errors.extend(p for p in error.problems if p not in problems.errors)
        return
    for key, labelled in (("unlabelled", labels), ("test", not known.language)):
        part = getattr(task, key)
        if part is None:
            continue
        try:
            check_part(part, task, known, labelled)
        except SpoliaError as error:
            for problem in error.problems:
                file = f"{Path(problem.where or part.path or part.dataset or '').name}: "
                problems.add(where((*at, key)), file + problem.what, problem.mend)


def check_part(part: DataPart, task: TaskData, known: Known, labelled: bool) -> None:
    """SpoliaError for inputs that are not there or not the model's. Values are not read, but for labels."""
    if (part.path is None) == (part.dataset is None):
        raise SpoliaError(
            "names both a path and a data set" if part.path else "names no inputs", mend="write `path: FILE`"
        )
    if part.dataset is not None:
        if find_spec("datasets") is None:
            raise tables.without_datasets()
        if part.split is None:
            raise SpoliaError("no part of it is named", mend="add `split: train`, validation or test")
        return
    assert part.path is not None
    if not part.path.exists():
        near = names_in(part.path.parent, lambda p: tables.kind_of(p) is not None)
        mend = did_you_mean(part.path.name, near[:20]) if near else "check the path"
        raise SpoliaError("there is no such file", mend=mend)
    match tables.kind_of(part.path):
        case "arrays":
            _check_arrays(part, part.path, task, known, labelled)
        case "table":
            _check_table(part, part.path, task, known, labelled)
        case "pictures":
            pictures.check_pillow(str(part.path))
            names = list(pictures.classes_in(part.path))
            if labelled:
                class_numbers(names, task, known)
        case _:
            mend = "give .npz, .tsv, .csv, .jsonl, .txt (also .gz), or a folder with one of images a class"
            raise SpoliaError("is no kind of file that is read", mend=mend)


def coded(heads: dict[str, Any], split: str | None) -> bool:
    """Whether an npz file is a set of images in one of the codings of data/images.py."""
    return (
        split is not None and "classes" in heads and any(key in heads for key in (f"jpeg_{split}", f"x_{split}_delta"))
    )


def _check_arrays(part: DataPart, file: Path, task: TaskData, known: Known, labelled: bool) -> None:
    heads = tables.array_heads(file)
    if coded(heads, part.split):
        return
    names = tables.named_arrays(list(heads), task.inputs, part.split)
    _check_shape(names[0], *heads[names[0]], known)
    if labelled:
        label = tables.named_labels(list(heads), task.labels, part.split, "array")
        given, inputs = heads[label][0], heads[names[0]][0]
        if len(given) != 1 or given[:1] != inputs[:1]:
            what = f"`{label}` is {list(given)} beside inputs {list(inputs)}"
            raise SpoliaError(what, mend="give one label an input")
        class_numbers(tables.read_arrays(file, [label], part.most)[label], task, known)


def _check_shape(name: str, shape: tuple[int, ...], kind: np.dtype, known: Known) -> None:
    if not shape or not shape[0]:
        raise SpoliaError(f"`{name}` is empty", mend="give inputs of that task")
    if known.extent is None or not (len(shape) == 4 or (len(shape) == 3 and kind == np.uint8)):
        return
    grey = len(shape) == 3
    given, size = (1 if grey else shape[1]), tuple(shape[-2:])
    if size != known.extent:
        what = f"`{name}` holds images of {size[0]} x {size[1]}; the model's config says {known.extent[0]} x {known.extent[1]}"
        raise SpoliaError(what, mend="resize them, or give a folder of image files, which are resized")
    if known.channels is not None and given != known.channels and not grey:
        what = f"`{name}` holds images of {given} channels; the model's config says {known.channels}"
        raise SpoliaError(what, mend="give [inputs, channels, height, width] in the model's channels")


def _check_table(part: DataPart, file: Path, task: TaskData, known: Known, labelled: bool) -> None:
    held = tables.columns(file)
    names = tables.named_texts(held, task.inputs)
    if part.split is not None and tables.SPLIT not in held:
        raise SpoliaError("has no column `split`", mend="leave `split` away, or add the column")
    if not known.has_tokenizer:
        what = "texts need the expert's tokenizer, and its folder has none"
        raise SpoliaError(what, mend=f"put tokenizer.json into {known.folder}, or give input_ids in an npz file")
    label = tables.named_labels(held, task.labels, None, "column") if labelled else None
    read = tables.read_columns(file, [*names, *([label] if label else [])], part.split, part.most)
    if not read[names[0]]:
        raise SpoliaError("holds no rows" + (f" of `{part.split}`" if part.split else ""), mend="check `split`")
    if label is not None:
        class_numbers(read[label], task, known)


def class_numbers(values: Sequence[Any] | np.ndarray, task: TaskData, known: Known) -> list[int]:
    """Labels, numbers or names of classes, as numbers of the head's outputs. SpoliaError for what is none of them."""
    texts = [str(value) for value in values]
    numbers: list[int] = []
    plain = all(text.removeprefix("-").removesuffix(".0").isdecimal() for text in texts)
    if plain and not set(texts) <= set(task.classes or ()):
        numbers = [int(text.removesuffix(".0")) for text in texts]
    else:
        places = {name: place for place, name in enumerate(task.classes)} if task.classes else known.places
        if not places:
            places = {name: place for place, name in enumerate(sorted(set(texts)))}
        for text in dict.fromkeys(texts):
            if text not in places:
                raise SpoliaError(f"`{text}` is none of the classes", mend=did_you_mean(text, list(places)[:30]))
        numbers = [places[text] for text in texts]
    if known.classes is not None and numbers and not 0 <= min(numbers) <= max(numbers) < known.classes:
        wrong = min(numbers) if min(numbers) < 0 else max(numbers)
        what = f"label {wrong} for a head of {known.classes} classes"
        raise SpoliaError(what, mend=f"number the classes from 0 to {known.classes - 1}, in the head's order")
    return numbers
