"""Small real image sets in npz files: read in three codings, split by named randomness, shown as 32 x 32 RGB.

A file holds `classes` and, for each of its two parts, train and test, labels `y_PART` [n] and one of

    x_PART          uint8 [n, h, w]: grey
    x_PART_delta    uint8 [n, 3, h, w]: red and blue less green, then each pixel less the one to its left, modulo 256
    jpeg_PART       JPEG files end to end; image i lies at bytes offset_PART[i] : offset_PART[i + 1]

`track_PART` [n], where there is one, counts within a class what is shown, such as one traffic sign seen while driving past:
its images stay in one split. Other files do not tell which tiles were cut from one picture, so there such tiles can lie in
two splits of the train part; no file has them in train and test. Images come in the file's order, which takes the classes in
turn, so that the first few are of all of them.
"""

from __future__ import annotations

import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import BadZipFile

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

VARIABLE = "SPOLIA_DATA"
SIZE = 32
SHARES = (0.1, 0.15)  # of the train part: validation, unlabelled
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, by colour, where white is 1


@dataclass(frozen=True)
class Split:
    """Pixels x [n, 3, size, size] uint8, labels y [n] int64, and where in its part of the file each image stands."""

    x: Tensor
    y: Tensor
    index: Tensor

    def __len__(self) -> int:
        return len(self.y)

    def first(self, count: int | None) -> Split:
        """The first `count`; all where it is None or larger."""
        return Split(self.x[:count], self.y[:count], self.index[:count])


@dataclass(frozen=True)
class Splits:
    """One set: `train` for the expert, `validation` to choose, `unlabelled` to adapt on, `test` to judge."""

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split
    unlabelled: Split
    test: Split


@dataclass(frozen=True)
class Part:
    """What a file holds of train or test: pixels uint8 [n, 3, h, w], labels and groups int64 [n].

    Images of one group show the same thing.
    """

    pixels: np.ndarray
    labels: np.ndarray
    groups: np.ndarray


def data_folder(folder: str | os.PathLike[str] | None = None) -> Path:
    """`folder`, else the one that SPOLIA_DATA names. SpoliaError where there is none."""
    given = os.environ.get(VARIABLE) if folder is None else folder
    if not given:
        raise SpoliaError("is not set", where=VARIABLE, mend=f"export {VARIABLE}=FOLDER, the one with the npz files")
    if not Path(given).is_dir():
        raise SpoliaError("is no folder", where=str(given), mend=f"name the folder with the npz files in {VARIABLE}")
    return Path(given)


def images(
    name: str,
    seed: int = 0,
    *,
    folder: str | os.PathLike[str] | None = None,
    most: int | None = None,
    shares: tuple[float, float] = SHARES,
    size: int = SIZE,
) -> Splits:
    """The set `name` in four splits that share no image. Validation and unlabelled inputs are taken out of the train part.

    `folder` as in `data_folder`; `most` reads only the first images of each part; `shares` are those of validation and
    unlabelled, of every class as nearly as groups allow; a class keeps at least one group for training. The seed says
    which image is where.
    """
    if min(shares) < 0 or sum(shares) >= 1:
        raise SpoliaError(
            f"{shares} leaves nothing to train on", where="shares", mend="give two numbers, in sum below 1"
        )
    classes, train, test = read_parts(packed_file(name, folder), most)
    owner = _owners(train, shares, generator(seed, "images", name, "split"))
    kept, validation, unlabelled = (_split(train, np.flatnonzero(owner == number), size) for number in range(3))
    return Splits(name, classes, kept, validation, unlabelled, _split(test, np.arange(len(test.labels)), size))


