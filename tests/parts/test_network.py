"""A network runs one architecture with any weights, differentiable in them, and leaves the module as it was."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from spolia.errors import SpoliaError
from spolia.parts.network import Network, outputs_of


def small() -> Network:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
    return Network(body, {"a": nn.Linear(4, 2), "b": nn.Linear(4, 5)})


def test_other_weights_are_used_and_the_module_stays() -> None:
    network, x = small(), torch.randn(6, 3)
    before = {name: value.clone() for name, value in network.module.state_dict().items()}
    weights = {name: p.detach() * 2 for name, p in network.module.named_parameters()}
    twin = network.loaded(network.module.state_dict() | weights)
    assert torch.equal(network.features(x, weights), twin(x)), "the same as a module that holds them"
    assert network.logits("b", x, weights).shape == (6, 5)
    assert all(torch.equal(before[name], value) for name, value in network.module.state_dict().items())


def test_gradients_reach_the_weights_and_no_head() -> None:
    network, x = small(), torch.randn(6, 3)
    weights = {name: p.detach().clone().requires_grad_() for name, p in network.module.named_parameters()}
    network.logits("a", x, weights).square().sum().backward()
    assert all(weight.grad is not None and bool(weight.grad.any()) for weight in weights.values())
    assert all(p.grad is None for p in [*nn.ModuleDict(network.heads).parameters(), *network.module.parameters()])


def test_named_outputs_of_other_libraries_are_found() -> None:
    states = torch.randn(2, 7, 3)
    pooled = SimpleNamespace(pooler_output=states[:, 1], last_hidden_state=states)
    assert torch.equal(outputs_of(lambda ids: pooled, {"ids": None}), states[:, 1])  # type: ignore[arg-type]
    unpooled = SimpleNamespace(pooler_output=None, last_hidden_state=states)
    assert torch.equal(outputs_of(lambda ids: unpooled, (None,)), states[:, 0])  # type: ignore[arg-type]
    with pytest.raises(SpoliaError, match="no features are known"):
        outputs_of(lambda x: {"loss": x}, states)  # type: ignore[arg-type]


def test_what_does_not_fit_is_named() -> None:
    network = small()
    with pytest.raises(SpoliaError, match="no head for c"):
        network.check_tasks(["a", "c"])
    state = network.module.state_dict()
    with pytest.raises(SpoliaError, match=r"the weights lack tensor `0.bias`"):
        network.loaded({name: value for name, value in state.items() if name != "0.bias"})
    with pytest.raises(SpoliaError, match=r"`0.bias` is \[4\] in the module, \[5\] in the weights"):
        network.loaded(state | {"0.bias": torch.zeros(5)})
