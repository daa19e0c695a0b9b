"""What recipes of prompts are about: a labelled set in sessions, and the frozen encoder that meets them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from spolia.errors import SpoliaError
from spolia.runs.schema import Device, Part, Shape


class Sessions(Shape):
    """What all problems say."""

    base: int = Field(60, description="classes of the base session, all their examples", ge=2)
    ways: int = Field(5, description="new classes of each further session", ge=1)
    shots: int = Field(5, description="examples of each new class", ge=1)
    shuffle: bool = Field(
        False, description="classes in an order drawn from each repeat's seed, not that of the labels"
    )
    epochs: float = Field(
        20.0, description="readings of the base data; the cosine of learning rates ends with them", gt=0
    )
    batch: int = Field(48, description="examples of a step", ge=1)
    encoder: str = Field(
        "",
        description="folder or name on the hub of a transformer, or timm/NAME; empty: a ViT trained on the base classes",
    )
    pretraining: int = Field(4000, description="steps of that training; no other class is ever shown to it", ge=1)
    width: int = Field(192, description="of that ViT", ge=8)
    depth: int = Field(6, description="of that ViT", ge=1)
    heads: int = Field(3, description="of that ViT", ge=1)
    patch: int = Field(8, description="pixels of a side of that ViT's patches", ge=1)


class DigitsSessions(Sessions):
    """scikit-learn's digits (real scans, inside its package): six to start from, two and two with five images each."""

    source: Literal["digits_sessions"] = Field(description="real scans that come inside scikit-learn; no download")
    base: int = Field(6, description="classes of the base session, all their examples", ge=2, le=10)
    ways: int = Field(2, description="new classes of each further session", ge=1)
    epochs: float = Field(
        3.0, description="readings of the base data; the cosine of learning rates ends with them", gt=0
    )
    encoder: Literal[""] = Field("", description="a ViT with four patches, trained on the base classes")
    pretraining: int = Field(150, description="steps of that training; no other class is ever shown to it", ge=1)
    width: int = Field(48, description="of that ViT", ge=8)
    depth: int = Field(5, description="of that ViT", ge=1)
    heads: int = Field(4, description="of that ViT", ge=1)
    patch: int = Field(4, description="pixels of a side of that ViT's patches", ge=1, le=8)


class _Images(Sessions):
    pixels: int | None = Field(None, description="side of the images as the encoder sees them; null: as they are", ge=8)
    norm: Literal["half", "imagenet", "none"] = Field(
        "half", description="half: 0 … 1 becomes -1 … 1; imagenet: its mean and deviation; none: 0 … 1"
    )
    augment: Literal["none", "crops"] = Field("crops", description="crops: moved by up to four pixels and mirrored")
    device: Device = Field("cpu", description="where the encoder runs: cpu, cuda, or auto")


class PackedSessions(_Images):
    """A packed set of images, such as tiny_imagenet100."""

    source: Literal["packed_sessions"] = Field(description="an npz file with a train and a test part")
    data: str = Field("tiny_imagenet100", description="the file's name without .npz")
    folder: Path | None = Field(None, description="where the data lie; by default the folder that SPOLIA_DATA names")


class ArraysSessions(_Images):
    """A user's own arrays of images."""

    source: Literal["npz_sessions"] = Field(description="arrays in an npz file")
    file: Path | None = Field(None, description="npz with x_train, y_train, x_test, y_test, or x and y to be split")


class FolderSessions(_Images):
    """Folders of images, one a class; below train and test where these are there."""

    source: Literal["folder_sessions"] = Field(description="folders of images")
    folder: Path | None = Field(None, description="the folder that holds one folder a class")
    side: int = Field(64, description="pixels of a side, as they are read", ge=8)


class DataSessions(Sessions):
    """Texts or images with labels, shown to an encoder as its own folder says: the form for text."""

    source: Literal["data_sessions"] = Field(
        description="tables of texts, arrays, folders of images, or what `datasets` loads, as the encoder's own files show them"
    )
    train: Part | None = Field(None, description="labelled inputs that the sessions are made of")
    test: Part | None = Field(None, description="labelled inputs that everything is judged on")
    inputs: str | list[str] | None = Field(
        None, description="array or column of the inputs; two columns make pairs; null: by usual names"
    )
    labels: str | None = Field(None, description="array or column of the labels; null: by usual names")
    classes: list[str] | None = Field(
        None, description="names of the classes in the order of sessions; null: sorted, as the training part has them"
    )
    length: int = Field(64, description="tokens of a text, at most", ge=2)
    encoder: str = Field("", description="folder of a transformer, with its tokenizer or preprocessor_config.json")
    pool: Literal["first", "mean"] = Field(
        "first", description="an input's feature: its first token, or the mean of all"
    )
    device: Device = Field("cpu", description="where the encoder runs: cpu, cuda, or auto")


PROBLEMS: dict[str, type[Sessions]] = {
    "digits_sessions": DigitsSessions,
    "packed_sessions": PackedSessions,
    "npz_sessions": ArraysSessions,
    "folder_sessions": FolderSessions,
    "data_sessions": DataSessions,
}


def name_of(problem: Any) -> str:
    """The set, in a word."""
    match problem:
        case PackedSessions():
            return problem.data
        case ArraysSessions():
            return problem.file.stem if problem.file else "arrays"
        case FolderSessions():
            return problem.folder.name if problem.folder else "folder"
        case DataSessions():
            named = "" if problem.train is None else problem.train.dataset or problem.train.path or ""
            return Path(named).name.partition(".")[0] or "data"
    return "digits"


def check_files(problem: Sessions) -> None:
    """SpoliaError where the data are not there; headers are read at most."""
    match problem:
        case PackedSessions():
            from spolia.data.images import packed_file

            packed_file(problem.data, problem.folder)
        case ArraysSessions():
            from spolia.data.labelled import names_in

            if problem.file is None:
                raise SpoliaError("no file is named", where="problem.file", mend="add `file: PATH`")
            names_in(problem.file.expanduser())
        case FolderSessions():
            if problem.folder is None or not problem.folder.expanduser().is_dir():
                raise SpoliaError("is no folder", where=f"problem.folder {problem.folder}", mend="folder: PATH")
        case DataSessions():
            from spolia.runs.fscil_data import check_data

            check_data(problem)
