"""Channels: moments, blocks, what the receiver knows, bursts, erasures; equal noise for equal generators.

Sample means lie within 5 standard deviations of what they estimate: a miss in 1.7 million; the draws are fixed.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spolia.core.modulation import bit_error_rate, constellation, hard, modulate
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.errors import SpoliaError
from spolia.parts.channel import Burst, Channel

SHAPE = (100, 400)
COUNT = 40_000


def symbols(name: str = "qpsk", shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    c = constellation(name)
    return c.points[torch.from_numpy(generator(0, "symbols").integers(0, 2**c.bits, shape))]


def test_noise_has_its_variance_in_both_parts() -> None:
    x = symbols()
    before = x.clone()
    received = Channel().transmit(x, 0.3, generator(1))
    assert torch.equal(x, before)
    assert received.gain is None
    assert received.y.dtype == x.dtype
    off = (received.y - x).to(torch.complex128)
    for part in (off.real, off.imag):
        assert abs(float(part.mean())) <= 5 * math.sqrt(0.15 / COUNT)
        assert abs(float(part.var()) / 0.15 - 1) <= 5 * math.sqrt(2 / COUNT)
    assert abs(float((off.real * off.imag).mean())) <= 5 * 0.15 / math.sqrt(COUNT)


@pytest.mark.parametrize(("fading", "k_factor"), [("rayleigh", 0.0), ("rician", 0.0), ("rician", 3.0)])
def test_gains_have_unit_power(fading: str, k_factor: float) -> None:
    draw = Channel(fading, k_factor=k_factor).draw(SHAPE, generator(2))  # type: ignore[arg-type]
    assert draw.gain is not None
    spread = 1 / (k_factor + 1)
    assert abs(complex(draw.gain.mean()) - math.sqrt(1 - spread)) <= 5 * math.sqrt(spread / COUNT)
    # |h|^2 has variance spread^2 + 2 spread (1 - spread)
    deviation = math.sqrt((spread**2 + 2 * spread * (1 - spread)) / COUNT)
    assert abs(float(draw.gain.abs().square().mean()) - 1) <= 5 * deviation
    assert draw.known is draw.gain


def test_blocks_share_a_gain() -> None:
    for block, distinct in ((1, 10), (4, 3), (10, 1), (64, 1), (None, 1)):
        gain = Channel("rayleigh", block).draw((5, 10), generator(3)).gain
        assert gain is not None
        for row in gain:
            assert len(row.real.unique()) == distinct
            assert torch.equal(row[: min(block or 10, 10)], row[:1].expand(min(block or 10, 10)))
        assert len(gain[:, 0].real.unique()) == 5


def test_mean_length_of_a_rician_gain() -> None:
    """Against the integral of |h| over a grid; K = 0 is Rayleigh's sqrt(pi) / 2."""
    grid = torch.linspace(-6, 8, 281, dtype=torch.float64)
    for k in (0.0, 0.5, 4.0, 30.0):
        spread, middle = 1 / (k + 1), math.sqrt(k / (k + 1))
        density = torch.exp(-((grid - middle) ** 2)[:, None] / spread - grid**2 / spread) / (math.pi * spread)
        mean = float((torch.hypot(grid[:, None], grid) * density).sum()) * 0.05**2
        assert Channel("rician", k_factor=k)._mean_length == pytest.approx(
            mean, abs=1e-4
        )  # 0.05^2 / 12 of the kink of |h| at 0
    assert Channel("rayleigh")._mean_length == pytest.approx(math.sqrt(math.pi) / 2)


@pytest.mark.parametrize("knowledge", ["phase", "none"])
@pytest.mark.parametrize("fading", ["rayleigh", "rician"])
def test_what_is_not_known_counts_as_noise(fading: str, knowledge: str) -> None:
    """The receiver's residual y - g x, turned back by the phase, has the variance it reckons with."""
    x = symbols()
    received = Channel(fading, k_factor=2.0, knowledge=knowledge).transmit(x, 0.1, generator(4))  # type: ignore[arg-type]
    off = received.y - received.gain * x
    # a fourth moment of at most 3 variances squared
    assert abs(float(off.abs().square().mean()) / float(received.n0) - 1) <= 5 * math.sqrt(2 / COUNT)


