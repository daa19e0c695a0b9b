"""How recovered images are looked at before an expert sees them, and the noise they begin with: drawn by name, for stacks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.datafree.inversion import Inverting


def moved(x: Tensor, rows: Tensor, columns: Tensor, settings: Inverting) -> Tensor:
    """Images [n, c, h, w] as they are looked at: row rows[i, a] and column columns[i, b] of image i at place (a, b)."""
    if settings.augment == "none" and not settings.flip:
        return x
    if settings.augment == "crop":
        down, right = shifts(x.shape[2:], settings)
        x = torch.nn.functional.pad(x, [right, right, down, down])
    n, c, _, w = x.shape
    h = rows.shape[1]
    x = x.gather(2, rows.view(n, 1, h, 1).expand(n, c, h, w))
    return x.gather(3, columns.view(n, 1, 1, -1).expand(n, c, h, columns.shape[1]))


def shifts(size: Sequence[int], settings: Inverting) -> list[int]:
    """How far images of this height and width move at most, each way."""
    return [side // 8 if settings.shift is None else settings.shift for side in size]


def moves(
    draws: Sequence[np.random.Generator], n: int, shape: tuple[int, int, int], settings: Inverting, device: Any
) -> tuple[Tensor, Tensor]:
    """Which rows [experts, n, h] and columns [experts, n, w] are looked at."""
    found = [_looks(one, n if settings.per_sample else 1, shape, settings) for one in draws]
    rows, columns = (np.stack([pair[axis] for pair in found]) for axis in (0, 1))
    wide = (np.broadcast_to(part, (len(draws), n, part.shape[2])) for part in (rows, columns))
    rows, columns = (torch.from_numpy(np.array(part)).to(device) for part in wide)
    return rows, columns


def _looks(draws: np.random.Generator, n: int, shape: tuple[int, int, int], settings: Inverting) -> list[np.ndarray]:
    """Rows [n, h] and columns [n, w] of one expert's images."""
    found = []
    for size, shift in zip(shape[1:], shifts(shape[1:], settings), strict=True):
        places = np.broadcast_to(np.arange(size), (n, size))
        if settings.augment == "crop":
            places = places + draws.integers(0, 2 * shift + 1, (n, 1))
        elif settings.augment == "roll":
            places = (places + draws.integers(-shift, shift + 1, (n, 1))) % size
        found.append(places)
    if settings.flip:
        found[1] = np.where(draws.random((n, 1)) < 0.5, found[1][:, ::-1], found[1])
    return [np.ascontiguousarray(places, dtype=np.int64) for places in found]


def noise(
    draws: Sequence[np.random.Generator],
    n: int,
    pixels: bool,
    settings: Inverting,
    shape: tuple[int, int, int],
    device: Any,
) -> dict[str, Tensor]:
    """What is optimised beside the generator's weights: z [experts, n, latent], or pixels [experts, n, c, h, w]."""
    name, size = ("pixels", shape) if pixels else ("z", (settings.latent,))
    drawn = np.stack([one.standard_normal((n, *size), dtype=np.float32) for one in draws])
    return {name: torch.from_numpy(drawn).to(device).requires_grad_()}
