from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from spolia.data.fewshot import digit_classes
from spolia.errors import SpoliaError
from spolia.methods.meta.unicorn import Unicorn, unicorn
from spolia.parts.episode import Episodes, EpisodeSampler

WAYS = 3


def network() -> nn.Module:
    draws = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.Tanh(), nn.Linear(8, WAYS)).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    return module


class Doubles(EpisodeSampler):
    """Digits in double precision."""

    def draw(self, count: int, step: int) -> Episodes:
        found = super().draw(count, step)
        return replace(found, support_x=found.support_x.double(), query_x=found.query_x.double())


def episodes(seed: int = 0, ways: int = WAYS) -> EpisodeSampler:
    return Doubles(digit_classes(), ways=ways, shots=2, queries=3, seed=seed)


def short(**changed) -> Unicorn:
    return Unicorn(**({"steps": 4, "tasks": 2, "pretrain": 0, "inner_lr": 0.5} | changed))


def test_permuted_labels_permute_the_answers():
    learner = unicorn(network(), episodes(), short())
    e = episodes(1).draw(1, 0)[0]
    plain, moved = (learner.predict(e.support_x, y, e.query_x) for y in (e.support_y, (e.support_y + 1) % WAYS))
    # exact but for the order of sums over classes in fp64, five steps
    assert torch.allclose(plain, moved.roll(-1, 1), rtol=1e-9, atol=1e-12)


def test_all_classes_keep_one_vector_to_the_bit():
    learner = unicorn(network(), episodes(), short(steps=6))
    head = learner.network[3]
    assert torch.equal(head.weight, head.weight[:1].expand_as(head.weight))
    assert torch.equal(head.bias, head.bias[:1].expand_as(head.bias))


@pytest.mark.parametrize("order", [1, 2])
def test_the_vector_gets_the_sum_of_its_copies_gradients(order):
    module, source = network(), episodes()
    base = {"optimizer": "sgd", "momentum": 0, "lr": 1, "head_lr": 1, "weight_decay": 0, "temperature": 1}
    learner = unicorn(module, source, short(steps=1, tasks=3, inner_steps=2, order=order, **base))
    start = {name: p.detach().clone() for name, p in module.named_parameters()}
    start |= {n: start[n].mean(0, keepdim=True) for n in ("3.weight", "3.bias")}
    start = {name: p.requires_grad_() for name, p in start.items()}
    total, entropy = 0.0, nn.functional.cross_entropy
    for e in source.draw(3, 0):
        weights = {n: p.expand(WAYS, *p.shape[1:]) if n.startswith("3.") else p for n, p in start.items()}
        for _ in range(2):
            loss = entropy(torch.func.functional_call(module, weights, (e.support_x,)), e.support_y)
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=order == 2, retain_graph=True)
            weights = {n: w - 0.5 * g for (n, w), g in zip(weights.items(), slopes, strict=True)}
        total = total + entropy(torch.func.functional_call(module, weights, (e.query_x,)), e.query_y) / 3
    found = dict(zip(start, torch.autograd.grad(total, list(start.values())), strict=True))
    for name, new in learner.network.named_parameters():
        assert torch.allclose(
            start[name] - new[: len(start[name])], found[name], rtol=1e-9, atol=1e-12
        )  # order of sums


def test_other_ways_at_test():
    learner = unicorn(network(), episodes(), short())
    e = episodes(1, ways=5).draw(1, 0)[0]
    assert learner.predict(e.support_x, e.support_y, e.query_x).shape == (15, 5)


def test_a_head_that_is_not_linear_is_told():
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, WAYS), nn.LayerNorm(WAYS)).double()
    with pytest.raises(SpoliaError, match="linear head"):
        unicorn(module, episodes(), short())
