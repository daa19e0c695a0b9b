"""joint: the union of what has come, all of it once before anything again."""

from __future__ import annotations

import torch

from spolia.methods.continual.joint import Joint, JointLearner


def test_an_epoch_over_the_union(stream, network) -> None:
    learner = JointLearner(network(), Joint(), stream=stream)
    for t, experience in enumerate(stream.experiences):
        learner.begin(experience)
        total = sum(len(e.train) for e in stream.experiences[: t + 1])
        drawn = torch.cat([learner._drawn(8).x for _ in range(total // 8)])
        union = torch.cat([e.batch(slice(None)).x for e in stream.experiences[: t + 1]])
        assert sorted(drawn.sum(1).tolist()) == sorted(union.sum(1).tolist())


def test_its_first_experience_is_of_that_alone(stream, network) -> None:
    learner = JointLearner(network(), Joint(), stream=stream)
    learner.begin(stream.experiences[0])
    assert set(learner._drawn(24).y.tolist()) == {0, 1}


def test_it_takes_a_step_for_every_experience_so_far(stream, network) -> None:
    learner, steps = JointLearner(network(), Joint(), stream=stream), []
    learner.step = lambda shared=False: steps.append(shared)
    for experience in stream.experiences:
        learner.begin(experience)
        learner.observe(experience.draw(8, 0, 0))
    assert len(steps) == 1 + 2 + 3
