"""refresh: quadratic and small-step oracles, Langevin's stationary law, its limits, and the checked stability limit."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from spolia.core.gradients import gradients
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.methods.continual.cpr import Cpr, CprLearner
from spolia.methods.continual.derpp import DerPp, DerPpLearner
from spolia.methods.continual.ewc import Ewc, EwcLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.learner import Model
from spolia.methods.continual.refresh import DELTA, Refresh, RefreshLearner, sharpness
from spolia.parts.stream import Batch

SMALL = DerPp(items=12, replay=5)
NOTHING = Batch(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64))


class Point(nn.Module):
    """Weights that are their own output [n, d]."""

    def __init__(self, at: torch.Tensor):
        super().__init__()
        self.at = nn.Parameter(at.clone())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.at


def on(at: torch.Tensor, loss, lr: float, settings: Refresh) -> RefreshLearner:
    model = Model(Point(at), criterion=lambda z, _: loss(z))
    return RefreshLearner(FinetuneLearner(model, Finetune(lr=lr)), settings)


@pytest.mark.parametrize("importance", [None, [0.0, 0.4, 2.0]])
def test_a_step_on_a_quadratic(importance) -> None:
    """L = theta' H theta / 2: unlearning and learning again is (I - lr H)(I + gamma P H) theta, J times inside."""
    draws = torch.Generator().manual_seed(0)
    root = torch.randn(3, 3, dtype=torch.float64, generator=draws)
    h, start = root @ root.T, torch.randn(1, 3, dtype=torch.float64, generator=draws)
    learner = on(start, lambda z: (z @ h * z).sum() / 2, 0.1, Refresh(gamma=0.2, steps=2, damping=1.0))
    p = torch.ones(3, dtype=torch.float64)
    if importance is not None:
        f = torch.tensor([importance], dtype=torch.float64)
        learner.importance[:], p = [f], 1 / (f[0] + 1.0)
    learner.observe(NOTHING)
    eye = torch.eye(3, dtype=torch.float64)
    up = eye + 0.1 * 0.2 * torch.diag(p) @ h
    wanted = (eye - 0.1 * h) @ up @ up @ start[0]
    torch.testing.assert_close(learner.network.at[0].detach(), wanted, rtol=1e-13, atol=0)


def test_the_first_order_of_a_small_gamma(stream, network) -> None:
    """[theta+(gamma) - theta+(0)] / (lr gamma) -> P g - lr H P g, by a product with the Hessian."""
    batch, lr, gamma = stream.experiences[0].draw(8, 0, 0), 0.2, 1e-6
    ends = []
    for strength in (0.0, gamma):
        learner = RefreshLearner(FinetuneLearner(network(), Finetune(lr=lr)), Refresh(gamma=strength))
        draws = torch.Generator().manual_seed(5)
        scales = [torch.rand(p.shape, dtype=p.dtype, generator=draws) for p in learner.parameters]
        learner.importance[:] = scales
        learner.observe(batch)
        ends.append(learner.inner.copies())
    made = network()
    given = list(made.parameters())
    slopes = torch.autograd.grad(nn.functional.cross_entropy(made(batch.x), batch.y), given, create_graph=True)
    ways = [(g / (f + 1)).detach() for g, f in zip(slopes, scales, strict=True)]
    bent = gradients(sum((g * way).sum() for g, way in zip(slopes, ways, strict=True)), given)
    for end, plain, way, product in zip(ends[1], ends[0], ways, bent, strict=True):
        torch.testing.assert_close(
            (end - plain) / (lr * gamma), way - lr * product, rtol=1e-4, atol=1e-5
        )  # second order


def test_noise_has_langevins_law() -> None:
    """L = -theta' A theta / 2 is climbed back to 0: the chain's stationary variance is 1 / A whatever P is.

    Steps of size e = lr gamma make it 1 / (A (1 - e P A / 2)); 4000 chains know a variance to sqrt(2 / 4000), times 5.
    """
    a, f, chains, e = torch.tensor([0.5, 1.0, 4.0]), torch.tensor([0.0, 1.0, 3.0]), 4000, 0.05
    learner = on(torch.zeros(chains, 3), lambda z: -(z * z * a).sum() / 2, 1.0, Refresh(gamma=e, temperature=1.0))
    learner.importance[:] = [f.expand(chains, 3)]
    p = 1 / (f + 1)
    for _ in range(300):  # the slowest direction forgets its start by exp(-2 * 300 * 0.05 * 0.5)
        learner.unlearn(NOTHING)
    wanted = 1 / (a * (1 - e * p * a / 2))
    found = learner.network.at.detach().var(0)
    assert ((found / wanted - 1).abs() < 5 * (2 / chains) ** 0.5).all()


@pytest.mark.parametrize("off", [{"gamma": 0.0}, {"steps": 0}, {"steps": 0, "form": "released"}])
def test_switched_off_it_is_its_host_bit_for_bit(off, stream, network, led, apart) -> None:
    around = led(RefreshLearner(DerPpLearner(network(), SMALL, seed=3), Refresh(**off)), stream)
    assert apart(around, led(DerPpLearner(network(), SMALL, seed=3), stream)) == 0