def normalised(pixels: Tensor) -> Tensor:
    """Pixels [n, 3, h, w] in 0 … 255 as fp32 with ImageNet's mean and standard deviation taken out."""
    mean, std = (torch.tensor(values, device=pixels.device).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.float() / 255 - mean) / std


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 [n, 3, h, h] to [n, 3, size, size]: halved (mean of 2 x 2), doubled (repeated), or with a black border."""
    n, colours, height, width = pixels.shape
    if height == width == size:
        return pixels
    if height == width == 2 * size:
        sums = pixels.reshape(n, colours, size, 2, size, 2).sum((3, 5), dtype=np.uint16)
        return ((sums + 2) // 4).astype(np.uint8)
    if 2 * height == 2 * width == size:
        return pixels.repeat(2, 2).repeat(2, 3)
    if max(height, width) > size:
        raise SpoliaError(f"images of {height} x {width}", where="size", mend=f"give {height // 2} or {height}")
    top, left = (size - height) // 2, (size - width) // 2
    return np.pad(pixels, ((0, 0), (0, 0), (top, size - height - top), (left, size - width - left)))


# --- files -----------------------------------------------------------------------------------------------------------


def packed_file(name: str, folder: str | os.PathLike[str] | None = None) -> Path:
    """`name`.npz in `data_folder(folder)`. SpoliaError where it is not there."""
    place = data_folder(folder)
    files = {file.stem: file for file in sorted(place.glob("*.npz"))}
    if name not in files:
        raise SpoliaError(f"there is no {name}.npz", where=str(place), mend=did_you_mean(name, files))
    return files[name]


def read_parts(file: Path, most: int | None = None) -> tuple[tuple[str, ...], Part, Part]:
    """The names of the classes, and the first `most` images of train and of test."""
    classes = _classes(file)
    train, test = (read_part(file, part, most) for part in ("train", "test"))
    for part in (train, test):
        if len(part.labels) and not 0 <= part.labels.min() <= part.labels.max() < len(classes):
            what = f"labels from {part.labels.min()} to {part.labels.max()} for {len(classes)} classes"
            raise SpoliaError(what, where=str(file), mend="get a sound copy")
    return classes, train, test


def read_part(file: Path, part: str, most: int | None = None) -> Part:
    """The first `most` images of `part` (train or test), at the size they have. SpoliaError names a file that is unsound."""
    with sound(file), np.load(file, allow_pickle=False) as held:
        labels = held[f"y_{part}"][:most].astype(np.int64)
        pixels = _pixels(held, part, most, file)
        if pixels.dtype != np.uint8 or pixels.ndim != 4 or len(pixels) != len(labels) or pixels.shape[1] != 3:
            raise ValueError(f"{len(labels)} labels beside images {list(pixels.shape)} of {pixels.dtype}")
        if f"track_{part}" in held:
            pairs = np.stack([labels, held[f"track_{part}"][:most].astype(np.int64)], 1)
            groups = np.unique(pairs, axis=0, return_inverse=True)[1].reshape(-1)
        else:
            groups = np.arange(len(labels))
        return Part(pixels, labels, groups)


def _pixels(held: Any, part: str, most: int | None, file: Path) -> np.ndarray:
    """uint8 [n, 3, h, w], whatever the coding."""
    if f"x_{part}" in held:
        grey = held[f"x_{part}"][:most]
        return np.repeat(grey[:, None], 3, 1)
    if f"x_{part}_delta" in held:
        found = np.cumsum(held[f"x_{part}_delta"][:most], axis=-1, dtype=np.uint8)
        found[:, ::2] += found[:, 1:2]  # modulo 256, as they were taken off
        return found
    data, ends = held[f"jpeg_{part}"].tobytes(), None if most is None else most + 1
    offsets = held[f"offset_{part}"][:ends].tolist()
    return np.stack([_jpeg(data[start:stop], file) for start, stop in pairwise(offsets)])


def _jpeg(data: bytes, file: Path) -> np.ndarray:
    """One JPEG file as uint8 [3, h, w]."""
    try:
        from PIL import Image
    except ImportError:
        what = "its images are JPEG files, and Pillow is not installed"
        raise SpoliaError(what, where=str(file), mend="pip install pillow") from None
    with Image.open(io.BytesIO(data), formats=["JPEG"]) as image:
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)


def _classes(file: Path) -> tuple[str, ...]:
    with sound(file), np.load(file, allow_pickle=False) as held:
        return tuple(map(str, held["classes"].tolist()))


@contextmanager
def sound(file: Path) -> Iterator[None]:
    """Inside, what an unsound file raises becomes a SpoliaError."""
    try:
        yield
    except KeyError as error:
        mend = "give a file with classes, labels and images: see spolia.data.images"
        raise SpoliaError(str(error.args[0]), where=str(file), mend=mend) from None
    except (OSError, ValueError, TypeError, EOFError, IndexError, BadZipFile, zlib.error) as error:
        raise SpoliaError(f"cannot be read: {error}", where=str(file), mend="get a sound copy") from None


# --- splits ----------------------------------------------------------------------------------------------------------


def _owners(part: Part, shares: tuple[float, ...], draws: np.random.Generator) -> np.ndarray:
    """Of every image the number of its split: 0 train, 1 validation, 2 unlabelled.

    Class by class and in random order, a group goes to the split that is due most, if at least half of it is due. What a
    class leaves due passes to the next, so that the shares hold for the whole even where groups are large.
    """
    sizes = np.bincount(part.groups)
    owner = np.zeros(len(sizes), dtype=np.int64)  # of every group
    due = np.zeros(len(shares))
    for label in np.unique(part.labels):
        own = np.unique(part.groups[part.labels == label])
        due += np.asarray(shares) * int(sizes[own].sum())
        for group in draws.permutation(own)[:-1]:
            most = int(due.argmax())
            if due[most] >= sizes[group] / 2:
                owner[group] = most + 1
                due[most] -= sizes[group]
    return owner[part.groups]


def _split(part: Part, index: np.ndarray, size: int) -> Split:
    pixels = np.ascontiguousarray(resized(part.pixels[index], size))
    return Split(torch.from_numpy(pixels), torch.from_numpy(part.labels[index]), torch.from_numpy(index))
