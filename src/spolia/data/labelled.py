"""Labelled sets in two parts, train and test, for streams: packed sets, a user's arrays, folders of images, `datasets`, digits.

Images are uint8 [n, channels, h, w]; the digits and arrays of other kinds stay as they are. `cropped` is the usual view of
small images in training.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.data.digits import digits
from spolia.data.fewshot import dataset_classes, fitted, folder_classes
from spolia.data.images import packed_file, read_parts
from spolia.data.tables import array_heads, named_arrays, named_labels, read_arrays, read_dataset
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.classes import ClassSet

    Pair = tuple[Tensor, Tensor]  # inputs [n, ...], labels [n]

PARTS = ("train", "test")
SHARE = 0.2  # for the test where a set comes in one part
PICTURES = ("image", "img", "pixel_values")  # columns of `datasets`, the first that is there


@dataclass(frozen=True)
class Labelled:
    """A set: labels are places in `classes`."""

    name: str
    classes: tuple[str, ...]
    train: Pair
    test: Pair

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""
        return tuple(self.train[0].shape[1:])


def labelled_digits(seed: int = 0) -> Labelled:
    """scikit-learn's digits, fp32 [n, 1, 8, 8] in 0 (paper) … 1 (ink): 600 are the test, the seed says which."""
    held = digits("upright", seed)
    made = []
    for parts in ((held.base, held.train, held.validation), (held.test,)):
        x = (torch.cat([part.x for part in parts]) + 1) / 2
        made.append((x.view(-1, 1, 8, 8), torch.cat([part.y for part in parts])))
    return Labelled("digits", tuple(str(digit) for digit in range(10)), *made)


def labelled_packed(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    size: int | None = None,
    channels: int = 3,
    most: int | None = None,
) -> Labelled:
    """A packed set such as mnist or tiny_imagenet100: see images. `most` images of each part; `size` as they are."""
    classes, *parts = read_parts(packed_file(name, folder), most)
    made = []
    for part in parts:
        pixels = fitted(part.pixels, part.pixels.shape[-1] if size is None else size, channels)
        made.append((torch.from_numpy(pixels), torch.from_numpy(part.labels)))
    return Labelled(name, classes, *made)


def labelled_arrays(file: Path, *, most: int | None = None, share: float = SHARE, seed: int = 0) -> Labelled:
    """Arrays of an npz file: x_train, y_train, x_test, y_test, or x and y, of which the seed draws a test of that share.

    Usual other names will do: see tables. uint8 [n, h, w (, channels)] becomes [n, channels, h, w].
    """
    named = names_in(file)
    arrays = read_arrays(file, [name for pair in named for name in pair], most)
    parts = [(_images(arrays[x]), arrays[y]) for x, y in named]
    for (x, y), names in zip(parts, named, strict=True):
        if y.ndim != 1 or y.dtype.kind not in "iu" or len(x) != len(y) or not len(y):
            what = f"{names[1]} {list(y.shape)} of {y.dtype} beside {names[0]} {list(x.shape)}"
            raise SpoliaError(what, where=str(file), mend="give one whole number an input")
    raw = np.unique(np.concatenate([y for _, y in parts]))
    made = [(torch.from_numpy(x), torch.from_numpy(np.searchsorted(raw, y))) for x, y in parts]
    if len(made) == 1:
        made = list(_split(*made[0], share, seed))
    return Labelled(file.stem, tuple(map(str, raw.tolist())), *made)


def names_in(file: Path) -> list[tuple[str, str]]:
    """Inputs and labels of train and test, or of the one part that there is. Reads headers alone."""
    if not file.is_file():
        raise SpoliaError("there is no such file", where=str(file), mend="name an npz file with x and y")
    heads = list(array_heads(file))
    try:
        whole = any(name.endswith("_train") for name in heads)
        ends: tuple[str | None, ...] = PARTS if whole else (None,)
        return [(named_arrays(heads, None, end)[0], named_labels(heads, None, end, "array")) for end in ends]
    except SpoliaError as error:
        problem = error.problems[0]
        mend = f"call the arrays x and y, or x_train, y_train, x_test, y_test; it holds {', '.join(heads)}"
        raise SpoliaError(problem.what, where=str(file), mend=mend) from None


