"""Symbols and ratios against sionna's mapper and demapper, where it is installed.

Sionna's ratio is ln p(1) / p(0), ours the other way round. Both sum in fp32: 1e-4 of the largest ratio is their rounding.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spolia.core import modulation
from spolia.core.seeds import generator

mapping = pytest.importorskip("sionna.phy.mapping", reason="sionna-no-rt is not installed")

NAMES = ("qpsk", "16qam", "64qam", "256qam")


@pytest.mark.parametrize("name", NAMES)
def test_symbols_are_sionnas(name: str) -> None:
    c = modulation.constellation(name)
    bits = torch.from_numpy(generator(0, name).integers(0, 2, (5, 60 * c.bits)).astype(np.float32))
    theirs = mapping.Mapper("qam", c.bits)(bits)
    assert torch.allclose(modulation.modulate(bits.to(torch.uint8), c), theirs, atol=1e-6)  # fp32 of numbers near 1


@pytest.mark.parametrize("noise", [0.01, 0.3, 4.0])
@pytest.mark.parametrize(("method", "exact"), [("app", True), ("maxlog", False)])
@pytest.mark.parametrize("name", NAMES)
def test_ratios_are_sionnas_with_the_other_sign(name: str, method: str, exact: bool, noise: float) -> None:
    c = modulation.constellation(name)
    draws = generator(1, name, noise)
    sent = torch.from_numpy(draws.integers(0, 2, (4, 50 * c.bits)).astype(np.uint8))
    real, imaginary = (torch.from_numpy(draws.standard_normal((4, 50)).astype(np.float32)) for _ in range(2))
    y = modulation.modulate(sent, c) + (noise / 2) ** 0.5 * torch.complex(real, imaginary)
    theirs = mapping.Demapper(method, "qam", c.bits)(y, torch.tensor(noise))
    ours = modulation.llrs(y, noise, c, exact=exact)
    assert float((ours + theirs).abs().max()) <= 1e-4 * float(theirs.abs().max())
