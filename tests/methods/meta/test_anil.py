from __future__ import annotations

import torch
from torch import nn

from spolia.core.inner import Inner, InnerLoop, Task
from spolia.data.fewshot import digit_classes
from spolia.methods.meta.anil import Anil, anil
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


def test_adapting_moves_the_head_alone():
    learner = anil(network(), episodes(), Anil(steps=3, tasks=4))
    e = episodes(1).episode(0)
    adapted = dict(learner.adapted(e.support_x, e.support_y).named_parameters())
    for name, parameter in learner.network.named_parameters():
        assert torch.equal(parameter, adapted[name]) == (not name.startswith("3."))


def test_it_is_maml_with_a_body_that_does_not_step():
    module, batch = network().double(), episodes().draw(4, 0)
    tasks = [Task.of(e.support_x.double(), e.support_y, e.query_x.double(), e.query_y) for e in batch]
    head = InnerLoop(module, Inner(steps=2, lr=0.4, adapt="head")).gradient(tasks)
    every = InnerLoop(module, Inner(steps=2, lr=0.4))
    rates = {n: r.detach() * n.startswith("3.") for n, r in every.rates().items()}
    whole = every.gradient(tasks, rates=rates)
    for name, slope in head.gradient.items():
        assert torch.allclose(slope, whole.gradient[name], rtol=1e-9, atol=1e-12)  # sums in another order
        assert slope.abs().max() > 0  # the body has a meta-gradient too


def test_an_outer_step_takes_that_gradient():
    module, source = network(), episodes()
    learner = anil(
        module, source, Anil(steps=1, tasks=4, optimizer="sgd", momentum=0, lr=1, inner_steps=2, inner_lr=0.4)
    )
    tasks = [Task.of(e.support_x, e.support_y, e.query_x, e.query_y) for e in source.draw(4, 0)]
    found = InnerLoop(module, Inner(steps=2, lr=0.4, adapt="head")).gradient(tasks)
    for (name, old), new in zip(module.named_parameters(), learner.network.parameters(), strict=True):
        assert torch.allclose(old - new, found.gradient[name], rtol=1e-4, atol=1e-6)  # fp32, vmap against a loop
