"""A problem that is solved in milliseconds: a small residual network, experts around a base, their merge, random inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network
from spolia.zoo.mlp import ResidualMLP

WIDTH = 8


@dataclass
class Problem:
    merged: dict[str, Tensor]
    pool: ExpertPool
    network: Network
    unlabelled: dict[str, Tensor]

    def __iter__(self):
        return iter((self.merged, self.pool, self.network, self.unlabelled))

    @property
    def tasks(self) -> list[str]:
        return [expert.name for expert in self.pool.experts]


@pytest.fixture(scope="session")
def make_problem() -> Callable[..., Problem]:
    """make_problem(tasks, count, spread, seed, only): experts lie `spread` from the base, `count` inputs a task.

    Every task's expert and inputs are drawn by its own name; `only` leaves the others out and the merge as it is.
    """

    def make(
        tasks: str = "abc", count: int = 48, spread: float = 0.3, seed: int = 0, only: str | None = None
    ) -> Problem:
        def source(*names: object) -> torch.Generator:
            return torch.Generator().manual_seed(hash_of(seed, *names))

        module = ResidualMLP(WIDTH, 2, generator=source("base"))
        base = {name: tensor.clone() for name, tensor in module.state_dict().items()}
        experts = {}
        for task in tasks:
            noise = source("expert", task)
            experts[task] = {n: t + spread * torch.randn(t.shape, generator=noise) for n, t in base.items()}
        merged = {name: torch.stack([e[name] for e in experts.values()]).mean(0) for name in base}
        kept = only or tasks
        heads: dict[str, nn.Module] = {}
        for task in kept:
            heads[task] = nn.Linear(WIDTH, 3)
            with torch.no_grad():
                for parameter in heads[task].parameters():
                    parameter.copy_(torch.randn(parameter.shape, generator=source("head", task)))
        inputs = {task: torch.randn(count, WIDTH, generator=source("inputs", task)) for task in kept}
        return Problem(merged, ExpertPool.of({t: experts[t] for t in kept}), Network(module, heads), inputs)

    return make


def hash_of(*names: object) -> int:
    from spolia.core.seeds import entropy

    return entropy(0, *names) % 2**63
