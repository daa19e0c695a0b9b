"""Images in files, a folder a class, opened one at a time and shown as a model expects them.

Size, cropping and colours are those of the model's own preprocessor_config.json; without one an image is resized to the
model's size and scaled to 0 … 1.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

ENDS = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
_BILINEAR = 2  # as PIL numbers its filters


@dataclass(frozen=True)
class Look:
    """How an image becomes an input: resized to `size` (height, width), or its shorter side to `edge` and the middle cut
    out; by channel, pixels times `factor` less `mean`, divided by `std`.
    """

    size: tuple[int, int]
    channels: int = 3
    edge: int | None = None
    mean: tuple[float, ...] = (0.0,)
    std: tuple[float, ...] = (1.0,)
    factor: float = 1 / 255
    resample: int = _BILINEAR

    @classmethod
    def of(cls, told: Mapping[str, Any] | None, size: tuple[int, int], channels: int) -> Look:
        """From what preprocessor_config.json says; `size` and `channels` are the model's."""
        told = told or {}
        wanted = told.get("size")
        edge = wanted.get("shortest_edge") if isinstance(wanted, Mapping) and told.get("do_resize", True) else None
        whole = _extent(told.get("crop_size") if told.get("do_center_crop") else None) or _extent(wanted) or size
        normal = told.get("do_normalize", bool(told.get("image_mean")))
        return cls(
            whole,
            channels,
            int(edge) if edge else None,
            tuple(told.get("image_mean") or (0.0,)) if normal else (0.0,),
            tuple(told.get("image_std") or (1.0,)) if normal else (1.0,),
            float(told.get("rescale_factor") or 1 / 255) if told.get("do_rescale", True) else 1.0,
            int(told.get("resample") or _BILINEAR),
        )

    def values(self, pixels: np.ndarray) -> Tensor:
        """uint8 [..., channels, h, w] as fp32 inputs."""
        mean, std = (torch.tensor(part, dtype=torch.float32).view(-1, 1, 1) for part in (self.mean, self.std))
        return (torch.from_numpy(np.array(pixels)).float() * self.factor - mean) / std

    def shown(self, image: Any) -> Tensor:
        """A PIL image as [channels, h, w]."""
        image = image.convert("L" if self.channels == 1 else "RGB")
        if self.edge is not None:
            short = min(image.size)
            image = image.resize(tuple(int(self.edge * side / short) for side in image.size), self.resample)
            top, left = (image.height - self.size[0]) // 2, (image.width - self.size[1]) // 2
            image = image.crop((left, top, left + self.size[1], top + self.size[0]))
        elif image.size != self.size[::-1]:
            image = image.resize(self.size[::-1], self.resample)
        pixels = np.asarray(image)
        return self.values(pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1))


def _extent(told: Any) -> tuple[int, int] | None:
    if isinstance(told, int):
        return told, told
    if isinstance(told, Mapping) and "height" in told and "width" in told:
        return int(told["height"]), int(told["width"])
    return None


def classes_in(folder: Path) -> dict[str, list[Path]]:
    """The images of each class, by the names of its folders in order. SpoliaError where there are none."""
    found = {
        place.name: sorted(file for file in place.iterdir() if file.suffix.lower() in ENDS)
        for place in sorted(folder.iterdir())
        if place.is_dir()
    }
    found = {name: files for name, files in found.items() if files}
    if not found:
        mend = "put the images of each class into a folder called as the class"
        raise SpoliaError("holds no folders of images", where=str(folder), mend=mend)
    return found


def check_pillow(where: str) -> None:
    from importlib.util import find_spec

    if find_spec("PIL") is None:
        raise SpoliaError("its images need Pillow, which is not installed", where=where, mend="pip install pillow")


class Pictures:
    """Image files as a sequence of inputs [channels, h, w], read when they are asked for."""

    def __init__(self, files: list[Path], look: Look):
        self.files, self.look = files, look

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, place: int) -> Tensor:
        from PIL import Image

        try:
            with Image.open(self.files[place]) as image:
                return self.look.shown(image)
        except (OSError, ValueError) as error:
            what = f"cannot be read: {error}"
            raise SpoliaError(what, where=str(self.files[place]), mend="get a sound copy, or remove it") from None
