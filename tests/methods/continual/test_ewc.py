"""ewc: its proximal step in closed form, its limits, its Fisher over experiences, and the warning of an explicit step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.errors import SpoliaError, SpoliaWarning
from spolia.methods.continual.anchored import information
from spolia.methods.continual.ewc import Ewc, EwcLearner
from spolia.methods.continual.finetune import Finetune, FinetuneLearner


def after_one(learner, stream):
    first, second = stream.experiences[:2]
    learner.begin(first)
    for step in range(4):
        learner.observe(first.draw(8, 0, step))
    learner.end(first)
    learner.begin(second)
    return second.draw(8, 0, 0)


def test_the_proximal_step_is_its_closed_form(stream, network) -> None:
    """theta <- (theta - lr g + 2 lr lambda F theta*) / (1 + 2 lr lambda F)."""
    learner = EwcLearner(network(), Ewc(lr=0.2, strength=7.0))
    batch = after_one(learner, stream)
    learner.observe(batch)  # away from theta*
    before, importance, anchors = learner.copies(), learner.importance, learner.anchors
    loss = nn.functional.cross_entropy(learner.network(batch.x), batch.y)
    slopes = torch.autograd.grad(loss, learner.parameters)
    learner.observe(batch)
    for p, theta, g, f, anchor in zip(learner.parameters, before, slopes, importance, anchors, strict=True):
        s = 2 * 0.2 * 7.0 * f
        torch.testing.assert_close(p.detach(), (theta - 0.2 * g + s * anchor) / (1 + s), rtol=0, atol=1e-13)  # fp64


def test_explicit_and_proximal_steps_meet_as_the_rate_falls(stream, network) -> None:
    """Their difference is of second order in the rate: a tenth of it, a hundredth of the gap."""
    gaps = []
    for lr in (1e-2, 1e-3):
        moves = []
        for proximal in (True, False):
            learner = EwcLearner(network(), Ewc(lr=0.2, strength=7.0, proximal=proximal))
            batch = after_one(learner, stream)
            for p, anchor in zip(learner.parameters, learner.anchors, strict=True):
                p.data = anchor + 0.1
            learner.optimizer.param_groups[0]["lr"] = lr
            learner.observe(batch)
            moves.append(learner.copies())
        gaps.append(max(float((a - b).abs().max()) for a, b in zip(*moves, strict=True)))
    assert 50 < gaps[0] / gaps[1] < 200


def test_no_strength_is_fine_tuning_and_endless_strength_stands_still(stream, network, led, apart) -> None:
    loose = led(EwcLearner(network(), Ewc(lr=0.1, strength=0.0)), stream)
    assert apart(loose, led(FinetuneLearner(network(), Finetune(lr=0.1)), stream)) < 1e-12
    learner = EwcLearner(network(), Ewc(lr=0.1, strength=1e12))
    batch = after_one(learner, stream)
    learner.observe(batch)
    for p, anchor, f in zip(learner.parameters, learner.anchors, learner.importance, strict=True):
        assert ((p - anchor).abs() * (f > 1e-6)).max() < 1e-5


def test_fishers_add_up_with_decay(stream, network) -> None:
    learner, found = EwcLearner(network(), Ewc(decay=0.5)), []
    for experience in stream.experiences[:2]:
        learner.begin(experience)
        learner.observe(experience.draw(8, 0, 0))
        found.append(information(learner, experience, "true", None))
        learner.end(experience)
    for f, first, second in zip(learner.importance, *found, strict=True):
        torch.testing.assert_close(f, 0.5 * first + second)


def test_the_true_fisher_needs_no_labels_and_a_sampled_one_comes_near(stream, network) -> None:
    learner, experience = EwcLearner(network(), Ewc()), stream.experiences[0]
    true, sampled = (information(learner, experience, kind, None) for kind in ("auto", "sampled"))
    sizes = [sum(float(f.sum()) for f in found) for found in (true, sampled)]
    assert 0.3 < sizes[1] / sizes[0] < 3  # 24 labels drawn: the trace of one example varies by its own size


def test_an_explicit_step_that_diverges_is_said(stream, network) -> None:
    learner = EwcLearner(network(), Ewc(lr=0.5, strength=1e4, proximal=False))
    with pytest.warns(SpoliaWarning, match="diverges"):
        after_one(learner, stream)
    with pytest.raises(SpoliaError, match="plain SGD"):
        EwcLearner(network(), Ewc(momentum=0.9, proximal=True))
