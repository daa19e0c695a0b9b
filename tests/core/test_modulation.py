"""Symbols: energy, Gray neighbours, exact ratios against brute force, error rates against closed forms.

Simulated rates must lie within 5 standard deviations of a binomial: one honest count in 1.7 million misses that, and the
draws are fixed, so a pass stays a pass.
"""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch

from spolia.core import modulation as m
from spolia.core.seeds import generator
from spolia.core.snr import CONVENTIONS, Rates, explain, from_esn0, n0_of, to_esn0
from spolia.errors import SpoliaError
from spolia.parts.channel import Channel

pytestmark = pytest.mark.sampled(3)  # of many cases alike

NAMES = tuple(m.BITS)
COUNT = 120_000  # bits of a simulated rate


def q(x: float) -> float:
    return math.erfc(x / math.sqrt(2)) / 2


def drawn(count: int, *names: object) -> torch.Tensor:
    return torch.from_numpy(generator(0, *names).integers(0, 2, count).astype(np.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_energy_is_one_and_labels_come_back(name: str) -> None:
    c = m.constellation(name, torch.complex128)
    assert len(c.points) == 2**c.bits
    assert float(c.points.abs().square().mean()) == pytest.approx(1, abs=1e-12)
    bits = m.to_bits(torch.arange(2**c.bits), c.bits)
    torch.testing.assert_close(m.modulate(bits, c).squeeze(-1), c.points, rtol=0, atol=0)
    assert torch.equal(m.from_bits(bits), torch.arange(2**c.bits))
    assert torch.equal(m.hard(m.llrs(c.points, 1e-4, c)).view(-1, c.bits), bits)


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_differ_in_one_bit(name: str) -> None:
    c = m.constellation(name, torch.complex128)
    apart = (c.points[:, None] - c.points).abs()
    least = apart[apart > 1e-9].min()
    for i, j in ((apart - least).abs() < 1e-9).nonzero().tolist():
        assert (i ^ j).bit_count() == 1


def test_the_map_is_that_of_38211() -> None:
    """Section 5.1.4 of TS 38.211 written out: 1/sqrt(10) ((1-2b0)(2-(1-2b2)) + j (1-2b1)(2-(1-2b3)))."""
    c = m.constellation("16qam", torch.complex128)
    for b0, b1, b2, b3 in itertools.product((0, 1), repeat=4):
        real, imaginary = (1 - 2 * b0) * (2 - (1 - 2 * b2)), (1 - 2 * b1) * (2 - (1 - 2 * b3))
        found = complex(c.points[8 * b0 + 4 * b1 + 2 * b2 + b3])
        assert found == pytest.approx(complex(real, imaginary) / math.sqrt(10), abs=1e-12)


def test_a_last_symbol_is_filled_with_zeros() -> None:
    c = m.constellation("16qam")
    assert torch.equal(m.modulate(torch.tensor([1, 0, 1], dtype=torch.uint8), c), c.points[[0b1010]])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("exact", [True, False])
def test_ratios_are_those_of_all_points(name: str, exact: bool) -> None:
    """logsumexp, or max, over points of -|y - h s|^2 / n0, gains that are 0 included."""
    c = m.constellation(name, torch.complex128)
    y, gain = torch.from_numpy(generator(1, name).standard_normal((2, 3, 20)) * (1 + 0.5j))
    gain[0, 0] = 0
    n0 = torch.tensor([[0.1], [0.7], [3.0]], dtype=torch.float64)
    scores = m.log_likelihoods(y, n0, c, gain)
    bits = m.to_bits(torch.arange(2**c.bits), c.bits).bool()
    reduce = (lambda x: x.logsumexp(-1)) if exact else (lambda x: x.amax(-1))
    expected = torch.stack([reduce(scores[..., ~own]) - reduce(scores[..., own]) for own in bits.T], -1).flatten(-2)
    found = m.llrs(y, n0, c, gain, exact)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)  # fp64, scores of order 100
    assert not found[0, : c.bits].any()


def test_short_forms() -> None:
    y = torch.from_numpy(generator(2).standard_normal((50, 2))).view(-1, 2)
    y = torch.complex(y[:, 0], y[:, 1])
    gain = torch.tensor(0.3 - 1.2j, dtype=torch.complex128)
    bpsk, qpsk = (m.constellation(name, torch.complex128) for name in ("bpsk", "qpsk"))
    matched = gain.conj() * y
    torch.testing.assert_close(m.llrs(y, 0.5, bpsk, gain), 4 * matched.real / 0.5)
    both = torch.stack([matched.real, matched.imag], -1).flatten() * 2 * math.sqrt(2) / 0.5
    torch.testing.assert_close(m.llrs(y, 0.5, qpsk, gain), both)


@pytest.mark.parametrize("name", ["16qam", "64qam", "256qam"])
def test_max_log_is_the_limit_of_little_noise(name: str) -> None:
    """They differ by at most ln(points of a side) of an axis, and n0 L by n0 times that."""
    c = m.constellation(name, torch.complex128)
    y = torch.from_numpy(generator(3, name).standard_normal(200) * (0.5 + 0.5j))
    for n0 in (1.0, 0.1, 1e-3):
        apart = (m.llrs(y, n0, c) - m.llrs(y, n0, c, exact=False)).abs().max()
        assert apart <= math.log(2 ** (c.bits // 2 - 1)) + 1e-9


@pytest.mark.parametrize("n0", [1e-12, 1e12])
def test_extremes_are_finite(n0: float) -> None:
    for name in NAMES:
        c = m.constellation(name)
        assert m.llrs(c.points, n0, c).isfinite().all()


def test_shapes_types_and_noise_levels() -> None:
    c = m.constellation("16qam")
    y = c.points[torch.from_numpy(generator(4).integers(0, 16, (5, 7)))] + 0.1
    levels = torch.tensor([0.1, 1.0]).view(2, 1, 1)
    found = m.llrs(y, levels, c)
    assert found.shape == (2, 5, 28)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[1, 3], m.llrs(y[3], 1.0, c))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("fading", ["none", "rayleigh"])
def test_error_rates_are_the_closed_forms(name: str, fading: str) -> None:
    c = m.constellation(name)
    for esn0_db in (2.0, 10.0, 18.0):
        bits = drawn(COUNT // c.bits * c.bits, name, fading, esn0_db)
        channel = Channel(fading=fading)  # type: ignore[arg-type]
        received = channel.transmit(m.modulate(bits, c), n0_of(esn0_db), generator(0, "noise", name, fading, esn0_db))
        wrong = m.hard(received.llrs(c, exact=False)) != bits
        rate = m.bit_error_rate(name, 10 ** (esn0_db / 10), fading)
        # the bits of a symbol depend on each other: at worst its errors come all at once
        spread = math.sqrt(rate * c.bits / wrong.numel())
        assert abs(float(wrong.float().mean()) - rate) <= 5 * spread + 2 / wrong.numel()


def test_published_forms() -> None:
    for esn0 in (0.5, 3.0, 12.0):
        assert m.bit_error_rate("bpsk", esn0) == pytest.approx(q(math.sqrt(2 * esn0)), rel=1e-12)
        assert m.bit_error_rate("qpsk", 2 * esn0) == pytest.approx(q(math.sqrt(2 * esn0)), rel=1e-12)
        a = math.sqrt(4 * (esn0 / 4) / 5)  # Eb/N0 = Es/N0 / 4
        expected = (3 * q(a) + 2 * q(3 * a) - q(5 * a)) / 4
        assert m.bit_error_rate("16qam", esn0) == pytest.approx(expected, rel=1e-9)
        faded = (1 - math.sqrt(esn0 / (1 + esn0))) / 2
        assert m.bit_error_rate("bpsk", esn0, "rayleigh") == pytest.approx(faded, rel=1e-12)
    assert m.bit_error_rate("bpsk", 10**0.679) == pytest.approx(1e-3, rel=2e-3)  # 6.79 dB, to its last digit
    for db, rate in ((6, 0.0530), (10, 0.0233), (14, 0.0097)):
        assert m.bit_error_rate("bpsk", 10 ** (db / 10), "rayleigh") == pytest.approx(rate, abs=5e-5)


@pytest.mark.parametrize("fading", ["none", "rayleigh"])
@pytest.mark.parametrize("name", NAMES)
def test_without_signal_half_the_bits_are_wrong(name: str, fading: str) -> None:
    assert m.bit_error_rate(name, 0.0, fading) == pytest.approx(0.5, abs=1e-12)


def test_moments_of_the_ratio() -> None:
    """BPSK, bit 0: mean 4 Es/N0, variance 8 Es/N0. The variance of n squares has relative deviation sqrt(2 / n)."""
    c, esn0 = m.constellation("bpsk"), 10**0.3
    zeros = torch.zeros(COUNT, dtype=torch.uint8)
    found = Channel().transmit(m.modulate(zeros, c), 1 / esn0, generator(5)).llrs(c).double()
    assert abs(float(found.mean()) - 4 * esn0) <= 5 * math.sqrt(8 * esn0 / COUNT)
    assert abs(float(found.var()) / (8 * esn0) - 1) <= 5 * math.sqrt(2 / COUNT)


def test_conventions_come_back() -> None:
    rates = Rates(bits_per_symbol=4, code_rate=0.5, entropy_per_bit=0.3, symbols_per_char=2.5)
    for convention in CONVENTIONS:
        assert to_esn0(from_esn0(3.7, convention, rates), convention, rates) == pytest.approx(3.7, abs=1e-12)
    assert explain(3.7, rates).keys() == set(CONVENTIONS)


def test_conventions_by_hand() -> None:
    rates = Rates(bits_per_symbol=4, code_rate=0.5, entropy_per_bit=0.25, symbols_per_char=8)
    known = {"esn0": 10, "ebn0_coded": 10 / 4, "ebn0": 10 / 2, "ebn0_info": 10 / 0.5, "energy_per_char": 80}
    known |= {"real_noise": 20, "deepsc": 5}
    for convention, ratio in known.items():
        assert from_esn0(10.0, convention, rates) == pytest.approx(10 * math.log10(ratio), abs=1e-12)
    assert n0_of(10.0) == pytest.approx(0.1)
    # sionna: no = 1 / (ebno * coderate * bits per symbol)
    assert n0_of(to_esn0(5.0, "ebn0", rates)) == pytest.approx(1 / (10**0.5 * 0.5 * 4))
    # DeepSC: each real dimension has power 1 and noise of deviation 1 / sqrt(2 SNR)
    label = 10**0.6
    assert 10 ** (to_esn0(6.0, "deepsc") / 10) == pytest.approx((1 + 1) / (2 * (1 / math.sqrt(2 * label)) ** 2))
    # 1 / sigma^2 on a real symbol of energy 1: N0 = 2 sigma^2
    assert 10 ** (to_esn0(6.0, "real_noise") / 10) == pytest.approx(1 / (2 * (1 / label)))


def test_mistakes_are_told() -> None:
    with pytest.raises(SpoliaError, match="did you mean `16qam`"):
        m.constellation("16-qam")
    with pytest.raises(SpoliaError, match="did you mean `ebn0`"):
        to_esn0(1.0, "EbN0")
    with pytest.raises(SpoliaError, match="positive"):
        m.llrs(torch.zeros(2, dtype=torch.complex64), 0.0, m.constellation("qpsk"))
    with pytest.raises(SpoliaError, match="code_rate is 0"):
        Rates(code_rate=0)
    with pytest.raises(SpoliaError, match="no closed form"):
        m.bit_error_rate("bpsk", 1.0, "rician")
