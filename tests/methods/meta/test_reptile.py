from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import nn

from spolia.bench.fewshot import evaluate
from spolia.core.journal import Interrupted, Journal
from spolia.data.fewshot import digit_classes
from spolia.methods.meta.reptile import Reptile, reptile
from spolia.parts.episode import EpisodeSampler

WAYS = 3


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    draws = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, WAYS)).to(dtype)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return module


def episodes(seed: int = 0) -> EpisodeSampler:
    return EpisodeSampler(digit_classes(), ways=WAYS, shots=2, queries=3, seed=seed)


def plain(**changed) -> Reptile:
    """Outer SGD of a constant size."""
    return Reptile(**({"tasks": 4, "inner_optimizer": "sgd", "schedule": "constant"} | changed))


def test_one_inner_step_is_a_step_of_joint_training():
    module, source = network(), episodes()
    settings = plain(steps=1, inner_steps=1, inner_lr=0.5, lr=0.7, batch=100, joint=False)
    learner = reptile(module, source, settings)
    batch = source.draw(4, 0)
    loss = nn.functional.cross_entropy(module(batch.support_x.flatten(0, 1)), batch.support_y.flatten())
    slopes = torch.autograd.grad(loss, list(module.parameters()))
    for old, new, slope in zip(module.parameters(), learner.network.parameters(), slopes, strict=True):
        assert torch.allclose(old - new, 0.35 * slope, rtol=1e-4, atol=1e-6)  # fp32: a difference of the weights


def test_a_whole_outer_step_lands_on_the_mean_of_the_tasks_ends():
    module, source = network(), episodes()
    learner = reptile(module, source, plain(steps=1, inner_steps=3, inner_lr=0.5, batch=100, joint=False, lr=1))
    ends = []
    for e in source.draw(4, 0):
        one = network()
        optimizer = torch.optim.SGD(one.parameters(), lr=0.5)
        for _ in range(3):
            optimizer.zero_grad()
            nn.functional.cross_entropy(one(e.support_x), e.support_y).backward()
            optimizer.step()
        ends.append(one)
    for i, new in enumerate(learner.network.parameters()):
        mean = sum(list(one.parameters())[i].detach() for one in ends) / 4
        assert torch.allclose(new, mean, atol=1e-5)  # fp32, three steps


def test_minibatches_go_through_all_inputs_before_any_comes_again():
    from spolia.methods.meta.reptile import _task

    e = episodes().episode(0)
    task = _task(e, plain(inner_steps=5, batch=6, joint=True), 0)
    x, y = task.support
    assert x.shape == (1, 5, 6, 1, 8, 8) and y.shape == (1, 5, 6)
    every = torch.cat([e.support_x, e.query_x])  # 15 inputs; 30 are asked for
    counts = [int((x[0].flatten(0, 1) == one).flatten(1).all(1).sum()) for one in every]
    assert counts == [2] * 15


def test_the_outer_step_falls_to_zero():
    moved = reptile(network(), episodes(), plain(steps=10, schedule="linear", inner_lr=0.1)).losses
    assert moved[0] > 0
    flat = reptile(network(), episodes(), plain(steps=1, lr=1e-30))
    assert all(torch.equal(a, b) for a, b in zip(flat.network.parameters(), network().parameters(), strict=True))


def test_a_killed_training_goes_on_to_the_bit(tmp_path):
    train = partial(reptile, network(), episodes(), Reptile(steps=6, tasks=2, inner_steps=2))
    whole = train(Journal(tmp_path / "whole", save_every=0))
    broken = Journal(tmp_path / "broken", save_every=0, progress=lambda *told: told[1] == 3 and broken.request_stop())
    with pytest.raises(Interrupted):
        train(broken)
    again = train(Journal(tmp_path / "broken", save_every=0))
    assert all(torch.equal(t, again.state_dict()[name]) for name, t in whole.state_dict().items())


@pytest.mark.slow
def test_digits_are_told_apart_after_a_short_training():
    train, test = digit_classes().split((0.5, 0.5), 0)
    settings = Reptile(steps=60, inner_lr=1e-2, test_steps=20)
    learner = reptile(network(), EpisodeSampler(train, ways=WAYS, shots=2, queries=5, seed=0), settings)
    judge = EpisodeSampler(test, ways=WAYS, shots=2, queries=5, seed=1)
    assert evaluate(learner.predict, judge, 60, together=20).mean() > 50  # chance is 33
