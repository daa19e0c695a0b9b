"""Arithmetic coding with whole numbers: symbols to bits and back, bit for bit, whatever model gives the probabilities.

For transmitters that hold a model: about -log2 P bits for a message of probability P. Witten, Neal and Cleary, Arithmetic
coding for data compression, 1987, with a state of 48 bits. Both ends turn probabilities into the same table

    f_v = 1 + floor(p_v (2^24 - V)),   the rest to the most likely,   sum f = 2^24

so no symbol is impossible, and the length is at most -sum log2(f / 2^24) + 1, and 2^-22 / f a symbol for rounding. Only
equal tables decode: a model that differs in one bit anywhere gives other text without a word. Guard messages by a check.

The decoder must be told how many bits, or how many symbols, there are; past the end it reads zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spolia.core.lazy import np
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

TOTAL_BITS = 24
_WIDTH = 48
_HALF, _QUARTER = 1 << (_WIDTH - 1), 1 << (_WIDTH - 2)
_ALL = (1 << _WIDTH) - 1


def frequencies(probabilities: np.ndarray | Tensor) -> np.ndarray:
    """Probabilities [..., V], finite and not negative, to whole numbers >= 1 that add up to 2^24: int64 [..., V]."""
    p = np.asarray(probabilities, dtype=np.float64)
    total, count = 1 << TOTAL_BITS, p.shape[-1]
    if not 0 < count <= total >> 1:
        raise SpoliaError(f"{count} symbols", where="frequencies", mend=f"between 1 and {total >> 1}")
    mass = p.sum(-1, keepdims=True)
    if not (np.isfinite(mass).all() and (p >= 0).all() and (mass > 0).all()):
        raise SpoliaError(
            "not a distribution", where="frequencies", mend="finite, not negative, with something above 0"
        )
    found = 1 + np.floor(np.minimum(p / mass, 1.0) * (total - count)).astype(np.int64)
    rest = total - found.sum(-1, keepdims=True)  # may be below 0 by a rounding: the most likely carries it
    top = p.argmax(-1)[..., None]
    np.put_along_axis(found, top, np.take_along_axis(found, top, -1) + rest, -1)
    return found


class Encoder:
    """Symbols in, one by one; the bits come out at the end."""

    def __init__(self) -> None:
        self._low, self._high, self._pending = 0, _ALL, 0
        self._bits: list[int] = []

    def push(self, symbol: int, frequencies: np.ndarray) -> None:
        """Code `symbol` under the table [V] of `frequencies`."""
        if not 0 <= symbol < len(frequencies):
            what = f"symbol {symbol}, of {len(frequencies)}"
            raise SpoliaError(what, where="arithmetic coder", mend="symbols are counted from 0")
        below = int(frequencies[:symbol].sum())
        self._low, self._high = _narrowed(self._low, self._high, below, below + int(frequencies[symbol]))
        while True:
            if self._high < _HALF:
                self._emit(0)
            elif self._low >= _HALF:
                self._emit(1)
                self._low, self._high = self._low - _HALF, self._high - _HALF
            elif self._low >= _QUARTER and self._high < _HALF + _QUARTER:
                self._pending += 1
                self._low, self._high = self._low - _QUARTER, self._high - _QUARTER
            else:
                return
            self._low, self._high = 2 * self._low, 2 * self._high + 1

    def finish(self) -> list[int]:
        """All bits. Zeros may follow: the middle of the interval always lies in it, and a single 1 says so."""
        if self._low or self._pending:
            return [*self._bits, 1]
        return list(self._bits)

    def _emit(self, bit: int) -> None:
        self._bits += [bit, *[1 - bit] * self._pending]
        self._pending = 0


class Decoder:
    """Bits in, symbols out one by one, under the tables the encoder had."""

    def __init__(self, bits: Sequence[int]):
        self._bits = iter([int(bit) for bit in bits])
        self._low, self._high, self._value = 0, _ALL, 0
        for _ in range(_WIDTH):
            self._value = 2 * self._value + next(self._bits, 0)

    def pull(self, frequencies: np.ndarray) -> int:
        """The next symbol. Bits that no encoder wrote give some symbol too."""
        width = self._high - self._low + 1
        place = (((self._value - self._low + 1) << TOTAL_BITS) - 1) // width
        edges = np.cumsum(frequencies)
        symbol = int(np.searchsorted(edges, place, side="right"))
        below = int(edges[symbol]) - int(frequencies[symbol])
        self._low, self._high = _narrowed(self._low, self._high, below, int(edges[symbol]))
        while True:
            if self._low >= _HALF:
                off = _HALF
            elif self._high < _HALF:
                off = 0
            elif self._low >= _QUARTER and self._high < _HALF + _QUARTER:
                off = _QUARTER
            else:
                return symbol
            self._low, self._high = 2 * (self._low - off), 2 * (self._high - off) + 1
            self._value = 2 * (self._value - off) + next(self._bits, 0)


def encode(symbols: Sequence[int], table: Callable[[Sequence[int]], np.ndarray]) -> list[int]:
    """The bits of a message; `table(symbols so far)` gives the frequencies [V] of the next."""
    coder = Encoder()
    for i, symbol in enumerate(symbols):
        coder.push(int(symbol), table(symbols[:i]))
    return coder.finish()


def decode(bits: Sequence[int], table: Callable[[Sequence[int]], np.ndarray], count: int) -> list[int]:
    """`count` symbols from the bits, by the encoder's tables."""
    coder, found = Decoder(bits), []
    for _ in range(count):
        found.append(coder.pull(table(found)))
    return found


def _narrowed(low: int, high: int, below: int, above: int) -> tuple[int, int]:
    """The part of low … high that belongs to the frequencies below … above, of 2^24."""
    width = high - low + 1
    return low + (width * below >> TOTAL_BITS), low + (width * above >> TOTAL_BITS) - 1
