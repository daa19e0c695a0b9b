from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from spolia.core.modulation import constellation
from spolia.errors import SpoliaError
from spolia.methods.link import bounds
from spolia.parts.prior import UnigramPrior

BPSK = constellation("bpsk", torch.complex128)


def ratio(db: float) -> float:
    return 10 ** (db / 10)


def test_capacity_and_dispersion_of_bpsk():
    """Published values of the binary-input Gaussian channel, to the digits given."""
    for db, value in ((-1, 0.6430), (0, 0.7215), (1, 0.7951), (2, 0.8598)):
        assert bounds.capacity(BPSK, ratio(db)) == pytest.approx(value, abs=5e-5)
    assert bounds.information(BPSK, 1.0)[1] == pytest.approx(0.5333, abs=5e-5)
    for rate, db in ((0.2, -7.953), (0.25, -6.815), (0.3, -5.846), (0.5126, -2.657), (0.7, -0.277), (0.9, 2.740)):
        assert bounds.limit_db(BPSK, rate) == pytest.approx(db, abs=1e-3)


@pytest.mark.parametrize("name", ["bpsk", "qpsk", "16qam", "256qam"])
def test_capacity_is_the_integral(name):
    """Against scipy's adaptive quadrature over one axis."""
    quad = pytest.importorskip("scipy.integrate").quad
    c = constellation(name, torch.complex128)
    levels = c.levels.numpy()
    for db in (-5.0, 8.0, 18.0):
        esn0 = ratio(db)

        def density(n: float, a: float, esn0: float = esn0) -> float:
            others = np.exp(-esn0 * ((n + a - levels) ** 2 - n * n)).sum()
            weight = math.exp(-n * n * esn0) * math.sqrt(esn0 / math.pi)
            return weight * (math.log2(len(levels)) - math.log2(others))

        far = 8 / math.sqrt(esn0)
        inside = sum(quad(density, -far, far, args=(a,), limit=200)[0] for a in levels) / len(levels)
        assert bounds.capacity(c, esn0) == pytest.approx(c.axes * inside, abs=1e-6)  # both are good to that


def test_qpsk_is_two_bpsk_at_half_the_energy_and_all_stay_below_shannon():
    qpsk = constellation("qpsk", torch.complex128)
    for db in (-10, 0, 10):
        assert bounds.capacity(qpsk, ratio(db)) == pytest.approx(2 * bounds.capacity(BPSK, ratio(db) / 2), abs=1e-9)
        for name in ("bpsk", "64qam"):
            assert bounds.capacity(constellation(name), ratio(db)) < bounds.gaussian_capacity(ratio(db))


def test_normal_approximation():
    """Values worked out by hand from C and V above."""
    for db, k, error in ((-2, 120, 0.318), (-1, 120, 0.0233), (0, 120, 1.1e-4), (-1, 140, 0.405), (0, 140, 0.0331)):
        assert bounds.frame_error(BPSK, ratio(db), 216, k) == pytest.approx(error, rel=0.03)  # two digits given
    both = bounds.separate_frame_error(BPSK, ratio(-1), 216, [120, 140])
    assert both == pytest.approx((0.0233 + 0.405) / 2, rel=0.01)


def test_q_is_the_normal_tail():
    norm = pytest.importorskip("scipy.stats").norm
    for x in (-2.0, 0.0, 1.5, 6.0):
        assert bounds.q(x) == pytest.approx(norm.sf(x), rel=1e-12)


def test_rayleigh_capacity_is_the_mean_over_gains():
    gains = np.random.default_rng(0).exponential(size=1000)
    values = [bounds.capacity(BPSK, 4.0 * g) for g in gains]
    # 4 standard errors of the mean of 1000 draws
    assert abs(bounds.rayleigh_capacity(BPSK, 4.0) - np.mean(values)) < 4 * np.std(values) / math.sqrt(len(values))


def test_pairwise_error_and_the_binary_source():
    """The spec's number, and equal chances: Q(sqrt(2 d Es/N0))."""
    assert bounds.binary_map_error(0.8, ratio(2)) == pytest.approx(0.02843, abs=5e-6)
    assert bounds.binary_map_error(0.5, ratio(2)) == pytest.approx(bounds.q(math.sqrt(2 * ratio(2))))
    assert bounds.pairwise_error(3, 0.0, 0.5) == pytest.approx(bounds.q(math.sqrt(3)))
    assert bounds.token_error(0.1, 3) == pytest.approx(1 - 0.9**3)


def test_source_bits_are_minus_log2_of_the_probability():
    prior = UnigramPrior(torch.tensor([0.5, 0.25, 0.125, 0.125]).log())
    tokens = torch.tensor([[0, 1, 2], [0, 0, 0]])
    torch.testing.assert_close(bounds.source_bits(prior, tokens), torch.tensor([6.0, 3.0], dtype=torch.float64))
    assert bounds.ideal_bits([6.0, 2.5]) == [8, 5]


def test_what_makes_no_sense_is_refused():
    with pytest.raises(SpoliaError, match=r"1\.2 bits per use, of 1"):
        bounds.limit_db(BPSK, 1.2)
    with pytest.raises(SpoliaError, match="positive ratio"):
        bounds.capacity(BPSK, 0.0)
