"""Models of a step from one group of unlike models: who is met, embedded, grouped, and drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spolia.core.grouping import grouped, within
from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.datafree.embedding import cka, similarity, task_vectors

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.methods.datafree.embedding import Embed

SAMPLE = 60  # recovered images of a model that its embedding is made of


class Grouped:
    """Selection by groups. First every model is met, by chance; then the whole pool is embedded and parted.

    A step's group is drawn by size, so that every model is as likely as any other, and its models without repetition.
    `groups`, `dissimilarity` [n, n] and `gain` (mean within groups less that of random groups) tell what was found.
    """

    def __init__(
        self, pool: Any, settings: Any, seed: int, *, probe: nn.Module | None = None, embed: Embed | None = None
    ):
        if settings.embedding == "probe" and probe is None:
            mend = "give a network, or take embedding=student, which needs none"
            raise SpoliaError("no probe is given", where="embedding", mend=mend)
        self.pool, self.settings, self.seed = pool, settings, seed
        self._probe, self._embed = probe, embed
        self.groups: list[list[int]] = []
        self.dissimilarity = torch.zeros(0, 0, dtype=torch.float64)
        self.chance = 0.0
        self.since = 0  # step of the last grouping
        self.samples: dict[int, tuple[Tensor, Tensor]] = {}

    @property
    def gain(self) -> float:
        """Mean dissimilarity within the groups, above that of random groups of the same number."""
        return within(self.dissimilarity, self.groups) - self.chance if self.groups else 0.0

    def due(self, step: int) -> bool:
        return step % self.settings.every == 0

    def choose(self, step: int, count: int) -> list[int]:
        draws = generator(self.seed, "grouped", step)
        unmet = [place for place in range(len(self.pool)) if place not in self.samples]
        if unmet:
            met = [place for place in range(len(self.pool)) if place in self.samples]
            order = [*draws.permutation(unmet).tolist(), *draws.permutation(met).tolist()]
            return order[: min(count, len(order))]
        sizes = np.array([len(group) for group in self.groups])
        group = self.groups[int(draws.choice(len(sizes), p=sizes / sizes.sum()))]
        return draws.choice(group, min(count, len(group)), replace=False).tolist()

    def feedback(self, step: int, found: Any, learner: Any, store: Any, episodes: Any) -> None:
        """Keep some of what was recovered; part the pool once all of it was met, and again every `regroup` steps."""
        for one in found:
            self.samples[one.expert] = _some(one.images, one.labels)
        old = not self.groups or (self.settings.regroup and step - self.since >= self.settings.regroup)
        if len(self.samples) == len(self.pool) and found and old:
            self._part(step, learner)

    def state_dict(self) -> dict[str, Any]:
        samples = {place: [x, y] for place, (x, y) in self.samples.items()}
        own = {"groups": self.groups, "dissimilarity": self.dissimilarity, "chance": self.chance, "since": self.since}
        return own | {"samples": samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.groups, self.dissimilarity = [list(group) for group in state["groups"]], state["dissimilarity"]
        self.chance, self.since = state["chance"], state["since"]
        self.samples = {place: (x, y) for place, (x, y) in state["samples"].items()}

    def _part(self, step: int, learner: Any) -> None:
        self.dissimilarity, self.since = 1 - self._similarity(learner), step
        count = max(1, min(self.settings.groups, len(self.pool) // 2))
        way = self.settings.grouping
        self.groups = grouped(self.dissimilarity, count, way, generator(self.seed, "groups", step))
        random = [
            within(self.dissimilarity, grouped(self.dissimilarity, count, "random", generator(self.seed, "chance", i)))
            for i in range(20)
        ]
        self.chance = float(np.mean(random))

    def _similarity(self, learner: Any) -> Tensor:
        shown = [self.samples[place] for place in range(len(self.pool))]
        tasks = [(x.float() / 255, y) for x, y in shown]
        if self.settings.embedding == "cka":
            batch = torch.cat([x[:: max(1, len(x) // 8)] for x, _ in tasks])
            with torch.no_grad():
                return cka([one.logits(one.module(), batch).float() for one in self.pool])
        if self.settings.embedding == "probe":
            assert self._probe is not None
            return similarity(task_vectors(self._probe, tasks, self._embed))
        return similarity(task_vectors(learner.network, tasks, learner.embed))


def _some(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """At most SAMPLE of a model's images as uint8, evenly over its classes, and their labels."""
    at = torch.linspace(0, len(images) - 1, min(SAMPLE, len(images))).round().long()
    return (images[at].detach().clamp(0, 1) * 255).round().to(torch.uint8), labels[at]
