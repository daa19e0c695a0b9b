"""Running statistics found anew are those of all inputs together, and finding them leaves no trace."""

from __future__ import annotations

import torch
from torch import nn

from spolia.parts.network import Network
from spolia.parts.statistics import reestimated, statistics_of


def test_the_first_layer_has_mean_and_variance_of_all_inputs() -> None:
    draws = torch.Generator().manual_seed(0)
    x = 3 + 2 * torch.randn(50, 4, 5, generator=draws)
    network = Network(nn.Sequential(nn.BatchNorm1d(4), nn.Conv1d(4, 3, 2), nn.BatchNorm1d(3)))
    before = {name: tensor.clone() for name, tensor in network.module.state_dict().items()}
    found = reestimated(network, x.split(7))
    assert list(found) == statistics_of(network.module)
    wide = x.double().transpose(0, 1).flatten(1)
    torch.testing.assert_close(found["0.running_mean"], wide.mean(1), rtol=1e-10, atol=0)
    torch.testing.assert_close(found["0.running_var"], wide.var(1), rtol=1e-10, atol=0)  # unbiased, as torch keeps it
    assert all(torch.equal(before[name], tensor) for name, tensor in network.module.state_dict().items())
    assert not any(module.training for module in network.module.modules())


def test_one_batch_gives_what_training_gives() -> None:
    draws = torch.Generator().manual_seed(1)
    x = torch.randn(40, 6, generator=draws)
    module = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5, momentum=1.0), nn.ReLU(), nn.BatchNorm1d(5, momentum=1.0))
    found = reestimated(Network(module), [x])
    module.train()(x)  # momentum 1 keeps the last batch's statistics
    for name, tensor in found.items():
        # fp64 sums against torch's fp32 ones
        torch.testing.assert_close(tensor.float(), module.state_dict()[name], rtol=1e-5, atol=1e-6)


def test_a_network_without_such_layers_has_none() -> None:
    network = Network(nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2)))
    assert reestimated(network, [torch.zeros(1, 2)]) == {} and statistics_of(network.module) == []