def test_an_estimate_with_errors() -> None:
    """h = g + e, e independent of g: E|g|^2 = 1 - error, residual variance n0 + error."""
    x, channel = symbols(), Channel("rayleigh", csi_error=0.2)
    draw = channel.draw(SHAPE, generator(5))
    assert draw.gain is not None
    assert draw.known is not None
    assert abs(float(draw.known.abs().square().mean()) - 0.8) <= 5 * 0.8 / math.sqrt(COUNT)
    cross = ((draw.gain - draw.known) * draw.known.conj()).mean()
    assert abs(complex(cross)) <= 5 * math.sqrt(0.2 * 0.8 / COUNT)
    received = channel.apply(x, 0.1, draw)
    assert float(received.n0) == pytest.approx(0.3)
    off = received.y - received.gain * x
    assert abs(float(off.abs().square().mean()) / 0.3 - 1) <= 5 * math.sqrt(1 / COUNT)


def test_an_error_of_the_whole_gain_is_no_knowledge() -> None:
    c, x = constellation("qpsk"), symbols()
    for channel in (Channel("rayleigh", knowledge="none"), Channel("rayleigh", csi_error=1.0)):
        assert not channel.transmit(x, 0.1, generator(6)).llrs(c).any()


def test_fading_by_block_has_the_same_mean_rate() -> None:
    """5000 frames of one gain each: the frame's own rate has a deviation of at most sqrt(p / 4)."""
    c = constellation("bpsk")
    bits = torch.from_numpy(generator(7).integers(0, 2, (5000, 20)).astype(np.uint8))
    received = Channel("rayleigh", None).transmit(modulate(bits, c), n0_of(6.0), generator(8))
    rate = bit_error_rate("bpsk", 10**0.6, "rayleigh")
    found = float((hard(received.llrs(c)) != bits).float().mean())
    assert abs(found - rate) <= 5 * math.sqrt(rate / 2 / 5000)  # wrong shares lie in 0 … 1, mostly below 1/2


def test_strong_rician_is_no_fading() -> None:
    c = constellation("bpsk")
    x = symbols("bpsk")
    plain = Channel().transmit(x, 0.2, generator(9)).llrs(c)
    faded = Channel("rician", k_factor=1e9).transmit(x, 0.2, generator(9)).llrs(c)
    torch.testing.assert_close(faded, plain, rtol=1e-3, atol=0.02)  # gains are off by 1e-4.5, times L of order 50


def test_bursts_have_their_share_and_length() -> None:
    burst = Burst(enter=0.02, leave=0.25, factor=100)
    inside = Channel(burst=burst).draw((2000, 100), generator(10)).burst
    assert inside is not None
    assert burst.share == pytest.approx(0.02 / 0.27)
    deviation = math.sqrt(burst.share / (2000 * 100) * (2 / 0.27))  # a chain forgets at rate 0.27
    assert abs(float(inside.double().mean()) - burst.share) <= 5 * deviation
    ends = inside[:, :-1] & ~inside[:, 1:]
    stays = int(inside[:, :-1].sum())
    assert abs(int(ends.sum()) / stays - 0.25) <= 5 * math.sqrt(0.25 * 0.75 / stays)


@pytest.mark.parametrize("known", [True, False])
def test_bursts_make_noise(known: bool) -> None:
    channel = Channel(burst=Burst(0.1, 0.1, 50.0, known))
    x = symbols()
    draw = channel.draw(SHAPE, generator(11))
    assert draw.burst is not None
    received = channel.apply(x, 0.1, draw)
    for where, variance in ((draw.burst, 5.0), (~draw.burst, 0.1)):
        off = (received.y - x)[where]
        assert abs(float(off.abs().square().mean()) / variance - 1) <= 5 / math.sqrt(off.numel())
        told = torch.as_tensor(received.n0).expand(SHAPE)[where]
        torch.testing.assert_close(told, torch.full_like(told, variance if known else 0.1))


