"""er_ace: which logits the new samples compete with."""

from __future__ import annotations

import torch
from torch import nn

from spolia.methods.continual.er_ace import ErAce, ErAceLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.parts.stream import Batch


def test_old_classes_outside_the_batch_get_no_push(stream, network) -> None:
    """Classes 0, 1, 2 seen, 2 and 3 in the batch, 4 and 5 never: the new term moves the logits of 2 to 5."""
    learner = ErAceLearner(network(), ErAce(items=12, replay=5, weight=0.0))
    learner.seen[:], learner.active["now"] = [0, 1, 2], True
    x = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    loss, logits = learner.loss(Batch(x, torch.tensor([2, 3, 3, 2])))
    (slope,) = torch.autograd.grad(loss, logits)
    assert (slope != 0).any(0).tolist() == [False, False, True, True, True, True]
    wanted = nn.functional.cross_entropy(logits[:, 2:], torch.tensor([0, 1, 1, 0]))
    torch.testing.assert_close(loss, wanted, rtol=1e-13, atol=0)


def test_the_first_experience_is_fine_tuning(stream, network) -> None:
    first = stream.experiences[0]
    learners = ErAceLearner(network(), ErAce(items=12, replay=5)), FinetuneLearner(network(), Finetune())
    for learner in learners:
        learner.begin(first)
        for step in range(4):
            learner.observe(first.draw(8, 0, step))
    assert all(torch.equal(p, q) for p, q in zip(learners[0].parameters, learners[1].parameters, strict=True))


def test_without_boundaries_it_replays_at_once(stream, network) -> None:
    only = stream.without_boundaries().experiences[0]
    learner = ErAceLearner(network(), ErAce(items=12, replay=5))
    learner.begin(only)
    assert learner.active["now"]
