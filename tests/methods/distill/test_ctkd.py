"""CTKD: the range of its temperature, its curriculum, and that theta climbs where the student descends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spolia.methods.distill.ctkd import Ctkd, ctkd, reversal
from spolia.methods.distill.dkd import Dkd, dkd
from spolia.methods.distill.kd import Kd, kd


@pytest.mark.parametrize("theta", [-30.0, 0.0, 1.0, 30.0])
def test_it_is_the_base_at_its_temperature(theta: float, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 10)
    heat = 1 + 20 * float(torch.tensor(theta).sigmoid())
    assert 1 <= heat <= 21
    for progress in (0.0, 0.02, 1.0):
        ours = ctkd(Ctkd(start=theta))(s, t, y, progress)
        torch.testing.assert_close(ours, kd(Kd(temperature=heat))(s, t, y), rtol=1e-5, atol=1e-6)  # theta is fp32
    ours = ctkd(Ctkd(start=theta, base="dkd"))(s, t, y)
    torch.testing.assert_close(ours, dkd(Dkd(temperature=heat))(s, t, y), rtol=1e-5, atol=1e-6)


def test_the_curriculum() -> None:
    assert reversal(0.0, 0.1) == 0.0
    assert reversal(0.05, 0.1) == pytest.approx(-0.5)
    assert reversal(0.1, 0.1) == reversal(1.0, 0.1) == reversal(0.0, 0.0) == -1.0
    steps = [reversal(i / 100, 0.5) for i in range(101)]
    assert steps == sorted(steps, reverse=True)


def slope(progress: float, drawn: Callable[..., Any]) -> float:
    s, t, y = drawn(6, 10)
    objective = ctkd()
    theta = objective.learned["theta"]
    (found,) = torch.autograd.grad(objective(s, t, y, progress).mean(), theta)
    return float(found)


def test_theta_goes_up_the_slope(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 10)

    def loss(theta: float) -> float:
        return float(ctkd(Ctkd(start=theta))(s, t, y).mean().detach())

    uphill = (loss(1.01) - loss(0.99)) / 0.02
    assert slope(1.0, drawn) == pytest.approx(-uphill, rel=1e-2)  # theta is fp32: a difference of two losses
    assert slope(0.0, drawn) == 0.0
    assert slope(5 / 240, drawn) == pytest.approx(slope(1.0, drawn) / 2, rel=1e-5)
    objective = ctkd()
    optimizer = torch.optim.SGD(objective.learned.values(), lr=0.1)
    before = objective(s, t, y).mean()
    before.backward()
    optimizer.step()
    assert objective(s, t, y).mean() > before


def test_each_has_a_theta_of_its_own() -> None:
    one, two = ctkd(), ctkd()
    assert one.learned["theta"] is not two.learned["theta"]
    assert one.learned["theta"].requires_grad
    assert one.to("cpu").learned["theta"] is one.learned["theta"]
