"""agem: no step goes against the reference, and where nothing disagrees it is fine-tuning."""

from __future__ import annotations

import torch
from torch import nn

from spolia.core.gradients import dot, gradients, norm
from spolia.methods.continual.agem import AGem, AGemLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.parts.memory import Memory


def test_no_step_goes_against_the_reference(stream, network) -> None:
    """All of the memory is the reference, so that its gradient is known."""
    memory, bent = Memory(12), 0
    memory.add(**dict(zip("xy", stream.experiences[0].draw(12, 0, 0), strict=True)))
    learner = AGemLearner(network(), AGem(lr=0.1, replay=12), memory=memory)
    learner.begin(stream.experiences[1])
    learner.remember = lambda batch, logits: None  # the reference stays
    held = memory.all()
    for step in range(12):
        batch = stream.experiences[1].draw(8, 0, step)
        reference = gradients(nn.functional.cross_entropy(learner.network(held["x"]), held["y"]), learner.parameters)
        own = gradients(nn.functional.cross_entropy(learner.network(batch.x), batch.y), learner.parameters)
        before = learner.copies()
        learner.observe(batch)
        taken = [(a - b) / 0.1 for a, b in zip(before, learner.copies(), strict=True)]
        bent += bool(dot(own, reference) < 0)
        assert dot(taken, reference) > -1e-12 * norm(taken) * norm(reference)  # fp64
        if dot(own, reference) >= 0:
            assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(taken, own, strict=True))
    assert bent > 0


def test_in_the_first_experience_it_is_fine_tuning(stream, network) -> None:
    learners = AGemLearner(network(), AGem(lr=0.1)), FinetuneLearner(network(), Finetune(lr=0.1))
    for learner in learners:
        learner.begin(stream.experiences[0])
        for step in range(4):
            learner.observe(stream.experiences[0].draw(8, 0, step))
    assert all(torch.equal(p, q) for p, q in zip(learners[0].parameters, learners[1].parameters, strict=True))
