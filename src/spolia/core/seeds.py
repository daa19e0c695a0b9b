"""Randomness by name: the same seed and names give the same numbers, whatever the order, the threads or the chunks."""

from __future__ import annotations

import hashlib

from spolia.core.lazy import np

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
        source = np.random.Generator(np.random.SFC64(np.random.SeedSequence([root, tile])))
        drawn = source.integers(0, 1 << 64, size=-(-count // 4), dtype=np.uint64).view(np.uint16)
        parts.append(drawn[max(start - low, 0) : count])
    return parts[0] if len(parts) == 1 else np.concatenate(parts or [np.empty(0, np.uint16)])


def bernoulli(root: int, start: int, stop: int, probability: float) -> np.ndarray:
    """Draws `start:stop` of independent coins that are True with `probability` (exact to 2^-48): bool."""
    level = int(probability * 65536)
    words = words16(root, start, stop)
    kept = words < level
    edge = np.flatnonzero(words == level)  # one word in 65536 needs more bits to decide
    if edge.size:
        finer = [entropy(root, "edge", start + int(i)) / 2.0**128 for i in edge]
        kept[edge] = np.asarray(finer) < probability * 65536 - level
    return kept
