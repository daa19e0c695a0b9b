from __future__ import annotations

import torch
from torch import nn

from spolia.core.inner import Inner, InnerLoop, Task
from spolia.data.fewshot import digit_classes
from spolia.methods.meta.boil import Boil, boil
from spolia.parts.episode import EpisodeSampler

WAYS = 3


def network() -> nn.Module:
    draws = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, WAYS))
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return module


def episodes(seed: int = 0) -> EpisodeSampler:
    return EpisodeSampler(digit_classes(), ways=WAYS, shots=2, queries=3, seed=seed)


def test_adapting_moves_the_body_alone():
    learner = boil(network(), episodes(), Boil(steps=3))
    e = episodes(1).episode(0)
    adapted = dict(learner.adapted(e.support_x, e.support_y).named_parameters())
    for name, parameter in learner.network.named_parameters():
        assert torch.equal(parameter, adapted[name]) == name.startswith("3.")


def test_it_is_maml_with_a_head_that_does_not_step_and_the_head_learns_outside():
    module, batch = network().double(), episodes().draw(4, 0)
    tasks = [Task.of(e.support_x.double(), e.support_y, e.query_x.double(), e.query_y) for e in batch]
    body = InnerLoop(module, Inner(steps=2, lr=0.4, adapt="body")).gradient(tasks)
    every = InnerLoop(module, Inner(steps=2, lr=0.4))
    rates = {n: r.detach() * (not n.startswith("3.")) for n, r in every.rates().items()}
    whole = every.gradient(tasks, rates=rates)
    for name, slope in body.gradient.items():
        assert torch.allclose(slope, whole.gradient[name], rtol=1e-9, atol=1e-12)  # sums in another order
    start = network()
    learner = boil(start, episodes(), Boil(steps=1))
    assert not torch.equal(start[3].weight, learner.network[3].weight)