@pytest.mark.parametrize("fading", ["none", "rayleigh"])
def test_erased_symbols_say_nothing(fading: str) -> None:
    c, channel = constellation("16qam"), Channel(fading, erasure=0.3)  # type: ignore[arg-type]
    x = symbols("16qam")
    draw = channel.draw(SHAPE, generator(12))
    assert draw.erased is not None
    assert abs(float(draw.erased.double().mean()) - 0.3) <= 5 * math.sqrt(0.21 / COUNT)
    received = channel.apply(x, 0.1, draw)
    found = received.llrs(c).unflatten(-1, (-1, 4))
    assert not found[draw.erased].any()
    assert found[~draw.erased].any(-1).all()
    scores = received.log_likelihoods(c)[draw.erased]
    assert torch.equal(scores, scores[:, :1].expand_as(scores))
    assert not Channel(erasure=1.0).transmit(x, 0.1, generator(12)).llrs(c).any()


def test_equal_generators_give_equal_noise() -> None:
    x = symbols()
    channel = Channel("rician", 5, burst=Burst(), erasure=0.1)
    first, second, other = (channel.transmit(x, 0.2, generator(seed, "noise")) for seed in (0, 0, 1))
    assert torch.equal(first.y, second.y)
    assert not torch.equal(first.y, other.y)


def test_what_differs_in_one_thing_shares_the_rest() -> None:
    """A longer frame begins as a shorter one does, and fading adds nothing to the noise."""
    channel = Channel("rayleigh", 5, csi_error=0.1, burst=Burst(0.2, 0.2), erasure=0.3)
    long, short, plain = (c.draw((3, n), generator(0)) for c, n in ((channel, 50), (channel, 35), (Channel(), 50)))
    assert torch.equal(long.noise, plain.noise)
    for whole, part in zip(vars(long).values(), vars(short).values(), strict=True):
        assert torch.equal(whole[:, :35], part)


def test_one_draw_serves_all_levels() -> None:
    x, channel, c = symbols(), Channel("rayleigh"), constellation("qpsk")
    draw = channel.draw(SHAPE, generator(13))
    levels = n0_of(torch.tensor([0.0, 5.0, 10.0])).view(3, 1, 1)
    together = channel.apply(x, levels, draw)
    assert together.llrs(c).shape == (3, 100, 800)
    for i, level in enumerate(levels.flatten().tolist()):
        torch.testing.assert_close(together.llrs(c)[i], channel.apply(x, level, draw).llrs(c), rtol=1e-4, atol=1e-4)
    assert channel.transmit(x, levels, generator(13)).y.shape == (3, *SHAPE)


def test_double_precision_stays() -> None:
    x = symbols().to(torch.complex128)
    received = Channel("rayleigh", erasure=0.1).transmit(x, 0.1, generator(14))
    assert received.llrs(constellation("qpsk", torch.complex128)).dtype == torch.float64


def test_all_mistakes_at_once() -> None:
    with pytest.raises(SpoliaError, match="n0 is 0"):
        Channel().transmit(symbols(), 0, generator(0))
    with pytest.raises(SpoliaError) as caught:
        Channel("rayleih", block=0, k_factor=-1, erasure=2, burst=Burst(leave=0))  # type: ignore[arg-type]
    assert len(caught.value.problems) == 5
    with pytest.raises(SpoliaError, match=r"0 to 0\.2"):
        Channel("rician", k_factor=4, csi_error=0.5)
    with pytest.raises(SpoliaError, match="csi_error"):
        Channel(csi_error=0.1)
    with pytest.raises(SpoliaError, match="knowledge: full"):
        Channel("rayleigh", knowledge="phase", csi_error=0.1)
