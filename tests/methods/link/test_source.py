"""Source codes: round trips, optimal lengths, what wrong bits do."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.link.source import (
    FIVE,
    SIX,
    FixedText,
    Huffman,
    HuffmanText,
    Source,
    Utf8,
    huffman_lengths,
    source_code,
)

TEXTS = ["The stones of an old wall hold up a new one.", "A mason does not ask who carved the column: he uses it."]


@settings(max_examples=40, deadline=None)
@given(st.text(max_size=30))
def test_every_text_comes_back(text: str) -> None:
    for code in (Utf8(), HuffmanText(TEXTS)):
        bits = code.encode(text)
        assert set(bits) <= {0, 1}
        assert code.decode(bits) == text


@pytest.mark.parametrize(("alphabet", "width"), [(FIVE, 5), (SIX, 6)])
def test_fixed_alphabets(alphabet: str, width: int) -> None:
    code = FixedText(alphabet)
    assert len(set(alphabet)) == 2**width
    assert code.width == width
    assert code.fits(alphabet)
    assert code.decode(code.encode(alphabet)) == alphabet
    assert len(code.encode(TEXTS[0])) == width * len(TEXTS[0])
    assert code.decode(code.encode(TEXTS[0])).lower() == TEXTS[0].lower()
    assert code.decode(code.encode("A€b")).lower() == "a b"
    assert not code.fits("€")


def test_bits_by_hand() -> None:
    assert Utf8().encode("A") == [0, 1, 0, 0, 0, 0, 0, 1]
    assert FixedText(FIVE).encode("c") == [0, 0, 0, 1, 0]
    assert FixedText(SIX).encode("!") == [0, 0, 0, 0, 0, 1]
    # counts 4 2 1 1: lengths 1 2 3 3, codewords 0 10 110 111
    assert Huffman([4, 2, 1, 1]).codewords == {0: "0", 1: "10", 2: "110", 3: "111"}


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40).filter(any))
def test_huffman_is_a_full_prefix_code_near_the_entropy(counts: list[int]) -> None:
    lengths, total = huffman_lengths(counts), sum(counts)
    used = [(count, size) for count, size in zip(counts, lengths, strict=True) if count]
    assert all(size > 0 for _, size in used)
    assert all(size == 0 for count, size in zip(counts, lengths, strict=True) if not count)
    kraft = sum(Fraction(1, 2**size) for _, size in used)
    assert kraft == (Fraction(1, 2) if len(used) == 1 else 1)
    entropy = -sum(count / total * math.log2(count / total) for count, _ in used)
    mean = sum(count * size for count, size in used) / total
    assert entropy - 1e-9 <= mean <= entropy + 1
    words = Huffman(counts).codewords.values()
    assert not any(a != b and b.startswith(a) for a in words for b in words)


def test_no_prefix_code_is_shorter() -> None:
    """All lengths of up to five symbols that satisfy Kraft's inequality."""
    from itertools import product

    for counts in ([5, 3, 2, 1], [1, 1, 1, 1, 1], [10, 1, 1, 1, 1], [8, 4, 2, 1, 1]):
        n = len(counts)
        fair = [s for s in product(range(1, n), repeat=n) if sum(Fraction(1, 2**x) for x in s) <= 1]
        best = min(sum(c * x for c, x in zip(counts, s, strict=True)) for s in fair)
        assert sum(c * x for c, x in zip(counts, huffman_lengths(counts), strict=True)) == best


def test_huffman_of_tokens() -> None:
    rng = generator(0)
    tokens = rng.choice(50, 300, p=rng.dirichlet([0.3] * 50)).tolist()
    counts = Counter(tokens)
    code = Huffman([counts[token] + 1 for token in range(50)])
    assert code.decode(code.encode(tokens)) == tokens
    assert code.decode(code.encode(range(50))) == list(range(50))
    with pytest.raises(SpoliaError, match="no codeword"):
        Huffman([1, 0, 2]).encode([1])


def test_wrong_bits_never_stop_a_decoder() -> None:
    codes = [source_code(Source(kind=kind), TEXTS) for kind in ("utf8", "five_bit", "six_bit", "huffman")]
    for draw, code in enumerate(codes):
        for length in range(0, 200, 7):
            assert isinstance(code.decode(generator(draw, length).integers(0, 2, length).tolist()), str)


def test_a_wrong_bit_costs_a_character_where_lengths_are_fixed() -> None:
    code, text = FixedText(SIX), TEXTS[0].upper()
    for place in range(0, 6 * len(text), 11):
        bits = code.encode(text)
        bits[place] ^= 1
        assert sum(a != b for a, b in zip(code.decode(bits), text, strict=True)) == 1


def test_bits_left_over_are_dropped() -> None:
    assert Utf8().decode([*Utf8().encode("ab"), 0, 1, 1]) == "ab"
    assert FixedText(FIVE).decode([*FixedText(FIVE).encode("ab"), 1]) == "ab"
    code = HuffmanText(TEXTS)
    escaped = code.encode("€")
    assert code.decode([*code.encode("on"), *escaped[:-1]]) == "on"


def test_mistakes_are_told() -> None:
    with pytest.raises(SpoliaError, match="no texts"):
        source_code(Source(kind="huffman"))
    with pytest.raises(SpoliaError, match="nothing was counted"):
        huffman_lengths([0, 0])
