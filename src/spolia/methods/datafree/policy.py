"""Which models to trust: a score for each, learned by policy gradient from what its images turned out to be worth.

    p = (1 - explore) softmax(w) + explore / N,     the models of a step: Plackett-Luce draws by log p
    w <- Adam ascent on   sum_j A_j log P(i_j | i_1 … i_{j-1}) + entropy H(softmax(w))
    A_j = sum_{l >= j} (R_l - b) / spread,     b and spread: running mean and deviation of R

Hu et al. 2023, arXiv 2311.14756, where one reward is that of all models of a step: given once, as the last of them, it is
here too. A reward a model gives each draw what follows from it alone; both are unbiased. The released code sums the single
draws' log-probabilities though it draws without replacement, has a fixed baseline and no entropy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.plackett_luce import draw
from spolia.core.seeds import generator
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

MEMORY = 0.9  # of the running mean and spread of rewards


class Policy:
    """Scores of `count` models and how they are learned. Draws go by (seed, step): a resumed run has the same."""

    def __init__(self, count: int, *, lr: float = 0.1, entropy: float = 0.01, explore: float = 0.1, seed: int = 0):
        if count < 1 or not 0 <= explore <= 1:
            what = f"{count} models, explore {explore}"
            raise SpoliaError(what, where="policy", mend="one model or more, explore from 0 to 1")
        self.count, self.entropy, self.explore, self.seed = count, entropy, explore, seed
        self.scores = torch.zeros(count, dtype=torch.float64, requires_grad=True)
        self.optimizer = torch.optim.Adam([self.scores], lr=lr)
        self.mean: float | None = None
        self.variance = 0.0
        self.told = 0

    @property
    def probabilities(self) -> Tensor:
        """p [n]: of a single draw."""
        with torch.no_grad():
            return self._probabilities()

    @property
    def distrusted(self) -> list[int]:
        """Models whose softmax share is below a quarter of an even one."""
        share = self.scores.detach().softmax(0)
        return torch.nonzero(share < 1 / (4 * self.count)).flatten().tolist()

    def draw(self, count: int, step: int) -> list[int]:
        """`count` different models, all of them in random order where there are no more."""
        draws = generator(self.seed, "policy", step)
        return draw(self._probabilities().log(), min(count, self.count), draws).tolist()

    def tell(self, order: Sequence[int], rewards: Sequence[float]) -> None:
        """One step of the scores. `order`: as drawn; `rewards`: one a model, or one alone for all of them."""
        given = np.asarray(rewards, dtype=float)
        if len(given) not in (1, len(order)) or not np.isfinite(given).all():
            what = f"{list(rewards)} for {len(order)} models"
            raise SpoliaError(what, where="rewards", mend="give one finite number a model, or one for all")
        advantages = self._advantages(given, len(order))
        with torch.enable_grad():
            p = self._probabilities()
            gain = self.entropy * _entropy(self.scores.softmax(0))
            gain = gain + (torch.from_numpy(advantages) * _each(p.log(), list(order))).sum()
            self.optimizer.zero_grad(set_to_none=True)
            (-gain).backward()
        self.optimizer.step()
        self.told += 1

    def state_dict(self) -> dict[str, Any]:
        return {
            "scores": self.scores.detach(),
            "optimizer": self.optimizer.state_dict(),
            "mean": self.mean,
            "variance": self.variance,
            "told": self.told,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            self.scores.copy_(state["scores"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.mean, self.variance, self.told = state["mean"], state["variance"], state["told"]

    def _probabilities(self) -> Tensor:
        return (1 - self.explore) * self.scores.softmax(0) + self.explore / self.count

    def _advantages(self, rewards: np.ndarray, count: int) -> np.ndarray:
        """A [count]: what each draw is followed by, above what is usual. The first rewards of all set the baseline."""
        if self.mean is None:
            self.mean = float(rewards.mean())
        apart = rewards - self.mean
        self.variance = MEMORY * self.variance + (1 - MEMORY) * float(np.square(apart).mean())
        self.mean = MEMORY * self.mean + (1 - MEMORY) * float(rewards.mean())
        unbiased = self.variance / (1 - MEMORY ** (self.told + 1))
        apart = apart / math.sqrt(unbiased) if unbiased > 0 else apart
        if len(apart) == 1:
            return np.full(count, apart[0])
        return apart[::-1].cumsum()[::-1].copy()


def _each(logs: Tensor, order: list[int]) -> Tensor:
    """log P(i_j | i_1 … i_{j-1}) of every draw [k]."""
    left, found = torch.zeros(len(logs), dtype=torch.bool), []
    for place in order:
        rest = logs.masked_fill(left, -torch.inf)
        found.append(rest[place] - rest.logsumexp(0))
        left = left.clone()
        left[place] = True
    return torch.stack(found)


def _entropy(p: Tensor) -> Tensor:
    return -torch.special.xlogy(p, p).sum()
