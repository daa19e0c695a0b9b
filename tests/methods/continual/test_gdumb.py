"""gdumb: nothing is learned from the stream, and the fit sees the memory alone."""

from __future__ import annotations

import torch

from spolia.methods.continual.gdumb import GDumb, GDumbLearner


def test_nothing_is_learned_before_the_end(stream, network) -> None:
    learner = GDumbLearner(network(), GDumb(items=12, epochs=3))
    learner.begin(stream.experiences[0])
    learner.observe(stream.experiences[0].draw(8, 0, 0))
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters, network().parameters(), strict=True))


def test_the_fit_follows_from_the_memory_and_begins_anew(stream, network) -> None:
    """After more fits the answer is that of one fit on the same memory with the same draws."""
    learner, other = (GDumbLearner(network(), GDumb(items=12, epochs=3)) for _ in range(2))
    for experience in stream.experiences:
        for step in range(3):
            for one in (learner, other):
                one.observe(experience.draw(8, 0, step))
        state = learner.draws.bit_generator.state
        learner.end(experience)
    other.draws.bit_generator.state = state
    other.end(stream.experiences[-1])
    assert torch.bincount(learner.memory.all()["y"]).tolist() == [2] * 6
    assert all(torch.equal(p, q) for p, q in zip(learner.parameters, other.parameters, strict=True))


def test_it_fits_the_memory(stream, network) -> None:
    learner = GDumbLearner(network(), GDumb(items=12, epochs=200, batch=4, lr=0.2))
    for experience in stream.experiences:
        for step in range(3):
            learner.observe(experience.draw(8, 0, step))
    learner.end(stream.experiences[-1])
    held = learner.memory.all()
    assert (learner.predict(held["x"]).argmax(1) == held["y"]).float().mean() > 0.9  # 12 points in 5 dimensions
