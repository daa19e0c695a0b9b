"""A small stream and networks for the tests of learners, in fp64 so that equal means equal."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spolia.parts.stream import Stream, class_incremental

Grids = Callable[[int], nn.Module]


def blobs(each: int, seed: int) -> tuple[Tensor, Tensor]:
    """Six classes around centres of their own [6 each, 5], fp64."""
    draws = torch.Generator().manual_seed(seed)
    centres = 2 * torch.randn(6, 5, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    y = torch.arange(6).repeat(each)
    return centres[y] + torch.randn(len(y), 5, generator=draws, dtype=torch.float64), y


@pytest.fixture(scope="session")
def stream() -> Stream:
    """Three tasks of two classes, 24 examples each."""
    return class_incremental(blobs(12, 0), blobs(5, 1), tasks=3)


@pytest.fixture(scope="session")
def network() -> Callable[..., nn.Module]:
    """network(seed) -> a fresh one: the same seed, the same weights."""

    def make(seed: int = 0) -> nn.Module:
        draws = torch.Generator().manual_seed(seed)
        made = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        for p in made.parameters():
            p.data = 0.5 * torch.randn(p.shape, generator=draws, dtype=torch.float64)
        return made

    return make


@pytest.fixture(scope="session")
def led() -> Callable[..., list[list[Tensor]]]:
    """led(learner, stream, steps, batch) -> its weights after every step of every experience."""

    def lead(learner, stream: Stream, steps: int = 6, batch: int = 8) -> list[list[Tensor]]:
        trail = []
        for experience in stream.experiences:
            learner.begin(experience)
            for step in range(steps):
                learner.observe(experience.draw(batch, 0, step))
                trail.append([p.detach().clone() for p in learner.network.parameters()])
            learner.end(experience)
            trail.append([p.detach().clone() for p in learner.network.parameters()])
        return trail

    return lead


@pytest.fixture(scope="session")
def apart() -> Callable[..., float]:
    """apart(one trail, other) -> the largest difference of any weight at any step."""

    def gap(one: list[list[Tensor]], other: list[list[Tensor]]) -> float:
        assert len(one) == len(other)
        pairs = ((a, b) for first, second in zip(one, other, strict=True) for a, b in zip(first, second, strict=True))
        return max(float((a - b).abs().max()) for a, b in pairs)

    return gap
