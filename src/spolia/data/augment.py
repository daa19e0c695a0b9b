"""Images changed at random, many at once: every image by itself, in the size and type it has.

Order: mirror; crop; rotate, scale and shift at once; jitter; grey; blur; noise. What is at zero does nothing, bit for bit.
Pixels are uint8 0 … 255 or floating 0 … 1 with one or three channels; normalise after, not before.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from spolia.core.lazy import np, torch
from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

    Draws = np.random.Generator | Sequence[np.random.Generator]

GREY = (0.299, 0.587, 0.114)  # of red, green, blue: ITU-R BT.601
RATIO = 4 / 3  # most a crop is wider than high, or higher than wide, next to the image: as torchvision has it
OURS = "our choice: off"


class Augment(Settings):
    """Which changes, and how strong. A call changes every image by draws of its own."""

    crop: float = setting(1.0, "least share of the area kept by a crop, which is resized back", source=OURS, gt=0, le=1)
    jitter: float = setting(
        0.0,
        "brightness, contrast, saturation by 1 ± this; hue by ± a quarter of it, of a turn",
        source=OURS,
        ge=0,
        le=1,
    )
    grayscale: float = setting(0.0, "probability of losing colour", source=OURS, ge=0, le=1)
    blur: float = setting(0.0, "largest deviation of the Gaussian", unit="image sides", source=OURS, ge=0, le=0.2)
    flip: float = setting(0.0, "probability of being mirrored, left to right", source=OURS, ge=0, le=1)
    rotate: float = setting(0.0, "largest angle, either way", unit="radians", source=OURS, ge=0, le=math.pi)
    scale: float = setting(0.0, "size by 1 ± this", source=OURS, ge=0, lt=1)
    shift: float = setting(0.0, "largest shift, in height and in width", unit="image sides", source=OURS, ge=0, le=1)
    noise: float = setting(0.0, "deviation of Gaussian noise, where white is 1", source=OURS, ge=0)
    beyond: Literal["zeros", "border", "reflection"] = setting(
        "zeros", "what lies outside the image", source="our choice"
    )

    def __call__(self, x: Tensor, draws: Draws) -> Tensor:
        """x [..., channels, height, width] changed, in its shape and type; x itself stays.

        `draws`: one generator, or one for each entry of x's first dimension, so that an entry does not depend on what
        else is in the batch.
        """
        if not x.numel() or self == Augment(beyond=self.beyond):
            return x
        _check(x)
        whole = x.dtype == torch.uint8
        images = x.reshape(-1, *x.shape[-3:])
        images = images.float() / 255 if whole else images
        chances = _Chances(draws, x.shape[0], images)
        images = self._coloured(self._moved(images, chances), chances)
        if whole:
            images = (images * 255).round().clamp(0, 255).to(torch.uint8)
        return images.reshape(x.shape)

    def views(self, x: Tensor, count: int, draws: Draws) -> Tensor:
        """`count` versions of every set of n images: [..., n, c, h, w] -> [..., count, n, c, h, w]."""
        many = x.unsqueeze(-5).expand(*x.shape[:-4], count, *x.shape[-4:])
        return self(many, draws)

    def _moved(self, x: Tensor, chances: _Chances) -> Tensor:
        if self.flip:
            x = torch.where(chances.uniform(0, 1, 1, 1, 1) < self.flip, x.flip(-1), x)
        if self.crop < 1:
            area = chances.uniform(self.crop, 1)
            half = torch.clamp(-area.log(), max=math.log(RATIO))  # a wider one would leave the image
            ratio = (chances.uniform(-1, 1) * half).exp()
            sides = torch.stack([(area * ratio).sqrt(), (area / ratio).sqrt()], 1).clamp(max=1)  # width, height
            x = resampled(x, cropping(sides, chances.uniform(-1, 1, 2) * (1 - sides)), "border")
        if self.rotate or self.scale or self.shift:
            angle = chances.uniform(-self.rotate, self.rotate)
            size = chances.uniform(1 - self.scale, 1 + self.scale)
            shift = chances.uniform(-2 * self.shift, 2 * self.shift, 2)  # a side runs from -1 to 1
            x = resampled(x, placing(angle, size, shift, x.shape[-1] / x.shape[-2]), self.beyond)
        return x

    def _coloured(self, x: Tensor, chances: _Chances) -> Tensor:
        colours = x.shape[1] == 3
        if self.jitter:
            low, high = 1 - self.jitter, 1 + self.jitter
            brightness, contrast, saturation = (chances.uniform(low, high, 1, 1, 1) for _ in range(3))
            turn = chances.uniform(-self.jitter / 4, self.jitter / 4)
            x = (x * brightness).clamp(0, 1)
            x = _blended(x, grey(x).mean((1, 2, 3), keepdim=True), contrast)
            if colours:
                x = hue_turned(_blended(x, grey(x), saturation), turn).clamp(0, 1)
        if self.grayscale and colours:
            x = torch.where(chances.uniform(0, 1, 1, 1, 1) < self.grayscale, grey(x), x)
        if self.blur:
            side = max(x.shape[-2:])
            radius = min(math.ceil(3 * self.blur * side), *(length - 1 for length in x.shape[-2:]))
            x = blurred(x, chances.uniform(0, self.blur * side), radius)
        if self.noise:
            x = (x + self.noise * chances.normal(*x.shape[1:])).clamp(0, 1)
        return x


PAPER = Augment(crop=0.5, jitter=0.4, grayscale=0.2, blur=0.03, flip=0.5)
"""The five changes of meta self-distillation (Cheng et al. 2024); it does not state their strengths, these are ours."""

SHAKEN = Augment(rotate=0.3, scale=0.2, shift=0.2, noise=0.15)
"""For written characters, which a mirror or a small crop would make into others."""

_SCENARIOS = {  # weak, strong: our choice
    "corrupted": (Augment(noise=0.1, blur=0.02), Augment(noise=0.25, blur=0.05)),
    "cropped": (Augment(crop=0.6), Augment(crop=0.25)),
    "recoloured": (Augment(jitter=0.4, grayscale=0.2), Augment(jitter=0.8, grayscale=0.5)),
    "mixed": (
        Augment(noise=0.05, blur=0.02, crop=0.6, jitter=0.4, grayscale=0.2),
        Augment(noise=0.15, blur=0.05, crop=0.25, jitter=0.8, grayscale=0.5),
    ),
    "shaken": (Augment(rotate=0.15, scale=0.1, shift=0.1, noise=0.075), SHAKEN),
}


def scenario(kind: str, strength: str = "strong") -> Augment:
    """What is done to the support in a test of robustness: corrupted, cropped, recoloured, mixed, shaken; weak, strong."""
    if kind not in _SCENARIOS:
        raise SpoliaError(f"there is no `{kind}`", where="scenario", mend=did_you_mean(kind, _SCENARIOS))
    if strength not in ("weak", "strong"):
        raise SpoliaError(f"`{strength}`", where="strength", mend=did_you_mean(strength, ("weak", "strong")))
    return _SCENARIOS[kind][strength == "strong"]


# --- what is done to images x [n, channels, h, w] --------------------------------------------------------------------


def grey(x: Tensor) -> Tensor:
    """The brightness of each pixel [n, 1, h, w]; one channel is as it is."""
    if x.shape[1] == 1:
        return x
    return (x * x.new_tensor(GREY).view(3, 1, 1)).sum(1, keepdim=True)


def hue_turned(x: Tensor, turn: Tensor) -> Tensor:
    """Three colours turned about the axis of greys by `turn` [n], in turns: greys and the sum of the colours stay."""
    angle = (2 * math.pi * turn.to(x.dtype)).view(-1, 1, 1)
    third = x.new_full((3, 3), 1 / 3)
    across = x.new_tensor([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    matrix = third + angle.cos() * (torch.eye(3, dtype=x.dtype, device=x.device) - third) + angle.sin() * across
    return (matrix @ x.flatten(2)).view(x.shape)


def blurred(x: Tensor, sigma: Tensor, radius: int) -> Tensor:
    """Convolved with a Gaussian of deviation `sigma` [n], in pixels, cut at `radius`; the image is mirrored at its edge."""
    if not radius:
        return x
    taps = torch.arange(-radius, radius + 1, device=x.device)
    weight = (-0.5 * (taps / sigma.to(x.dtype).clamp(min=1e-3).unsqueeze(1)) ** 2).exp()  # at 1e-3 the middle has all
    weight = weight / weight.sum(1, keepdim=True)
    return _bands(weight, taps, x.shape[-2]) @ x @ _bands(weight, taps, x.shape[-1]).transpose(2, 3)


def _bands(weight: Tensor, taps: Tensor, length: int) -> Tensor:
    """The convolution along one side as a matrix for each image [n, 1, length, length]: faster than taps one by one."""
    at = torch.arange(length, device=taps.device).unsqueeze(1) + taps
    at = length - 1 - (at.abs() - (length - 1)).abs()  # mirrored at both ends
    chosen = torch.nn.functional.one_hot(at, length).to(weight.dtype)  # [to, tap, from]
    return torch.einsum("nt,otf->nof", weight, chosen).unsqueeze(1)


def cropping(sides: Tensor, middle: Tensor) -> Tensor:
    """The part of `sides` [n, 2] around `middle` [n, 2], stretched to the whole. For `resampled`."""
    return torch.cat([torch.diag_embed(sides), middle.unsqueeze(2)], 2)


def placing(angle: Tensor, size: Tensor, shift: Tensor, aspect: float) -> Tensor:
    """Turned by `angle` [n] to the left, scaled by `size` [n], moved by `shift` [n, 2]. For `resampled`.

    `aspect` is width over height: an angle is one among pixels, coordinates run from -1 to 1 either way.
    """
    cosine, sine = angle.cos(), angle.sin()
    linear = torch.stack([cosine, -sine / aspect, sine * aspect, cosine], 1).view(-1, 2, 2) / size.view(-1, 1, 1)
    return torch.cat([linear, -linear @ shift.unsqueeze(2)], 2)


def resampled(x: Tensor, maps: Tensor, beyond: str = "zeros") -> Tensor:
    """Each image read where its affine map [n, 2, 3] sends the pixels of the result, between pixels linearly.

    Coordinates are x before y, from -1 to 1; what lies beyond is zero or as grid_sample has it.
    """
    grid = torch.nn.functional.affine_grid(maps.to(x.dtype), list(x.shape), align_corners=False)
    return torch.nn.functional.grid_sample(x, grid, mode="bilinear", padding_mode=beyond, align_corners=False)


def _blended(x: Tensor, other: Tensor, share: Tensor) -> Tensor:
    return (other + share * (x - other)).clamp(0, 1)


class _Chances:
    """Random numbers for each of the images, on their device and in their type."""

    def __init__(self, draws: Draws, entries: int, images: Tensor):
        self._sources = list(draws) if isinstance(draws, Sequence) else [draws]
        if isinstance(draws, Sequence) and len(draws) != entries:
            what = f"{len(draws)} generators for a batch of {entries}"
            raise SpoliaError(what, where="draws", mend="give one, or one for each entry of the first dimension")
        self._each, self._images = len(images) // len(self._sources), images

    def uniform(self, low: float, high: float, *shape: int) -> Tensor:
        """[images, *shape]"""
        return self._joined([source.uniform(low, high, (self._each, *shape)) for source in self._sources])

    def normal(self, *shape: int) -> Tensor:
        """[images, *shape]"""
        return self._joined([source.standard_normal((self._each, *shape), dtype="float32") for source in self._sources])

    def _joined(self, parts: list[np.ndarray]) -> Tensor:
        return torch.from_numpy(np.concatenate(parts)).to(self._images.device, self._images.dtype)


def _check(x: Tensor) -> None:
    if x.dim() < 4 or x.shape[-3] not in (1, 3) or not (x.dtype == torch.uint8 or x.is_floating_point()):
        what = f"inputs {list(x.shape)} of {x.dtype} are no images"
        mend = "give [..., channels, height, width] with 1 or 3 channels, uint8 or floating"
        raise SpoliaError(what, where="augment", mend=mend)
