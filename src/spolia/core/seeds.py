"""Randomness by name: the same seed and names give the same numbers, whatever the order, the threads or the chunks."""

from __future__ import annotations

import hashlib

from spolia.core.lazy import np

_EDGES = 2048  # numbers for the coins of a tile that their byte leaves open: 512 on average, deviation 23
TILE = 1 << 17  # words drawn from one generator; a block of the streaming engine is one tile


def entropy(seed: int, *names: object) -> int:
    """A 128-bit number that depends on the seed and every name."""
    text = "\0".join([str(seed), *map(str, names)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=16).digest(), "little")


def generator(seed: int, *names: object) -> np.random.Generator:
    """A numpy generator of its own for `names`."""
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence(entropy(seed, *names))))


def words16(root: int, start: int, stop: int) -> np.ndarray:
    """Uniform 16-bit words `start:stop` of the endless stream `root` (from `entropy`): uint16, stop - start of them."""
    parts = []
    for tile in range(start // TILE, -(-stop // TILE)):
        low = tile * TILE
        count = min(stop - low, TILE)
        drawn = _source(root, tile).integers(0, 1 << 64, size=-(-count // 4), dtype=np.uint64).view(np.uint16)
        parts.append(drawn[max(start - low, 0) : count])
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint16)])


def bernoulli(root: int, start: int, stop: int, probability: float) -> np.ndarray:
    """Draws `start:stop` of independent coins that are True with `probability` (exact to 2^-60): bool.

    A byte decides all coins but one in 256; those are decided by numbers drawn before the bytes of their tile.
    """
    level = int(probability * 256)
    rest = probability * 256 - level  # exact: a power of two only moves the point
    parts = []
    for tile in range(start // TILE, -(-stop // TILE)):
        low = tile * TILE
        count = min(stop - low, TILE)
        source = _source(root, tile)
        finer = source.random(_EDGES)
        drawn = source.integers(0, 1 << 64, size=-(-count // 8), dtype=np.uint64).view(np.uint8)[:count]
        coins = drawn < level
        edge = np.flatnonzero(drawn == level)
        coins[edge[finer[: edge.size] < rest]] = True
        parts.append(coins[max(start - low, 0) :])
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, bool)])


def _source(root: int, tile: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([root, tile])))
