"""vcl: a linear-Gaussian limit, the pull towards the last posterior, and answers that are the same for every call."""

from __future__ import annotations

import torch
from torch import nn

from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.learner import Model
from spolia.methods.continual.objective import gaussian
from spolia.methods.continual.vcl import Vcl, VclLearner


def test_without_spread_and_divergence_it_is_fine_tuning(stream, network, led, apart) -> None:
    """sigma = 1e-12: weights are drawn within rounding of their means, over some twenty steps."""
    trail = led(VclLearner(network(), Vcl(lr=0.1, weight=0.0, spread=1e-12)), stream)
    assert apart(trail, led(FinetuneLearner(network(), Finetune(lr=0.1)), stream)) < 1e-9


def test_the_bound_is_cross_entropy_and_divergence_over_n(stream, network) -> None:
    model = Model(network(), lambda groups: torch.optim.Adam(groups, lr=0.01))
    learner = VclLearner(model, Vcl(spread=0.1, prior=0.7))
    learner.begin(stream.experiences[0])
    batch, state = stream.experiences[0].draw(8, 0, 0), learner.noise.get_state()
    loss, _ = learner.loss(batch)
    learner.noise.set_state(state)
    logits = learner.logits_with(learner.drawn(learner.noise), batch.x)
    normal = torch.distributions.Normal
    kl = sum(
        torch.distributions.kl_divergence(normal(m, s.exp()), normal(0.0, 0.7)).sum()
        for m, s in zip(learner.means, learner.spreads, strict=True)
    )
    torch.testing.assert_close(loss, nn.functional.cross_entropy(logits, batch.y) + kl / 24)


def test_a_plain_step_lands_where_the_quadratic_says(stream, network) -> None:
    """The implicit pull of mu: (mu - lr g + s mu_0) / (1 + s), s = lr / (N sigma_0^2)."""
    learner = VclLearner(network(), Vcl(lr=0.2, spread=0.1, prior=0.01))
    learner.begin(stream.experiences[0])
    batch, state = stream.experiences[0].draw(8, 0, 0), learner.noise.get_state()
    before = [m.detach().clone() for m in learner.means]
    slopes = torch.autograd.grad(learner.loss(batch)[0], learner.means)
    learner.noise.set_state(state)
    learner.observe(batch)
    s = 0.2 / (24 * 0.01**2)
    for m, mean, g in zip(learner.means, before, slopes, strict=True):
        torch.testing.assert_close(m.detach(), (mean - 0.2 * g) / (1 + s), rtol=1e-9, atol=1e-12)


def test_the_posterior_becomes_the_prior(stream, network) -> None:
    learner = VclLearner(network(), Vcl())
    learner.begin(stream.experiences[0])
    learner.observe(stream.experiences[0].draw(8, 0, 0))
    learner.end(stream.experiences[0])
    spreads = [s.exp() for s in learner.spreads]
    assert gaussian(learner.means, spreads, learner.before, learner.before_spreads).abs() < 1e-12
    x = stream.tests[0].examples.batch(slice(None)).x
    first = learner.predict(x)
    assert torch.equal(first, learner.predict(x))
    torch.testing.assert_close(first.exp().sum(1), torch.ones(len(x), dtype=torch.float64))
