"""The arithmetic coder: every message under every model comes back, in hardly more bits than its probability asks for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.arithmetic_coder import TOTAL_BITS, Decoder, Encoder, decode, encode, frequencies
from spolia.core.seeds import generator
from spolia.errors import SpoliaError

TOTAL = 1 << TOTAL_BITS


def ideal(symbols: Sequence[int], tables: Sequence[np.ndarray]) -> float:
    """-log2 of the message's probability under the tables."""
    return -sum(math.log2(table[symbol] / TOTAL) for symbol, table in zip(symbols, tables, strict=True))


def model(seed: int, size: int, sharpness: float):
    """A table for each prefix, drawn by the whole prefix; sharp ones give some symbol almost all, others almost nothing."""

    def table(before: Sequence[int]) -> np.ndarray:
        scores = sharpness * generator(seed, *before[-3:]).standard_normal(size)
        p = np.exp(scores - scores.max())
        return frequencies(p / p.sum())

    return table


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=24), st.integers(0, 9), st.sampled_from([0.0, 1.0, 30.0, 300.0]))
def test_every_byte_string_comes_back(data: bytes, seed: int, sharpness: float) -> None:
    table = model(seed, 256, sharpness)
    bits = encode(data, table)
    assert set(bits) <= {0, 1}
    assert bytes(decode(bits, table, len(data))) == data
    assert bytes(decode([*bits, 0, 0, 0], table, len(data))) == data  # padding changes nothing
    tables = [table(data[:i]) for i in range(len(data))]
    # one bit to end with; rounding costs 2^-22 / f at a symbol, at most 2^-22 here even for f = 1
    assert len(bits) <= ideal(data, tables) + 1 + 1e-5 * len(data)


def test_long_messages_stay_within_two_bits() -> None:
    """Against the probabilities themselves, not their tables, where no probability is near 0: 2^-24 256 / p is lost."""
    p = generator(0).dirichlet(np.full(256, 2.0))
    symbols = generator(1).choice(256, 4000, p=p)
    table = frequencies(p)
    bits = encode(symbols.tolist(), lambda before: table)
    lossless = -float(np.log2(p[symbols]).sum())
    assert lossless - 1 <= len(bits) <= lossless + 2
    assert decode(bits, lambda before: table, 4000) == symbols.tolist()


@pytest.mark.parametrize("side", [0, 1])
def test_runs_about_the_middle(side: int) -> None:
    """Tables that keep the interval astride one half: bits stay pending for hundreds of symbols."""
    table = np.array([(TOTAL >> 1) - 1, 2, (TOTAL >> 1) - 1])
    symbols = [1] * 300 + [2 * side]
    bits = encode(symbols, lambda before: table)
    assert decode(bits, lambda before: table, 301) == symbols
    assert len(bits) <= ideal(symbols, [table] * 301) + 2


@pytest.mark.parametrize("size", [1, 2, 3, 1000, 50_257])
def test_tables_add_up(size: int) -> None:
    rng = generator(2, size)
    for p in (np.full(size, 1 / size), rng.dirichlet(np.full(size, 0.01)) + 0.0, np.arange(size) == size // 2):
        found = frequencies(p)
        assert found.dtype == np.int64
        assert found.sum() == TOTAL
        assert found.min() >= 1
        assert np.abs(found / TOTAL - p).max() <= (size + 1) / TOTAL  # one each is taken off the top and given to all


def test_tables_in_batches_and_from_torch() -> None:
    p = generator(3).dirichlet(np.ones(7), (2, 3))
    found = frequencies(p)
    assert found.shape == (2, 3, 7)
    np.testing.assert_array_equal(found[1, 2], frequencies(p[1, 2]))
    np.testing.assert_array_equal(frequencies(torch.from_numpy(p)), found)
    np.testing.assert_array_equal(frequencies(3 * p), found)  # scale does not matter


def test_certain_symbols_cost_next_to_nothing() -> None:
    table = frequencies([1.0, 0.0])
    bits = encode([0] * 2000, lambda before: table)
    assert len(bits) <= 2  # 2000 times 2^-24 of a nat
    assert decode(bits, lambda before: table, 2000) == [0] * 2000
    assert encode([], lambda before: table) == []
    rare = encode([1], lambda before: table)
    assert len(rare) <= TOTAL_BITS + 1
    assert decode(rare, lambda before: table, 1) == [1]


def test_messages_fill_the_interval() -> None:
    """Every message of length 4 over an uneven alphabet: its bits read as a binary fraction lie in its own interval."""
    table = np.array([TOTAL // 2 + 12_345, TOTAL // 4, TOTAL // 4 - 12_345])
    edges = [0, *np.cumsum(table).tolist()]
    for number in range(3**4):
        symbols = [number // 3**i % 3 for i in range(4)]
        low, width = Fraction(0), Fraction(1)
        for symbol in symbols:
            low, width = low + width * Fraction(edges[symbol], TOTAL), width * Fraction(int(table[symbol]), TOTAL)
        bits = encode(symbols, lambda before: table)
        value = sum((Fraction(bit, 2 ** (i + 1)) for i, bit in enumerate(bits)), Fraction(0))
        rounding = Fraction(4, 1 << 44)
        assert low - rounding <= value < low + width + rounding


def test_another_model_gives_another_message_and_no_error() -> None:
    data = b"the same text under two models"
    bits = encode(data, model(0, 256, 2.0))
    assert bytes(decode(bits, model(1, 256, 2.0), len(data))) != data
    noise = generator(4).integers(0, 2, 400).tolist()
    assert len(decode(noise, model(0, 256, 2.0), 50)) == 50


def test_step_by_step_is_the_same() -> None:
    table = frequencies([0.5, 0.3, 0.2])
    coder, symbols = Encoder(), [2, 0, 1, 1, 0]
    for symbol in symbols:
        coder.push(symbol, table)
    assert coder.finish() == coder.finish() == encode(symbols, lambda before: table)
    heard = Decoder(coder.finish())
    assert [heard.pull(table) for _ in symbols] == symbols


def test_mistakes_are_told() -> None:
    with pytest.raises(SpoliaError, match="not a distribution"):
        frequencies([0.5, float("nan")])
    with pytest.raises(SpoliaError, match="not a distribution"):
        frequencies([0.0, 0.0])
    with pytest.raises(SpoliaError, match="symbol 3, of 3"):
        Encoder().push(3, frequencies([0.5, 0.3, 0.2]))
