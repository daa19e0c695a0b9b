"""Surgery on real digits as its specification measures it: five experts whose merge has forgotten half of what they know.

Four pre-norm residual blocks of width 96, a projection to 64, a frozen ten-way head on the normalised feature. Pre-trained
on upright digits; fine-tuned turned, inverted, mirrored and upside down. 900 digits train, 400 are shown without labels, 497
judge. Bounds are means over seeds; the margins stand beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from statistics import fmean

import pytest
import torch
from torch import Tensor, nn

from spolia.methods.surgery.deep import Deep, deep
from spolia.methods.surgery.fitting import measure_bias
from spolia.methods.surgery.surgery import Surgery, surgery
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network

SEEDS = 3
SHOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "upright": lambda x: x,
    "turned": lambda x: torch.rot90(x, 1, (1, 2)),
    "inverted": lambda x: -x,
    "mirrored": lambda x: x.flip(2),
    "upside_down": lambda x: torch.rot90(x, 2, (1, 2)),
}
Numbers = dict[str, float]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(96), nn.Linear(96, 96), nn.Linear(96, 96)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.blocks, self.out = (
            nn.Linear(64, 96),
            nn.ModuleList(Block() for _ in range(4)),
            nn.Linear(96, 64),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


class Head(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(nn.functional.normalize(torch.randn(10, 64), dim=1))

    def forward(self, z: Tensor) -> Tensor:
        return 10 * nn.functional.normalize(z, dim=-1) @ self.weight.T


def fit(encoder: nn.Module, head: nn.Module, x: Tensor, y: Tensor, steps: int, lr: float) -> None:
    optimizer = torch.optim.Adam(encoder.parameters(), lr=lr)
    for _ in range(steps):
        rows = torch.randint(len(y), (64,))
        loss = nn.functional.cross_entropy(head(encoder(x[rows])), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def measured(seed: int) -> tuple[Numbers, Numbers]:
    """Accuracy in per cent, mean over tasks, and relative bias of the last feature on test inputs, for every repair."""
    from sklearn.datasets import load_digits

    torch.manual_seed(seed)
    bunch = load_digits()
    order = torch.randperm(len(bunch.target))
    images, labels = torch.tensor(bunch.images).float()[order] / 8 - 1, torch.tensor(bunch.target)[order]
    shown = {task: show(images).flatten(1) for task, show in SHOWN.items()}
    head = Head().requires_grad_(False)
    base = Encoder()
    fit(base, head, shown["upright"][:900], labels[:900], 400, 1e-3)
    experts = {}
    for task, x in shown.items():
        expert = Encoder()
        expert.load_state_dict(base.state_dict())
        fit(expert, head, x[:900], labels[:900], 300, 1e-3)
        experts[task] = expert.state_dict()
    merged = {name: torch.stack([e[name] for e in experts.values()]).mean(0) for name in base.state_dict()}
    network = Network(base, dict.fromkeys(SHOWN, head))
    pool = ExpertPool.of(experts)
    unlabelled = {task: x[900:1300] for task, x in shown.items()}
    test = {task: x[1300:] for task, x in shown.items()}

    def percent(logits: Callable[[str, Tensor], Tensor]) -> float:
        with torch.no_grad():
            shares = [(logits(t, x).argmax(1) == labels[1300:]).float().mean() for t, x in test.items()]
        return 100 * float(torch.stack(shares).mean())

    accuracy = {
        "experts": percent(lambda t, x: network.logits(t, x, experts[t])),
        "merged": percent(lambda t, x: network.logits(t, x, merged)),
    }
    bias: Numbers = {}
    fits = {
        "v1": (surgery, Surgery(steps=200)),
        "v1 closed": (surgery, Surgery(solver="closed_form")),
        "v2": (deep, Deep(steps=200)),
        "v2 closed": (deep, Deep(solver="closed_form")),
    }
    for name, (function, settings) in fits.items():
        model = function(merged, pool, network, unlabelled, settings, seed=seed)
        accuracy[name] = percent(lambda t, x, model=model: model(x, t))
        ends = [rows[-1] for rows in measure_bias(model, pool, test).values()]
        bias[name] = fmean(row["relative_after"] for row in ends)
        bias["merged"] = fmean(row["relative_before"] for row in ends)
    return accuracy, bias


@pytest.fixture(scope="module")
def found() -> list[tuple[Numbers, Numbers]]:
    with torch.random.fork_rng(devices=[]):
        return [measured(seed) for seed in range(SEEDS)]


@pytest.mark.slow
def test_surgery_gives_back_what_merging_took(found: list[tuple[Numbers, Numbers]]) -> None:
    # Over three seeds: experts 97, merged 46 to 51, v1 82 to 87, v1 closed 93 to 95, v2 96 to 97, v2 closed 96 to 97
    mean = {name: fmean(accuracy[name] for accuracy, _ in found) for name in found[0][0]}
    assert mean["experts"] > 95 and mean["merged"] < 60
    assert mean["v1"] >= mean["merged"] + 15
    assert mean["v2"] >= mean["v1"] + 5
    assert mean["v1 closed"] >= 90
    assert mean["v2 closed"] >= 95 and mean["v2 closed"] >= mean["v1 closed"] + 1
    assert mean["v2 closed"] <= mean["experts"] + 0.5  # it imitates them and cannot do better but by chance


@pytest.mark.slow
def test_the_bias_falls_with_every_step_of_repair(found: list[tuple[Numbers, Numbers]]) -> None:
    # In every seed 0.8 merged, 0.42 to 0.46 v1, 0.31 v1 closed, 0.16 v2, 0.14 v2 closed: each gap is a third or more
    for _, bias in found:
        assert max(bias["v2"], bias["v2 closed"]) < 0.8 * min(bias["v1"], bias["v1 closed"])
        assert max(bias["v1"], bias["v1 closed"]) < 0.8 * bias["merged"]
