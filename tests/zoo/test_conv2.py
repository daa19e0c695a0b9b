from __future__ import annotations

import pytest
import torch

from spolia.errors import SpoliaError
from spolia.zoo.conv2 import Conv2
from spolia.zoo.resnet10 import SmallResNet


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_conv2_has_the_sizes_that_it_says():
    network = Conv2(5, channels=1, width=24, size=12, generator=draws())
    x = torch.zeros(2, 1, 12, 12)
    assert network(x).shape == (2, 5) and network.features(x).shape == (2, 216)
    assert network.config()["num_labels"] == 5
    assert torch.equal(network.head.weight, Conv2(5, channels=1, width=24, size=12, generator=draws()).head.weight)
    with pytest.raises(SpoliaError, match="two poolings"):
        Conv2(5, size=3, generator=draws())


@pytest.mark.parametrize(("depth", "parameters"), [(10, 4_900_677), (18, 11_171_397)])
def test_residual_networks_have_the_papers_sizes(depth, parameters):
    """Widths 64 … 512, 3 x 3 stem, 1 x 1 shortcuts with norms, 5 classes; counted by hand."""
    network = SmallResNet(depth, 64, 5, generator=draws())
    assert sum(p.numel() for p in network.parameters()) == parameters
    small = SmallResNet(depth, 4, 5, generator=draws()).eval()
    x = torch.rand(2, 3, 32, 32, generator=draws())
    assert small(x).shape == (2, 5) and small.features(x).shape == (2, 32)
    assert small.stages(small.stem(x)).shape == (2, 32, 4, 4)
    with pytest.raises(SpoliaError, match="12 layers"):
        SmallResNet(12, generator=draws())
