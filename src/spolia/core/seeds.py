"""Randomness by name: the same seed and names give the same numbers, whatever the order, the threads or the chunks."""

from __future__ import annotations

import hashlib

from spolia.core.lazy import np

TILE = 1 << 17  # words drawn from one generator; a block of the streaming engine is one tile
COINS = 2 * TILE  # coins drawn from one generator: making it costs as much as ten thousand of them
_EDGES = 4096  # numbers for the coins of a tile that their byte leaves open: 1024 on average, deviation 32


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
    for tile in range(start // COINS, -(-stop // COINS)):
        low = tile * COINS
        count = min(stop - low, COINS)
        source = _source(root, tile)
        finer = source.random(_EDGES)
        drawn = source.bit_generator.random_raw(-(-count // 8)).view(np.uint8)
        coins, open_ = drawn < level, (drawn == level).view(np.uint64)
        eight = np.flatnonzero(open_ != 0)  # words with such a byte: an eighth of the places to look at
        there = np.flatnonzero(open_[eight].view(np.uint8))
        edge = 8 * eight[there >> 3] + (there & 7)
        coins[edge[finer[: edge.size] < rest]] = True
        coins = coins[:count]
        parts.append(coins[max(start - low, 0) :])
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, bool)])


def _source(root: int, tile: int) -> np.random.Generator:
    return np.random.Generator(np.random.SFC64(np.random.SeedSequence([root, tile])))