def labelled_folder(path: Path, *, size: int, channels: int = 3, share: float = SHARE, seed: int = 0) -> Labelled:
    """Folders of images by class, below `train` and `test` where these are there, else split by the seed."""
    if all((path / part).is_dir() for part in PARTS):
        return _of_two(path.name, [folder_classes(path / part, size=size, channels=channels) for part in PARTS])
    whole = folder_classes(path, size=size, channels=channels)
    return Labelled(path.name, whole.names, *_split(*_pair(whole), share, seed))


def labelled_dataset(
    name: str,
    *,
    config: str | None = None,
    parts: tuple[str, str] = PARTS,
    image: str | None = None,
    label: str | None = None,
    size: int,
    channels: int = 3,
    most: int | None = None,
) -> Labelled:
    """Images that the library `datasets` loads, by a name or from a folder of its files; `parts`: what it calls splits.

    `image`, `label`: columns, by default the usual ones. Images are scaled and cut to squares. `most` rows of each part.
    """
    source, sets = Path(name).expanduser(), []
    for part in parts:
        rows = read_dataset(str(source) if source.is_dir() else name, config, part)
        rows, held = rows.select(range(min(most, len(rows)))) if most else rows, list(rows.column_names)
        column = image or next((usual for usual in PICTURES if usual in held), None)
        if column is None:
            mend = f"name the column of the images; it holds {', '.join(held)}"
            raise SpoliaError(f"has none of the columns {', '.join(PICTURES)}", where=name, mend=mend)
        labels = named_labels(held, label, None, "column")
        sets.append(dataset_classes(rows, size=size, channels=channels, image=column, label=labels))
    return _of_two(source.name, sets)


def cropped(x: Tensor, draws: np.random.Generator, border: int = 4) -> Tensor:
    """Images [n, c, h, w] moved by up to `border` pixels either way, black coming in, and half of them mirrored."""
    n, _, height, width = x.shape
    top, left = (torch.from_numpy(draws.integers(0, 2 * border + 1, n)).to(x.device) for _ in range(2))
    mirrored = torch.from_numpy(draws.random(n) < 0.5).to(x.device)
    wide = torch.nn.functional.pad(x, (border,) * 4)
    rows = top.unsqueeze(1) + torch.arange(height, device=x.device)  # [n, h]
    columns = torch.arange(width, device=x.device)
    columns = left.unsqueeze(1) + torch.where(mirrored.unsqueeze(1), columns.flip(0), columns)  # [n, w]
    return wide[torch.arange(n, device=x.device).view(n, 1, 1), :, rows.unsqueeze(2), columns.unsqueeze(1)].movedim(
        3, 1
    )


# --- parts -----------------------------------------------------------------------------------------------------------


def _images(x: np.ndarray) -> np.ndarray:
    """uint8 images with their channels first; anything else as it is."""
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        return x
    if x.ndim == 3:
        return x[:, None]
    last = x.shape[-1] in (1, 3) and x.shape[1] not in (1, 3)
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2)) if last else x


def _of_two(name: str, sets: list[ClassSet]) -> Labelled:
    """Two parts with the same classes."""
    if sets[0].names != sets[1].names:
        apart = sorted(set(sets[0].names) ^ set(sets[1].names))
        raise SpoliaError(f"only one part has {', '.join(apart[:5])}", where=name, mend="give both the same classes")
    return Labelled(name, sets[0].names, *map(_pair, sets))


def _pair(held: ClassSet) -> Pair:
    labels = torch.zeros(len(held.inputs), dtype=torch.int64)
    for label, places in enumerate(held.support):
        labels[torch.from_numpy(places[places >= 0])] = label
    return held.inputs, labels


def _split(x: Tensor, y: Tensor, share: float, seed: int) -> tuple[Pair, Pair]:
    """Of every class the rounded share to the test, one input at least, and one at least stays."""
    draws, test = generator(seed, "labelled", "split"), np.zeros(len(y), dtype=bool)
    labels = y.numpy()
    for label in np.unique(labels):
        own = draws.permutation(np.flatnonzero(labels == label))
        if len(own) < 2:
            raise SpoliaError(f"one input of class {label}", where="test", mend="give two of every class, or a test")
        test[own[: min(len(own) - 1, max(1, round(share * len(own))))]] = True
    kept, held = (torch.from_numpy(np.flatnonzero(mask)) for mask in (~test, test))
    return (x[kept], y[kept]), (x[held], y[held])
