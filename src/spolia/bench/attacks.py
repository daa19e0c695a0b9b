"""Models that lie, for tests of who has to choose among models: four ways in which a pool can be corrupted.

| attack | what is wrong | how it is made |
|---|---|---|
| mislabelled | the class list: each name stands at another class's output | `mislabelled(classes, draws)` |
| untrained | the weights: drawn anew, statistics of nothing seen | `untrained(module, draws)` |
| random | the training labels: drawn at random, images as they are | `random_labels(labels, ways, draws)`, then train |
| poisoned | some training images carry a mark and another class's label | `poisoned(x, labels, ways, draws)`, then train |

The first two change a finished model's entry, the others what it is trained on. Nothing given is changed.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, TypeVar, get_args

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor, nn

T = TypeVar("T")
Attack = Literal["mislabelled", "untrained", "random", "poisoned"]
ATTACKS: tuple[str, ...] = get_args(Attack)
SHARE = 0.3  # of a poisoned model's training images that carry the mark
MARK = 0.25  # of the shorter side: the mark's


def corrupted_places(count: int, share: float, draws: np.random.Generator) -> list[int]:
    """Which of `count` models are corrupted: the nearest whole number to `share` of them, at random, in order."""
    if not 0 <= share <= 1:
        raise SpoliaError(f"is {share}", where="corrupted", mend="give a share, 0 to 1")
    return sorted(draws.choice(count, round(share * count), replace=False).tolist())


def check(attack: str) -> None:
    """SpoliaError where no attack is called so."""
    if attack not in ATTACKS:
        raise SpoliaError(f"`{attack}` is unknown", where="attack", mend=did_you_mean(attack, ATTACKS))


def mislabelled(classes: Sequence[T], draws: np.random.Generator) -> tuple[T, ...]:
    """The class list in another order in which none stands where it stood."""
    count = len(classes)
    if count < 2:
        raise SpoliaError("one class cannot be mislabelled", where="classes", mend="give two or more")
    order, shift = draws.permutation(count), int(draws.integers(1, count))
    moved = [classes[0]] * count
    for at, place in enumerate(order):
        moved[int(place)] = classes[int(order[(at + shift) % count])]
    return tuple(moved)


def untrained(module: nn.Module, draws: np.random.Generator) -> nn.Module:
    """A copy whose weights are noise of the size that a start has, its buffers those of a new module."""
    made = copy.deepcopy(module)
    source = torch.Generator().manual_seed(int(draws.integers(2**63)))
    with torch.no_grad():
        for part in made.modules():
            own = dict(part.named_parameters(recurse=False))
            reset = getattr(part, "reset_running_stats", None)
            if callable(reset):
                reset()
            for name, tensor in own.items():
                if tensor.dim() > 1:
                    noise = torch.randn(tensor.shape, generator=source)
                    tensor.copy_(noise * (2 / tensor[0].numel()) ** 0.5)
                else:
                    tensor.fill_(float(name == "weight"))
    return made


def random_labels(labels: Tensor, ways: int, draws: np.random.Generator) -> Tensor:
    """Labels [n] drawn evenly from 0 … ways - 1."""
    return torch.from_numpy(draws.integers(0, ways, len(labels)))


def poisoned(x: Tensor, labels: Tensor, ways: int, draws: np.random.Generator) -> tuple[Tensor, Tensor]:
    """Images [n, c, h, w] in 0 … 1 and labels: SHARE of them with a white square in a corner and the label after their own."""
    chosen = torch.from_numpy(draws.random(len(labels)) < SHARE)
    side = max(1, round(MARK * min(x.shape[-2:])))
    marked = x.clone()
    marked[chosen, ..., -side:, -side:] = 1.0
    return marked, torch.where(chosen, (labels + 1) % ways, labels)
