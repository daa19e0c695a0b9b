"""The GPU kernel against exact blocks: on a GPU, or in triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from spolia.core.ranking import choose, tau_loss
from spolia.core.ranking_exact import exact
from spolia.core.ranking_terms import Tau
from spolia.errors import SpoliaError

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.mark.parametrize("form", ["product", "joint", "hard_teacher"])
@pytest.mark.parametrize("phi", ["tanh", "sigmoid", "softsign", "erf"])
def test_kernel_is_the_blocks(form, phi) -> None:
    pytest.importorskip("triton")
    if not INTERPRETED and not torch.cuda.is_available():
        pytest.skip("no GPU, and TRITON_INTERPRET is not 1")
    from spolia.core.ranking_triton import fused

    device = "cpu" if INTERPRETED else "cuda"
    draws = torch.Generator().manual_seed(0)
    for count in (2, 31, 100):  # 100: blocks that are full and that are not, in both directions
        s, t = (2 * torch.randn(3, count, generator=draws) for _ in range(2))
        t[0, 0] = t[0, 1]
        tau = Tau(form, phi, 0.7)
        found = fused(s.to(device), t.to(device), tau, None)
        wanted = exact(s.double(), t.double(), tau, None, True)
        pairs = count * (count - 1) / 2
        assert found.slope is not None and wanted.slope is not None
        # fp32: a rounding error of 6e-8 a pair, sums of same-signed errors at worst
        assert float((found.total.cpu() - wanted.total).abs().max()) / pairs < 1e-6
        assert float((found.slope.cpu() - wanted.slope).abs().max()) / (count - 1) < 1e-5


def test_without_it_nothing_is_lost() -> None:
    """On a CPU `auto` never needs it; asked for by name, the obstacle is told."""
    s = torch.randn(2, 600, dtype=torch.float64)  # 720,000 pairs
    assert choose(s, s, Tau("joint")).implementation == "chunked"
    with pytest.raises(SpoliaError, match="triton"):
        tau_loss(s, s, Tau(), implementation="triton")