def test_the_host_sees_what_it_would_have_seen(stream, network, led) -> None:
    """Views, replayed places and what is remembered are those of the host alone; also for the whole loss."""

    def view(x, draws):
        seen.append(draws.random())
        return x

    found = []
    for wrap in (False, True):
        seen: list[float] = []
        host = DerPpLearner(Model(network(), view=view), SMALL, seed=3)
        led(RefreshLearner(host, Refresh(loss="full")) if wrap else host, stream)
        found.append((sorted(set(seen)), host.memory.all()["x"].clone(), host.memory.draws.bit_generator.state))
    assert found[0][0] == found[1][0] and torch.equal(found[0][1], found[1][1])
    assert str(found[0][2]) == str(found[1][2])


def test_it_does_something_around_any_learner(stream, network, led, apart) -> None:
    def hosts():
        yield lambda: FinetuneLearner(network(), Finetune())
        yield lambda: EwcLearner(network(), Ewc(lr=0.1))
        yield lambda: CprLearner(EwcLearner(network(), Ewc(lr=0.1)), Cpr())

    for host in hosts():
        gap = apart(led(RefreshLearner(host(), Refresh()), stream), led(host(), stream))
        assert 1e-5 < gap < 10


def test_the_released_step_is_a_fixed_share_of_each_tensor(stream, network) -> None:
    learner = RefreshLearner(DerPpLearner(network(), SMALL), Refresh(form="released"))
    before = learner.inner.copies()
    learner.unlearn(stream.experiences[0].draw(8, 0, 0))
    for a, b in zip(before, learner.parameters, strict=True):
        moved = float((b.detach() - a).norm() / a.norm())
        noise = 1e-3 * (a.numel() ** 0.5) / float(a.norm())
        assert abs(moved / DELTA - 1) < 4 * noise + 1e-6


def test_running_statistics_stay_while_unlearning() -> None:
    body = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6), nn.Linear(6, 6)).double()
    learner = RefreshLearner(FinetuneLearner(body, Finetune()), Refresh())
    before = [b.clone() for b in body.buffers()]
    x = torch.randn(8, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learner.unlearn(Batch(x, torch.arange(8) % 6))
    assert all(torch.equal(a, b) for a, b in zip(before, body.buffers(), strict=True))


def test_fisher_is_in_units_of_its_mean_and_averaged(stream, network) -> None:
    learner = RefreshLearner(FinetuneLearner(network(), Finetune()), Refresh(decay=0.5))
    for experience in stream.experiences[:2]:
        learner.begin(experience)
        learner.observe(experience.draw(8, 0, 0))
        learner.end(experience)
        total = sum(float(f.sum()) for f in learner.importance) / sum(f.numel() for f in learner.importance)
        assert total == pytest.approx(1.0, rel=1e-12)


def test_shares_tell_what_is_taken_back(stream, network) -> None:
    learner = RefreshLearner(FinetuneLearner(network(), Finetune()), Refresh(gamma=0.2))
    before = learner.inner.copies()
    found = learner.shares(stream.experiences[0].draw(8, 0, 0))
    assert list(found) == learner.inner.names and all(s == pytest.approx(0.2, rel=1e-9) for s in found.values())
    assert all(torch.equal(a, b) for a, b in zip(before, learner.parameters, strict=True))
    assert sharpness(learner, stream.experiences[0].draw(8, 0, 0)) > 0


@pytest.mark.parametrize(("settings", "fails"), [({"gamma": 1.0}, True), ({"gamma": 0.4, "steps": 3}, True)])
def test_unlearning_that_outweighs_learning_is_refused(settings, fails, network) -> None:
    with pytest.raises(SpoliaError, match="climbs"):
        RefreshLearner(FinetuneLearner(network(), Finetune()), Refresh(**settings))


def test_the_limit_knows_the_damping_and_warns_before_it(network) -> None:
    with pytest.raises(SpoliaError, match="take back 200%"):
        RefreshLearner(FinetuneLearner(network(), Finetune()), Refresh(gamma=0.2, damping=0.1))
    with pytest.warns(SpoliaWarning, match="60%"):
        RefreshLearner(FinetuneLearner(network(), Finetune()), Refresh(gamma=0.6))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RefreshLearner(FinetuneLearner(network(), Finetune()), Refresh(gamma=0.2, damping=0.1, precondition="none"))
        RefreshLearner(FinetuneLearner(network(), Finetune()), Refresh(gamma=9.0, form="released"))
    adam = Model(network(), lambda groups: torch.optim.Adam(groups))
    with pytest.warns(SpoliaWarning, match="Adam"):
        RefreshLearner(FinetuneLearner(adam, Finetune()), Refresh())


def test_at_the_limit_nothing_is_learned() -> None:
    """Why it is one: at J gamma = 1 a small step of a quadratic stays where it was, above it the loss climbs."""
    ends = []
    for gamma in (0.5, 0.999, 1.5):
        learner = on(torch.ones(1, 2), lambda z: (z * z).sum() / 2, 1e-3, Refresh(gamma=0.1))
        object.__setattr__(learner, "settings", Refresh(gamma=gamma))
        learner.observe(NOTHING)
        ends.append(float(learner.network.at[0, 0].detach()))
    assert ends[0] < 1 - 4e-4 < ends[1] <= 1.0 < ends[2]
