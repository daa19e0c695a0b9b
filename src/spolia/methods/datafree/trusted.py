"""Models of a step drawn by how far they are trusted, and what a step tells about that."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.datafree.policy import Policy

if TYPE_CHECKING:
    from torch import Tensor

LEAST = 3  # images of each class that a held-out pseudo-task asks about, where there are as many
MOST = 10
REAL_TASKS = 4  # real episodes of a reward, as in the released code


class Trusted:
    """Selection by a policy. `pool`: as told by keys; `validation`: real episodes, for `reward: real` alone.

    The reward `held_out` asks for each model of the step: do its images, as support, tell apart those that *other* models
    made of the same classes? Where no other model knows two of its classes, its own images are parted in two instead.
    `rewards` holds the mean reward of every update, `evicted` who lost its images, and when.
    """

    def __init__(self, pool: Any, settings: Any, seed: int, *, validation: Any = None):
        if settings.reward == "real" and validation is None:
            mend = "give `validation`, an EpisodeSampler of a few real classes, or take reward=held_out"
            raise SpoliaError("there are no real episodes", where="reward", mend=mend)
        self.pool, self.settings, self.seed = pool, settings, seed
        more = {"lr": settings.policy_lr, "entropy": settings.entropy, "explore": settings.explore}
        self.policy = Policy(len(pool), **more, seed=seed)
        self.rewards: list[float] = []
        self.evicted: dict[int, int] = {}
        self._real = validation

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0

    def choose(self, step: int, count: int) -> list[int]:
        return self.policy.draw(count, step)

    def feedback(self, step: int, found: Any, learner: Any, store: Any, episodes: Any) -> None:
        """Reward the models of the step, and take back the images of those that are no longer trusted."""
        if not found:
            return
        order = [one.expert for one in found]
        if self.settings.reward == "real":
            rewards = [real_reward(learner, self._real, len(self.rewards))]
        else:
            draws = generator(self.seed, "reward", step)
            rewards = [held_out_reward(learner, store, one, self.pool.keys[one.expert], order, draws) for one in found]
        self.policy.tell(order, rewards)
        self.rewards.append(float(np.mean(rewards)))
        if self.settings.evict:
            for place in self.policy.distrusted:
                if store.evict(place):
                    self.evicted[place] = step

    def state_dict(self) -> dict[str, Any]:
        return {"policy": self.policy.state_dict(), "rewards": self.rewards, "evicted": self.evicted}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.policy.load_state_dict(state["policy"])
        self.rewards, self.evicted = list(state["rewards"]), dict(state["evicted"])


def held_out_reward(
    learner: Any, store: Any, found: Any, keys: Sequence[int], now: Sequence[int], draws: np.random.Generator
) -> float:
    """Accuracy, 0 … 1, above chance, of a pseudo-task whose support is what one model made and whose queries others made.

    `keys`: the model's classes; models of this step (`now`) do not judge each other. Chance counts as 0.
    """
    support, query = [], []
    for output, key in enumerate(keys):
        own = found.images[found.labels == output]
        there = np.array([p for p in store.places(key) if store.expert[key, p] not in now], dtype=np.int64)
        if len(there) >= LEAST:
            support.append(own)
            query.append(store.at(key, draws.permutation(there)[:MOST]).to(own.device).float() / 255)
    if len(support) < 2:  # nobody else knows its classes
        halves = [found.images[found.labels == output] for output in range(len(keys))]
        support = [half[: len(half) // 2] for half in halves]
        query = [half[len(half) // 2 :] for half in halves]
    ways = len(support)
    with torch.no_grad():
        logits = learner.logits(learner.weights(), torch.cat(support), _labels(support), torch.cat(query))
    right = float((logits.argmax(1) == _labels(query)).double().mean())
    return (right - 1 / ways) / (1 - 1 / ways)


def real_reward(learner: Any, validation: Any, number: int) -> float:
    """Mean accuracy, 0 … 1, on REAL_TASKS real episodes: the ones of this update."""
    tasks = validation.draw(REAL_TASKS, number).floats()
    right = [
        (learner.predict(t.support_x, t.support_y, t.query_x).argmax(1) == t.query_y).double().mean() for t in tasks
    ]
    return float(torch.stack(right).mean())


def _labels(blocks: Sequence[Tensor]) -> Tensor:
    return torch.cat([torch.full((len(block),), label, device=block.device) for label, block in enumerate(blocks)])
