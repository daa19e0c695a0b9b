"""Labelled texts and images of sessions as an encoder takes them: tables, arrays, folders and `datasets`, read as the tasks
of a pool of folders are. Texts go through the tokenizer in the encoder's folder, images through its preprocessor_config.json.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from spolia.core.checkpoint import read_config
from spolia.data import pictures, tables
from spolia.errors import Problems, SpoliaError
from spolia.runs.continual_problems import check_datasets
from spolia.runs.fscil_problems import DataSessions
from spolia.runs.schema import DataPart, TaskData
from spolia.runs.taskdata import Known, check_part

if TYPE_CHECKING:
    from spolia.parts.examples import Examples

PARTS = ("train", "test")


def check_data(problem: DataSessions) -> None:
    """SpoliaError with everything that the files tell is wrong. No model is opened."""
    problems = Problems()
    if not Path(problem.encoder).expanduser().is_dir() or not problem.encoder:
        mend = "give a folder that save_pretrained wrote, the tokenizer's files beside the model's"
        problems.add("problem.encoder", f"`{problem.encoder}` is no folder", mend)
    for name in PARTS:
        if getattr(problem, name) is None:
            problems.add(
                f"problem.{name}", "no data are named", f"write `{name}: FILE`, or {{dataset: NAME, split: PART}}"
            )
    problems.raise_if_any()
    for name in PARTS:
        part = _part(problem, name)
        try:
            if part.dataset is not None:
                check_datasets(part.dataset, f"problem.{name}")
            check_part(part, _task(problem), _known(problem), labelled=True)
        except SpoliaError as error:
            problems.errors.extend(replace(one, where=f"problem.{name}") for one in error.problems)
    problems.raise_if_any()


def examples_of(problem: DataSessions) -> tuple[Examples, Examples, list[str] | None]:
    """Training and test part with labels, and the name of every label; None where the data have no names."""
    from spolia.runs.taskload import load_tasks

    check_data(problem)
    names = problem.classes or names_of(problem)
    task = _task(problem).model_copy(update={"classes": names})
    task = task.model_copy(update={"unlabelled": _part(problem, "train"), "test": _part(problem, "test")})
    train, test = (found["data"] for found in load_tasks({"data": task}, {"data": _known(problem)}, labels=True))
    return train, test, names


def names_of(problem: DataSessions) -> list[str] | None:
    """Names of the classes that the training part has, in order; None where labels are numbers alone."""
    part = _part(problem, "train")
    if part.dataset is not None:
        rows = tables.read_dataset(part.dataset, part.config, part.split)
        label = tables.named_labels(list(rows.column_names), problem.labels, None, "column")
        told = getattr(getattr(rows, "features", {}).get(label), "names", None)
        return list(told) if told else _sorted(rows[label])
    assert part.path is not None
    match tables.kind_of(part.path):
        case "table":
            label = tables.named_labels(tables.columns(part.path), problem.labels, None, "column")
            return _sorted(tables.read_columns(part.path, [label], part.split, part.most)[label])
        case "pictures":
            return list(pictures.classes_in(part.path))
    return None


def _sorted(values: list[object]) -> list[str] | None:
    texts = {str(value) for value in values}
    return None if all(text.isdecimal() for text in texts) else sorted(texts)


def _part(problem: DataSessions, name: str) -> DataPart:
    part: DataPart = getattr(problem, name)
    if part.dataset is not None and Path(part.dataset).expanduser().is_dir():
        return part.model_copy(update={"dataset": str(Path(part.dataset).expanduser())})
    return part if part.path is None else part.model_copy(update={"path": part.path.expanduser()})


def _task(problem: DataSessions) -> TaskData:
    return TaskData(inputs=problem.inputs, labels=problem.labels, classes=problem.classes, length=problem.length)


def _known(problem: DataSessions) -> Known:
    """What the encoder's folder says of its inputs; its head, if it has one, is not asked."""
    folder = Path(problem.encoder).expanduser()
    config = read_config(folder) or {}
    return Known(folder, {name: told for name, told in config.items() if name not in ("architectures", "id2label")})
