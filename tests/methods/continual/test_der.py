"""der: stored logits are those of the view trained on before the step, and labels play no part in what is remembered."""

from __future__ import annotations

import torch
from torch import nn

from spolia.methods.continual.der import Der, DerLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.learner import Model
from spolia.parts.memory import Memory


def test_what_is_stored(stream, network) -> None:
    model = Model(network(), view=lambda x, draws: x + 1)
    learner = DerLearner(model, Der(items=12, replay=5))
    batch = stream.experiences[0].draw(8, 0, 0)
    before = learner.network(batch.x + 1).detach()
    learner.observe(batch)
    assert torch.equal(learner.memory.all()["logits"], before)
    assert torch.equal(learner.memory.all()["x"], batch.x)


def test_a_step_is_its_equation_and_labels_do_not_count(stream, network) -> None:
    x, y = stream.experiences[0].draw(6, 0, 0)
    z = torch.randn(6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    batch, other = stream.experiences[1].draw(8, 0, 0), network()
    loss = nn.functional.cross_entropy(other(batch.x), batch.y) + 0.4 * (other(x) - z).square().mean()
    loss.backward()
    for labels in (y, torch.zeros_like(y)):
        memory = Memory(6)
        memory.add(x=x, y=labels, logits=z)
        learner = DerLearner(network(), Der(lr=0.2, alpha=0.4, replay=6), memory=memory)
        learner.observe(batch)
        for p, q in zip(learner.parameters, other.parameters(), strict=True):
            torch.testing.assert_close(p.detach(), (q - 0.2 * q.grad).detach(), rtol=0, atol=1e-13)  # fp64


def test_without_alpha_it_is_fine_tuning(stream, network, led, apart) -> None:
    der = led(DerLearner(network(), Der(alpha=0.0, items=12, replay=5)), stream)
    assert apart(der, led(FinetuneLearner(network(), Finetune(lr=0.03)), stream)) < 1e-12
