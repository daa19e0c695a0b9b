"""Taps: features of named modules, in the graph, in the order asked for; hooks come off; what cannot be read is named."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.errors import SpoliaError
from spolia.parts.taps import tapped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.never = nn.Linear(4, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.recurrent = nn.GRU(5, 3, batch_first=True)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.recurrent(self.second(self.second(self.first(x))))
        return states


def test_features_in_the_order_asked_for() -> None:
    net, x = Net(), torch.randn(2, 6, 4)
    with tapped(net, ["recurrent", "first"]) as read:
        made = net(x)
        last, first = read()
        net(2 * x)
        (_, again) = read()
    assert torch.equal(last, made)  # the first entry of the pair a GRU gives
    assert torch.equal(first, net.first(x))
    assert torch.equal(again, net.first(2 * x))
    first.sum().backward()
    assert net.first.weight.grad.any()


def test_hooks_come_off() -> None:
    net = Net()
    with pytest.raises(RuntimeError), tapped(net, ["first"]):
        net(torch.randn(2, 6, 3))
    assert not net.first._forward_hooks
    with tapped(net, []) as read:
        assert read() == ()


@pytest.mark.parametrize(("name", "word"), [("never", "did not run"), ("second", "ran 2 times")])
def test_what_cannot_be_read_is_named(name: str, word: str) -> None:
    net = Net()
    with tapped(net, [name]) as read:
        net(torch.randn(2, 6, 4))
        with pytest.raises(SpoliaError, match=word):
            read()


def test_an_unknown_name() -> None:
    with pytest.raises(SpoliaError, match="did you mean `first`"), tapped(Net(), ["frist"]):
        pass
