"""derpp: its equation, and DER where beta is 0 but for the second draw."""

from __future__ import annotations

import torch
from torch import nn

from spolia.methods.continual.derpp import DerPp, DerPpLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.parts.memory import Memory


def test_a_step_is_its_equation(stream, network) -> None:
    x, y = stream.experiences[0].draw(6, 0, 0)
    z = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    memory, other = Memory(6), network()
    memory.add(x=x, y=y, logits=z)
    batch = stream.experiences[1].draw(8, 0, 0)
    learner = DerPpLearner(network(), DerPp(lr=0.2, alpha=0.4, beta=0.7, replay=6), memory=memory)
    learner.observe(batch)
    loss = nn.functional.cross_entropy(other(batch.x), batch.y) + 0.4 * (other(x) - z).square().mean()
    (loss + 0.7 * nn.functional.cross_entropy(other(x), y)).backward()
    for p, q in zip(learner.parameters, other.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), (q - 0.2 * q.grad).detach(), rtol=0, atol=1e-13)  # fp64


def test_its_two_draws_are_independent(stream, network) -> None:
    learner = DerPpLearner(network(), DerPp(items=12, replay=4))
    drawn, together = [], learner.together
    learner.together = lambda new, one, two: drawn.append((one, two)) or together(new, one, two)
    for step in range(8):
        learner.observe(stream.experiences[0].draw(8, 0, step))
    assert not all(torch.equal(one, two) for one, two in drawn)


def test_without_weights_it_is_fine_tuning(stream, network, led, apart) -> None:
    trail = led(DerPpLearner(network(), DerPp(alpha=0.0, beta=0.0, items=12, replay=5)), stream)
    assert apart(trail, led(FinetuneLearner(network(), Finetune(lr=0.03)), stream)) < 1e-12
