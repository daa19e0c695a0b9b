"""Prototypes: the mean feature of each class, and the cosine to it as the answer. No class ever moves another's."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.stream import Part


class Prototypes:
    """`means` [classes, width] in fp32; `counts` [classes]: how many examples each is the mean of, 0 where there is none."""

    def __init__(self, classes: int, width: int, device: torch.device):
        self.means = torch.zeros(classes, width, device=device)
        self.counts = torch.zeros(classes, dtype=torch.int64, device=device)

    def __len__(self) -> int:
        """Classes that have one."""
        return int((self.counts > 0).sum())

    def learn(self, features: Tensor, labels: Tensor) -> None:
        """The classes among `labels` [n] get the mean of their `features` [n, width]; all others stay as they are."""
        labels = labels.to(self.means.device)
        for label in labels.unique().tolist():
            own = features[labels == label].float()
            self.means[label], self.counts[label] = own.mean(0), len(own)

    def shrink(self, classes: list[int], share: float, temperature: float) -> None:
        """Means of few examples drawn to those of like old classes, weighted by softmax(cosine * temperature)."""
        new = torch.tensor(classes, device=self.means.device)
        old = (self.counts > 0).nonzero().squeeze(1)
        old = old[~torch.isin(old, new)]
        if share and len(old):
            weights = (temperature * cosines(self.means[new], self.means[old])).softmax(1)  # [new, old]
            self.means[new] = (1 - share) * self.means[new] + share * weights @ self.means[old]

    def answers(self, features: Tensor) -> Tensor:
        """Cosines [n, classes]; the smallest number for classes without a prototype."""
        found = cosines(features.float(), self.means)
        return found.masked_fill(self.counts == 0, torch.finfo(found.dtype).min)

    def state_dict(self) -> dict[str, Tensor]:
        return {"means": self.means, "counts": self.counts}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, tensor in self.state_dict().items():
            tensor.copy_(state[name])


def cosines(one: Tensor, other: Tensor) -> Tensor:
    """[n, d], [m, d] -> [n, m]."""
    return torch.nn.functional.normalize(one, dim=-1) @ torch.nn.functional.normalize(other, dim=-1).mT


def over(part: Part, lot: int, answer: Callable[[Any], Tensor]) -> Tensor:
    """`answer` of all inputs of a part, `lot` at a time."""
    return torch.cat([answer(part.batch(slice(start, start + lot)).x) for start in range(0, len(part), lot)])


def labels_of(part: Part) -> Tensor:
    """[n], without touching inputs."""
    return part.labels[torch.from_numpy(part.places).to(part.labels.device)]
