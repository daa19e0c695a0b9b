"""Viterbi: the best of all codewords, free distances of the tables, tails, ties and erasures."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spolia.core.modulation import constellation, hard, modulate, to_bits
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.core.viterbi import Convolutional
from spolia.errors import SpoliaError
from spolia.parts.channel import Channel

CODES = [Convolutional((0o5, 0o7)), Convolutional((0o133, 0o171)), Convolutional((0o13, 0o15, 0o17))]


def random_bits(*shape: int) -> torch.Tensor:
    return torch.from_numpy(generator(0, *shape).integers(0, 2, shape).astype(np.uint8))


def test_the_encoder_is_a_shift_register() -> None:
    """(5, 7), message 1 0 1 1 and two zeros: register contents written down by hand."""
    found = Convolutional((0o5, 0o7)).encode(torch.tensor([1, 0, 1, 1], dtype=torch.uint8))
    assert found.tolist() == [1, 1, 0, 1, 0, 0, 1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_is_the_best_of_all_codewords(code: Convolutional, dtype: torch.dtype) -> None:
    k = 8
    messages = to_bits(torch.arange(2**k), k)
    codewords = code.encode(messages)
    assert codewords.shape == (2**k, code.length(k))
    llrs = torch.from_numpy(generator(1).standard_normal((40, codewords.shape[1]))).to(dtype)
    scores = llrs @ (1 - 2 * codewords.to(dtype)).T
    assert torch.equal(code.decode(llrs), messages[scores.argmax(1)])


@pytest.mark.parametrize(
    ("generators", "distance"),
    [((0o5, 0o7), 5), ((0o15, 0o17), 6), ((0o23, 0o35), 7), ((0o133, 0o171), 10), ((0o133, 0o145, 0o175), 15)],
)
def test_free_distances_of_the_tables(generators: tuple[int, ...], distance: int) -> None:
    """Proakis, Digital Communications, tables 8-2-1 and 8-2-2."""
    assert Convolutional(generators).free_distance == distance


@pytest.mark.parametrize("code", CODES)
def test_free_distance_is_the_lightest_codeword(code: Convolutional) -> None:
    lightest = code.encode(to_bits(torch.arange(1, 2**10), 10)).sum(-1).min()
    assert int(lightest) == code.free_distance


def test_half_the_free_distance_is_mended() -> None:
    """Any 4 wrong bits: less than half of 10."""
    code, bits = Convolutional(), random_bits(3, 2, 30)
    llrs = 1 - 2.0 * code.encode(bits)
    for draw in range(20):
        places = torch.from_numpy(generator(2, draw).permutation(llrs.shape[-1])[:4])
        wrong = llrs.clone()
        wrong[..., places] *= -1
        assert torch.equal(code.decode(wrong), bits)
    erased = llrs.clone()
    erased[..., 10:19] = 0.0  # 9 erasures, fewer than 10
    assert torch.equal(code.decode(erased), bits)


def test_it_gains_on_uncoded_bits_of_equal_energy() -> None:
    """At 4 dB a bit: the union bound of (133, 171) has 2e-5, uncoded 1.25e-2; ten-fold is asked for."""
    code, c, bits = Convolutional(), constellation("bpsk"), random_bits(40, 200)
    coded = Channel().transmit(modulate(code.encode(bits), c), n0_of(4.0) * 2, generator(3)).llrs(c)
    plain = Channel().transmit(modulate(bits, c), n0_of(4.0), generator(4)).llrs(c)
    wrong = (code.decode(coded) != bits).float().mean()
    assert wrong < (hard(plain) != bits).float().mean() / 10


def test_shapes_and_mistakes() -> None:
    code = Convolutional((0o5, 0o7))
    assert code.decode(torch.zeros(2, 3, 4)).shape == (2, 3, 0)
    assert code.decode(torch.zeros(3, 14)).tolist() == [[0] * 5] * 3
    with pytest.raises(SpoliaError, match="no codeword"):
        code.decode(torch.zeros(7))
    for generators in ((0o7,), (1, 1), (0, 7)):
        with pytest.raises(SpoliaError, match="generators"):
            Convolutional(generators)
