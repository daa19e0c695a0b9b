"""si: what the path accumulates is the fall of the loss, and importance is its share per squared way."""

from __future__ import annotations

import pytest
import torch

from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.si import Si, SiLearner


def test_the_path_is_the_fall_of_the_loss(stream, network) -> None:
    """Full batches, small steps: the sum of -g dtheta is L_0 - L_1 to first order in the rate."""
    experience = stream.experiences[0]
    batch = experience.batch(slice(None))
    learner = SiLearner(network(), Si(lr=1e-4))
    learner.begin(experience)
    first = float(learner.loss(batch)[0].detach())
    for _ in range(200):
        learner.observe(batch)
    fall = first - float(learner.loss(batch)[0].detach())
    assert sum(float(omega.sum()) for omega in learner.path) == pytest.approx(fall, rel=1e-3)


def test_importance_by_hand(stream, network) -> None:
    learner = SiLearner(network(), Si(lr=0.1, damping=0.3))
    start = learner.copies()
    learner.begin(stream.experiences[0])
    for step in range(3):
        learner.observe(stream.experiences[0].draw(8, 0, step))
    path = [omega.clone() for omega in learner.path]
    learner.end(stream.experiences[0])
    for f, omega, p, origin in zip(learner.importance, path, learner.parameters, start, strict=True):
        torch.testing.assert_close(f, omega.clamp(min=0) / ((p.detach() - origin) ** 2 + 0.3))
    assert all(not omega.any() for omega in learner.path)


def test_without_strength_it_is_fine_tuning(stream, network, led, apart) -> None:
    trail = led(SiLearner(network(), Si(lr=0.1, strength=0.0)), stream)
    assert apart(trail, led(FinetuneLearner(network(), Finetune(lr=0.1)), stream)) < 1e-12
