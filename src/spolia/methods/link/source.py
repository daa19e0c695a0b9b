"""Source codes without a language model: text to bits and back, the first half of the classical link.

For comparison with LLM-SC at equal channel uses: what comes out goes through a channel code (parts/codes).

| kind | bits | holds |
|---|---|---|
| `utf8` | 8, 16, 24 or 32 a character | every text |
| `five_bit` | 5 a character | a-z, space, line end and . , ' - ; letters lose their case, others become spaces |
| `six_bit` | 6 a character | the 64 characters of ASCII from space to _ (DEC SIXBIT); as above |
| `huffman` | whole, by the frequency of characters in given texts | every text; rare characters behind an escape |

Huffman, A method for the construction of minimum-redundancy codes, 1952, doi:10.1109/JRPROC.1952.273898, in canonical form:
lengths alone fix the code. Its mean length on what it was made from lies in [H, H + 1), H the entropy in bits.

Decoders never fail: bits left over at the end are dropped, what is no character becomes U+FFFD. A wrong bit costs one
character in the codes of fixed length; in Huffman's the boundaries move, until they happen to fall in again.

Data touched: `huffman` counts characters (or tokens) of the texts given to it. No departures: these are textbook codes. The
alphabet of `five_bit` is ours.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

from spolia.core.settings import Settings, setting
from spolia.errors import SpoliaError

FIVE = "abcdefghijklmnopqrstuvwxyz \n.,'-"
SIX = "".join(map(chr, range(32, 96)))
_ESCAPED = 21  # bits of a code point


class Source(Settings):
    """Settings of `source`."""

    kind: Literal["utf8", "five_bit", "six_bit", "huffman"] = setting(
        "utf8", "the code of characters", source="the shortest that holds every text without being told of any"
    )


class SourceCode(Protocol):
    """Text and bits."""

    def encode(self, text: str) -> list[int]: ...

    def decode(self, bits: Sequence[int]) -> str: ...


def source_code(settings: Source, texts: Iterable[str] | None = None) -> SourceCode:
    """The code of that kind; `huffman` is made from `texts`."""
    if settings.kind == "huffman":
        if texts is None:
            raise SpoliaError("huffman has no texts to count", where="source.kind", mend="source_code(settings, texts)")
        return HuffmanText(texts)
    if settings.kind == "utf8":
        return Utf8()
    return FixedText(FIVE if settings.kind == "five_bit" else SIX)


class Utf8:
    """The bits of UTF-8, the highest of a byte first."""

    def encode(self, text: str) -> list[int]:
        return [bit for byte in text.encode("utf-8") for bit in _written(byte, 8)]

    def decode(self, bits: Sequence[int]) -> str:
        values = [_read(bits[i : i + 8]) for i in range(0, len(bits) - 7, 8)]
        return bytes(values).decode("utf-8", errors="replace")


class FixedText:
    """Every character of an alphabet as its place, in as few bits as hold all. Others are folded, or become spaces."""

    def __init__(self, alphabet: str):
        self.alphabet, self.width = alphabet, max((len(alphabet) - 1).bit_length(), 1)
        self._place = {character: i for i, character in enumerate(alphabet)}
        self._other = self._place.get(" ", 0)

    def encode(self, text: str) -> list[int]:
        return [bit for character in text for bit in _written(self._find(character), self.width)]

    def decode(self, bits: Sequence[int]) -> str:
        places = [_read(bits[i : i + self.width]) for i in range(0, len(bits) - self.width + 1, self.width)]
        return "".join(self.alphabet[p] if p < len(self.alphabet) else "\ufffd" for p in places)

    def fits(self, text: str) -> bool:
        """Whether every character has a place of its own."""
        return all(character in self._place for character in text)

    def _find(self, character: str) -> int:
        for same in (character, character.lower(), character.upper()):
            if same in self._place:
                return self._place[same]
        return self._other


class Huffman:
    """The canonical code of symbols 0 … n-1 from how often each occurs; symbols that never do have no codeword."""

    def __init__(self, counts: Sequence[int | float]):
        self.lengths = huffman_lengths(counts)
        self.codewords: dict[int, str] = {}
        code = length = 0
        for size, symbol in sorted((size, symbol) for symbol, size in enumerate(self.lengths) if size):
            code <<= size - length
            self.codewords[symbol], length = f"{code:0{size}b}", size
            code += 1
        self._symbols = {word: symbol for symbol, word in self.codewords.items()}

    def encode(self, symbols: Iterable[int]) -> list[int]:
        found = []
        for symbol in symbols:
            if symbol not in self.codewords:
                mend = "count it, or add one to all counts"
                raise SpoliaError(f"symbol {symbol} has no codeword", where="huffman", mend=mend)
            found += map(int, self.codewords[symbol])
        return found

    def next(self, bits: Sequence[int], start: int) -> tuple[int | None, int]:
        """The symbol that begins at bit `start`, and where the next begins; None where the bits end, or fit none."""
        word = ""
        for place in range(start, min(start + max(self.lengths), len(bits))):
            word += str(int(bits[place]))
            if word in self._symbols:
                return self._symbols[word], place + 1
        return None, len(bits)

    def decode(self, bits: Sequence[int]) -> list[int]:
        found, place = [], 0
        while place < len(bits):
            symbol, place = self.next(bits, place)
            if symbol is not None:
                found.append(symbol)
        return found


class HuffmanText:
    """Huffman over the characters of texts; one codeword, counted once, announces a character they do not hold."""

    def __init__(self, texts: Iterable[str]):
        counts = Counter(character for text in texts for character in text)
        self.alphabet = sorted(counts)
        self._place = {character: i for i, character in enumerate(self.alphabet)}
        self.code = Huffman([*(counts[character] for character in self.alphabet), 1])

    def encode(self, text: str) -> list[int]:
        found, escape = [], len(self.alphabet)
        for character in text:
            place = self._place.get(character, escape)
            found += self.code.encode([place])
            if place == escape:
                found += _written(ord(character), _ESCAPED)
        return found

    def decode(self, bits: Sequence[int]) -> str:
        found, place = [], 0
        while place < len(bits):
            symbol, place = self.code.next(bits, place)
            if symbol is None:
                break
            if symbol < len(self.alphabet):
                found.append(self.alphabet[symbol])
                continue
            point = _read(bits[place : place + _ESCAPED])
            if place + _ESCAPED > len(bits):
                break
            place += _ESCAPED
            found.append(chr(point) if point < 0x110000 and not 0xD800 <= point < 0xE000 else "\ufffd")
        return "".join(found)


def huffman_lengths(counts: Sequence[int | float]) -> list[int]:
    """Bits of every symbol's codeword, 0 for those that never occur; a symbol alone has 1."""
    used = [(count, symbol) for symbol, count in enumerate(counts) if count > 0]
    if not used:
        raise SpoliaError("nothing was counted", where="huffman", mend="give counts above 0")
    lengths = [0] * len(counts)
    if len(used) == 1:
        lengths[used[0][1]] = 1
        return lengths
    heap = [(count, symbol, [symbol]) for count, symbol in used]  # the second settles ties, always alike
    heapq.heapify(heap)
    while len(heap) > 1:
        (a, tie, left), (b, other, right) = heapq.heappop(heap), heapq.heappop(heap)
        for symbol in (*left, *right):
            lengths[symbol] += 1
        heapq.heappush(heap, (a + b, min(tie, other), left + right))
    return lengths


def _written(value: int, width: int) -> list[int]:
    return [value >> place & 1 for place in range(width - 1, -1, -1)]


def _read(bits: Sequence[int]) -> int:
    value = 0
    for bit in bits:
        value = 2 * value + int(bit)
    return value
