"""icarl: exemplars by herding and their prefixes, exact class means, and the binary loss."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.errors import SpoliaError
from spolia.methods.continual.icarl import ICarl, ICarlLearner
from spolia.parts.memory import herded


def through(learner, stream, count: int) -> None:
    for experience in stream.experiences[:count]:
        learner.begin(experience)
        for step in range(3):
            learner.observe(experience.draw(8, 0, step))
        learner.end(experience)


def test_classes_share_the_memory_and_shrinking_keeps_prefixes(stream, network) -> None:
    learner = ICarlLearner(network(), ICarl(items=13, replay=4))
    through(learner, stream, 1)
    assert torch.bincount(learner.memory.all()["y"]).tolist() == [6, 6]
    before = {c: learner.memory.all()["x"][learner.memory.all()["y"] == c].clone() for c in (0, 1)}
    own = stream.experiences[0].batch(slice(None))
    features = learner._normal(own.x[own.y == 1])
    assert torch.equal(before[1], own.x[own.y == 1][herded(features, 6)])
    second = stream.experiences[1]
    learner.begin(second)
    learner.end(second)
    assert torch.bincount(learner.memory.all()["y"]).tolist() == [3, 3, 3, 3]
    for c, kept in before.items():
        assert torch.equal(learner.memory.all()["x"][learner.memory.all()["y"] == c], kept[:3])


def test_the_answer_is_the_nearest_exact_mean(stream, network) -> None:
    learner = ICarlLearner(network(), ICarl(items=13, replay=4))
    through(learner, stream, 2)
    x = stream.tests[0].examples.batch(slice(None)).x

    def phi(x):
        return nn.functional.normalize(learner.network[1](learner.network[0](x)), dim=1).detach()

    held = learner.memory.all()
    means = torch.stack([phi(held["x"][held["y"] == c]).mean(0) for c in range(4)])
    gaps = torch.cdist(phi(x), nn.functional.normalize(means, dim=1))
    assert torch.equal(learner.predict(x).argmax(1), gaps.argmin(1))
    assert (learner.predict(x)[:, 4:] < -1e30).all()


def test_the_loss_by_hand(stream, network) -> None:
    learner, old = ICarlLearner(network(), ICarl(items=12, replay=99)), network()
    batch = stream.experiences[1].draw(8, 0, 0)
    learner.known[:] = [0, 1]
    for p in learner.parameters:
        p.data += 0.1
    loss, logits = learner.loss(batch)
    targets = nn.functional.one_hot(batch.y, 6).double()
    targets[:, :2] = old(batch.x).detach().sigmoid()[:, :2]
    torch.testing.assert_close(loss, nn.functional.binary_cross_entropy_with_logits(logits, targets))


def test_features_are_the_users(stream, network) -> None:
    learner = ICarlLearner(network(), ICarl(items=12, replay=4), features=lambda module, x: x)
    through(learner, stream, 1)
    assert learner.means["of"].shape == (6, 5)
    plain = ICarlLearner(nn.Conv1d(1, 1, 1).double(), ICarl())
    with pytest.raises(SpoliaError, match="no linear layer"):
        plain._normal(torch.zeros(2, 1, 1, dtype=torch.float64))
