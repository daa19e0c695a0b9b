"""What continual recipes are about: a labelled set, how it becomes a stream, and the network that meets it."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from spolia.data.tables import without_datasets
from spolia.errors import SpoliaError
from spolia.runs.schema import Device, Shape

Scenario = Literal["class", "task", "domain", "online"]
NETWORKS = ("mlp", "conv4", "resnet8", "resnet14", "resnet20", "resnet32")
Named = Literal["mlp", "conv4", "resnet8", "resnet14", "resnet20", "resnet32"]
WIDTHS = {"mlp": 100, "conv": 16, "conv4": 32}  # where none is said; of a residual network 16
RESNET_WIDTH = 16


class Continual(Shape):
    """What all problems say."""

    scenario: Scenario = Field(
        "class",
        description="class: new classes, answers among all seen; task: the same, among the task's own; domain: the same"
        " classes shown otherwise; online: as class, in one pass and with no task told",
    )
    tasks: int | list[int] = Field(
        5, description="how many, of equally many classes; or the number of classes of each; of domains how many"
    )
    shuffle: bool = Field(
        False, description="classes in an order drawn from each repeat's seed, not that of the labels"
    )
    domains: Literal["permuted", "rotated"] = Field("permuted", description="what `scenario: domain` does to inputs")
    turn: float = Field(180.0, description="most degrees of a rotation", gt=0, le=360)
    blur: float = Field(
        0.0, description="of `online`: deviation of an example's time, in tasks: how they overlap", ge=0
    )
    epochs: float = Field(1.0, description="readings of each task's data; online reads once", gt=0)
    batch: int = Field(32, description="examples of a step; batches for replay are the method's `replay`", ge=1)
    memory: int | None = Field(
        None, description="samples that any memory of this run holds, at most; null: the method's own `items`", ge=1
    )
    width: int | None = Field(
        None,
        description="hidden units of mlp (100); channels of conv (16), conv4 (32), a ResNet's first stage (16)",
        ge=1,
    )

    @property
    def count(self) -> int:
        """Tasks."""
        return self.tasks if isinstance(self.tasks, int) else len(self.tasks)


class DigitsStream(Continual):
    """scikit-learn's digits (real scans, inside its package): 1,197 to learn from, 600 for the test."""

    source: Literal["digits"] = Field("digits", description="real scans that come inside scikit-learn; no download")
    epochs: float = Field(5.0, description="readings of each task's data; online reads once", gt=0)
    batch: int = Field(10, description="examples of a step; batches for replay are the method's `replay`", ge=1)
    memory: int | None = Field(
        50, description="samples that any memory of this run holds, at most; null: the method's own `items`", ge=1
    )
    network: Literal["mlp", "conv"] = Field("mlp", description="two hidden layers, or two convolutions")


class _Large(Continual):
    network: Named = Field("mlp", description=f"one of {', '.join(NETWORKS)}; all but mlp take images")
    augment: Literal["none", "crops"] = Field(
        "none", description="crops: images moved by up to four pixels and mirrored, anew each time they are shown"
    )
    device: Device = Field("cpu", description="where networks run: cpu, cuda, or auto")


class PackedStream(_Large):
    """A packed set of images, such as mnist, fashion_mnist, cifar10, tiny_imagenet100."""

    source: Literal["packed"] = Field(description="an npz file with a train and a test part: see spolia.data.images")
    data: str = Field("cifar10_full_jpeg75", description="the file's name without .npz")
    folder: Path | None = Field(None, description="where the data lie; by default the folder that SPOLIA_DATA names")
    size: int | None = Field(None, description="pixels of a side: half, double or more; null: as they are", ge=8)
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")
    most: int | None = Field(None, description="images read of each part, from the first on", ge=1)


class ArraysStream(_Large):
    """A user's own arrays."""

    source: Literal["npz"] = Field(description="arrays in an npz file")
    file: Path | None = Field(None, description="npz with x_train, y_train, x_test, y_test, or x and y to be split")
    most: int | None = Field(None, description="inputs read of each array, from the first on", ge=1)


class FolderStream(_Large):
    """Folders of images, one a class; below train and test where these are there."""

    source: Literal["folder"] = Field(description="folders of images")
    folder: Path | None = Field(None, description="the folder that holds one folder a class")
    size: int = Field(32, description="pixels of a side", ge=8)
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")


class DatasetStream(_Large):
    """Images by the name that the library `datasets` knows."""

    source: Literal["datasets"] = Field(description="images that `datasets` loads; pip install 'spolia[data]'")
    data: str = Field("", description="a name on the hub, or a folder of files that `datasets` reads")
    config: str | None = Field(None, description="its configuration")
    train: str = Field("train", description="the split that is learned")
    test: str = Field("test", description="the split that judges")
    image: str | None = Field(None, description="column of the images; null: image, img or pixel_values")
    label: str | None = Field(None, description="column of the classes; null: y, labels, label or target")
    size: int = Field(32, description="pixels of a side", ge=8)
    channels: Literal[1, 3] = Field(3, description="1 for grey, 3 for colour")
    most: int | None = Field(None, description="images read of each part, from the first on", ge=1)


PROBLEMS: dict[str, type[Continual]] = {
    "digits": DigitsStream,
    "packed": PackedStream,
    "npz": ArraysStream,
    "folder": FolderStream,
    "datasets": DatasetStream,
}


def width_of(problem: Any) -> int:
    return problem.width or WIDTHS.get(problem.network, RESNET_WIDTH)


def name_of(problem: Any) -> str:
    """The set, in a word."""
    match problem:
        case PackedStream():
            return problem.data
        case ArraysStream():
            return problem.file.stem if problem.file else "arrays"
        case FolderStream():
            return problem.folder.name if problem.folder else "folder"
        case DatasetStream():
            return problem.data.rpartition("/")[2]
    return "digits"


def check_files(problem: Continual) -> None:
    """SpoliaError where the data are not there; headers are read at most."""
    match problem:
        case PackedStream():
            from spolia.data.images import packed_file

            packed_file(problem.data, problem.folder)
        case ArraysStream():
            from spolia.data.labelled import names_in

            if problem.file is None:
                raise SpoliaError("no file is named", where="problem.file", mend="add `file: PATH`")
            names_in(problem.file.expanduser())
        case FolderStream():
            if problem.folder is None or not problem.folder.expanduser().is_dir():
                raise SpoliaError("is no folder", where=f"problem.folder {problem.folder}", mend="folder: PATH")
        case DatasetStream():
            check_datasets(problem.data, "problem.data")


def check_datasets(name: str, where: str) -> None:
    """SpoliaError where nothing is named, or `datasets` is not there to load it."""
    if not name:
        raise SpoliaError("no data set is named", where=where, mend="write a name that `datasets` knows, or a folder")
    if find_spec("datasets") is None:
        raise without_datasets(f"{where} {name}")
