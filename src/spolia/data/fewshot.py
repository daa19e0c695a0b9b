"""Sets of classes for episodes: Omniglot, the packed sets, folders of images, `datasets`, the digits.

All give a ClassSet of uint8 [n, channels, size, size]; only the digits are floating. Sets meant to meet, in a test on
another domain or a mixture, are read in one size with equal channels. Conversions: grey to colour repeats the channel,
colour to grey weighs it by ITU-R BT.601; packed sets are halved (mean of 2 x 2), doubled or given a black border, single
image files are scaled to fit (bilinear, antialiased) and cut to the square in the middle.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.lazy import np, torch
from spolia.data.digits import digits
from spolia.data.images import packed_file, read_parts, resized, sound
from spolia.data.tables import without_datasets
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.parts.classes import ClassSet

if TYPE_CHECKING:
    from PIL.Image import Image

ENDINGS = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".ppm", ".pgm", ".tif", ".tiff")
GREY = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601
SEEN_TWICE = (
    "gtsrb",
    "rsscn7",
    "dtd10",
)  # several images of one sign, or cut from one picture; test has others than train


def omniglot(
    part: Literal["background", "evaluation", "all"] = "background",
    *,
    folder: str | os.PathLike[str] | None = None,
    size: int = 28,
    channels: int = 1,
) -> ClassSet:
    """Omniglot's characters, 20 drawings of each, ink bright on dark (Lake et al. 2015). Superclasses are alphabets.

    The official parts have 964 characters of 30 alphabets and 659 of 20 others. For the split of Vinyals et al. 2016 by
    characters take all, `.split((1200 / 1623, 423 / 1623))`: which characters they drew is not published with the data.
    """
    if part not in ("background", "evaluation", "all"):
        raise SpoliaError(f"`{part}`", where="part", mend=did_you_mean(part, ("background", "evaluation", "all")))
    file = packed_file("omniglot28", folder)
    with sound(file), np.load(file, allow_pickle=False) as held:
        evaluation = held["is_eval"]
        mask = np.full(len(evaluation), True) if part == "all" else evaluation == (part == "evaluation")
        pixels, alphabets, characters = (held[name][mask] for name in ("x", "alphabet", "character"))
        count, drawers, height, width = pixels.shape
    names = [f"{a}/character{int(c):02d}" for a, c in zip(alphabets, characters, strict=True)]
    images = fitted(pixels.reshape(count * drawers, 1, height, width), size, channels)
    labels = np.repeat(np.arange(count), drawers)
    return ClassSet.of(images, labels, names, superclasses=[str(a) for a in alphabets], where="omniglot")


def packed(
    name: str,
    *,
    folder: str | os.PathLike[str] | None = None,
    size: int = 32,
    channels: int = 3,
    most: int | None = None,
    apart: bool | None = None,
) -> ClassSet:
    """A packed set with both its parts, such as tiny_imagenet100 or gtsrb: see images. `most` images of each part.

    `apart`: supports come from the train part and queries from the test part. By default so where a part holds several
    images of one thing: as support and query they would be too easy.
    """
    classes, train, test = read_parts(packed_file(name, folder), most)
    images = np.concatenate([fitted(part.pixels, size, channels) for part in (train, test)])
    labels = np.concatenate([train.labels, test.labels])
    queries = np.arange(len(labels)) >= len(train.labels)
    apart = name in SEEN_TWICE if apart is None else apart
    return ClassSet.of(images, labels, classes, queries=queries if apart else None, where=name)


def folder_classes(path: str | os.PathLike[str], *, size: int, channels: int = 3) -> ClassSet:
    """A folder of images by class: every folder in it that holds images is a class, whatever its depth.

    Its name is its path from `path`; where classes lie in folders of folders, as Omniglot's alphabets, the first of them
    is the superclass. All images are read and stay in memory.
    """
    top = Path(path)
    if not top.is_dir():
        raise SpoliaError("is no folder", where=str(path), mend="name the folder that holds one folder a class")
    files = [file for file in sorted(top.rglob("*")) if file.suffix.lower() in ENDINGS and file.is_file()]
    files = [file for file in files if file.parent != top]
    if not files:
        raise SpoliaError("holds no folders of images", where=str(path), mend=f"images end in {', '.join(ENDINGS)}")
    names = sorted({str(file.parent.relative_to(top)) for file in files})
    place = {name: number for number, name in enumerate(names)}
    problems = Problems()
    images = [found for file in files if (found := _opened(file, size, channels, problems)) is not None]
    problems.raise_if_any()
    deep = all(len(Path(name).parts) > 1 for name in names)
    return ClassSet.of(
        np.stack(images),
        np.array([place[str(file.parent.relative_to(top))] for file in files]),
        names,
        superclasses=[Path(name).parts[0] for name in names] if deep else None,
        where=str(path),
    )


def dataset_classes(
    source: Any, *, size: int, channels: int = 3, split: str = "train", image: str = "image", label: str = "label"
) -> ClassSet:
    """A set of the package `datasets`: its name, which fetches it, or one that is loaded. `image`, `label`: its columns."""
    where = source if isinstance(source, str) else "dataset"
    if isinstance(source, str):
        try:
            from datasets import load_dataset  # type: ignore[import-not-found]
        except ImportError:
            raise without_datasets(source) from None
        try:
            source = load_dataset(source, split=split)
        except (OSError, ValueError) as error:
            raise SpoliaError(
                f"cannot be had: {error}", where=where, mend="check its name, the split, the network"
            ) from None
    problems = Problems()
    for column in (image, label):
        if column not in source.column_names:
            problems.add(where, f"has no column `{column}`", did_you_mean(column, source.column_names))
    problems.raise_if_any()
    names = getattr(source.features[label], "names", None)
    labels = np.asarray(source[label])
    if names is not None:  # a split need not have all of its classes
        kept, labels = np.unique(labels, return_inverse=True)
        names = [names[i] for i in kept.tolist()]
    return ClassSet.of(_stacked((row[image] for row in source), size, channels), labels, names, where=where)


def digit_classes(domain: str = "upright") -> ClassSet:
    """The 1,797 scanned digits as ten classes, fp32 [n, 1, 8, 8] in 0 (paper) … 1 (ink): see digits."""
    splits = digits(domain)
    parts = (splits.base, splits.train, splits.validation, splits.test)
    order = torch.cat([part.index for part in parts]).argsort()
    x, y = (torch.cat([getattr(part, name) for part in parts])[order] for name in ("x", "y"))
    return ClassSet.of(
        ((x + 1) / 2).clamp(0, 1).view(-1, 1, 8, 8), y, [str(digit) for digit in range(10)], where="digits"
    )


# --- pixels ----------------------------------------------------------------------------------------------------------


def fitted(pixels: np.ndarray, size: int, channels: int) -> np.ndarray:
    """uint8 [n, 1 or 3, h, w] to [n, channels, size, size]."""
    _check_channels(channels)
    if pixels.shape[1] == 3 and channels == 1:
        grey = np.einsum("nchw,c->nhw", pixels, np.array(GREY, dtype=np.float32))
        pixels = np.rint(grey).astype(np.uint8)[:, None]
    found = resized(pixels, size)
    return np.ascontiguousarray(np.repeat(found, channels // found.shape[1], 1))


def _check_channels(channels: int) -> None:
    if channels not in (1, 3):
        raise SpoliaError(f"{channels}", where="channels", mend="give 1 for grey or 3 for colour")


def _stacked(images: Iterable[Any], size: int, channels: int) -> np.ndarray:
    from PIL import Image

    opened = (image if isinstance(image, Image.Image) else Image.fromarray(np.asarray(image)) for image in images)
    return np.stack([_square(image, size, channels) for image in opened])


def _opened(file: Path, size: int, channels: int, problems: Problems) -> np.ndarray | None:
    """One image file as uint8 [channels, size, size]; None where it cannot be read, which goes to `problems`."""
    try:
        from PIL import Image
    except ImportError:
        raise SpoliaError("Pillow is not installed", where=str(file), mend="pip install pillow") from None
    try:
        with Image.open(file) as image:
            return _square(image, size, channels)
    except (OSError, ValueError, SyntaxError) as error:  # Pillow calls a broken file either
        problems.add(str(file), f"cannot be read: {error}", "replace it, or take it away")
        return None


def _square(image: Image, size: int, channels: int) -> np.ndarray:
    """Scaled until the shorter side is `size`, and the middle of it. uint8 [channels, size, size]"""
    from PIL.Image import Resampling

    _check_channels(channels)
    image = image.convert("L" if channels == 1 else "RGB")
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Resampling.BILINEAR)
    left, top = (width - size) // 2, (height - size) // 2
    pixels = np.asarray(image.crop((left, top, left + size, top + size)))
    return pixels[None] if channels == 1 else pixels.transpose(2, 0, 1)
