"""Recovered images by class: a bounded store that remembers which expert each came from, and the episodes drawn from it.

    store = ImageStore(classes=20, shape=(3, 32, 32), per_class=400)
    store.add(images, keys, expert=3, step=17)         # fp32 in 0 … 1; kept as uint8, the oldest of a class go first
    store.evict(3)                                     # what a distrusted expert left
    episodes = StoreEpisodes(store, ways=5, shots=1, queries=15, seed=0)
    episodes.draw(4, step)                             # as parts/episode gives them

Everything is in `state_dict`, so that a resumed run draws the same episodes. Episode i follows from the seed, i, and what is
in the store.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.parts.episode import Episodes

if TYPE_CHECKING:
    from torch import Tensor

Tasks = Literal["auto", "cross", "within"]


class ImageStore:
    """At most `per_class` images of each of `classes` classes. `expert` and `stamp` [classes, per_class] say of each place
    whose image it holds (-1: none) and the step it came in."""

    def __init__(self, classes: int, shape: tuple[int, int, int], per_class: int = 400):
        if per_class < 1:
            raise SpoliaError(f"{per_class} images", where="per_class", mend="keep one of each class at least")
        self.classes, self.shape, self.per_class = classes, tuple(shape), per_class
        self.images: dict[int, Tensor] = {}  # key: uint8 [per_class, c, h, w], made when its first image comes
        self.expert = np.full((classes, per_class), -1, dtype=np.int64)
        self.stamp = np.zeros((classes, per_class), dtype=np.int64)
        self._turn = np.zeros((classes, per_class), dtype=np.int64)  # order of arrival, which tells the oldest
        self._turns = 0

    def __len__(self) -> int:
        return int((self.expert >= 0).sum())

    @property
    def held(self) -> int:
        """Bytes of all images."""
        return len(self) * int(np.prod(self.shape))

    def counts(self) -> np.ndarray:
        """Images of every class [classes]."""
        return (self.expert >= 0).sum(1)

    def add(self, images: Tensor, keys: Tensor, *, expert: int, step: int) -> None:
        """Images [n, c, h, w] in 0 … 1 of classes `keys` [n]. Of a full class the oldest make room."""
        if tuple(images.shape[1:]) != self.shape or len(images) != len(keys):
            what = f"images {list(images.shape)} with {len(keys)} classes for a store of {list(self.shape)}"
            raise SpoliaError(what, where="store", mend="give images of the pool's shape, a class each")
        pixels, classes = quantised(images), keys.cpu().numpy()
        for key in np.unique(classes).tolist():
            rows = np.flatnonzero(classes == key)[-self.per_class :]
            held = self.images.setdefault(key, torch.zeros((self.per_class, *self.shape), dtype=torch.uint8))
            age = np.where(self.expert[key] < 0, -1, self._turn[key])  # empty places first
            slots = np.argsort(age, kind="stable")[: len(rows)]
            held[torch.from_numpy(slots)] = pixels[torch.from_numpy(rows)]
            self.expert[key, slots], self.stamp[key, slots] = expert, step
            self._turn[key, slots] = self._turns + np.arange(len(rows))
            self._turns += len(rows)

    def evict(self, expert: int) -> int:
        """Drop every image of an expert; how many there were."""
        there = self.expert == expert
        self.expert[there] = -1
        return int(there.sum())

    def places(self, key: int, expert: int | None = None, since: int | None = None) -> np.ndarray:
        """Where images of a class lie, in the order they came: all, those of an expert, those since a step."""
        wanted = self.expert[key] >= 0 if expert is None else self.expert[key] == expert
        if since is not None:
            wanted &= self.stamp[key] >= since
        found = np.flatnonzero(wanted)
        return found[np.argsort(self._turn[key, found], kind="stable")]

    def at(self, key: int, places: np.ndarray) -> Tensor:
        """The images at these places, uint8 [n, c, h, w]."""
        held = self.images.get(key, torch.zeros((0, *self.shape), dtype=torch.uint8))
        return held[torch.from_numpy(np.asarray(places, dtype=np.int64))]

    def sheet(self, per_class: int = 8) -> tuple[list[int], Tensor]:
        """The newest images of every class that has some: keys, and uint8 [keys, per_class, c, h, w], black where few."""
        keys = [key for key in sorted(self.images) if (self.expert[key] >= 0).any()]
        found = torch.zeros((len(keys), per_class, *self.shape), dtype=torch.uint8)
        for row, key in enumerate(keys):
            newest = self.places(key)[-per_class:]
            found[row, : len(newest)] = self.at(key, newest)
        return keys, found

    def state_dict(self) -> dict[str, Any]:
        images = {str(key): held[torch.from_numpy(self.expert[key] >= 0)] for key, held in self.images.items()}
        return {"images": images, "expert": self.expert, "stamp": self.stamp, "turn": self._turn, "turns": self._turns}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.expert[...], self.stamp[...], self._turn[...] = state["expert"], state["stamp"], state["turn"]
        self._turns, self.images = state["turns"], {}
        for name, kept in state["images"].items():
            held = torch.zeros((self.per_class, *self.shape), dtype=torch.uint8)
            held[torch.from_numpy(self.expert[int(name)] >= 0)] = kept
            self.images[int(name)] = held


class StoreEpisodes:
    """Episodes of a store's images. `cross`: each class from any experts; `within`: all of one expert's images.

    `auto` is cross where all experts have class lists (`shared`), else within: without names the same class could stand in
    a task twice, under two labels. `latest`: only images of the store's last step.
    """

    def __init__(
        self,
        store: ImageStore,
        *,
        ways: int = 5,
        shots: int = 1,
        queries: int = 15,
        seed: int = 0,
        tasks: Tasks = "auto",
        shared: bool = True,
        latest: bool = False,
    ):
        self.store, self.ways, self.shots, self.queries, self.seed = store, ways, shots, queries, seed
        self.within = tasks == "within" or (tasks == "auto" and not shared)
        self.latest = latest

    @property
    def ready(self) -> bool:
        """Whether there are images enough for an episode."""
        return bool(self._experts()) if self.within else len(self._keys()) >= self.ways

    def draw(self, count: int, step: int) -> Episodes:
        """Episodes step * count … of the list, as stored: uint8."""
        return self.batch(range(step * count, step * count + count))

    def batch(self, numbers: range | list[int]) -> Episodes:
        """The episodes of these numbers. SpoliaError where the store has too few images."""
        experts, keys = (self._experts(), []) if self.within else ({}, self._keys())
        if not (experts if self.within else len(keys) >= self.ways):
            asked = f"{self.ways} ways of {self.shots + self.queries} images"
            mend = "recover more images first, or ask for fewer shots and queries"
            raise SpoliaError(f"the store holds too few images for {asked}", where="episodes", mend=mend)
        parts = [self._one(generator(self.seed, "stored", int(n)), experts, keys) for n in numbers]
        images, classes, sets = (list(column) for column in zip(*parts, strict=True))
        blocks = torch.stack(images)  # [tasks, ways, shots + queries, c, h, w]
        support, query = blocks[:, :, : self.shots].flatten(1, 2), blocks[:, :, self.shots :].flatten(1, 2)
        labels = torch.arange(self.ways)
        y, z = (labels.repeat_interleave(k).expand(len(parts), -1) for k in (self.shots, self.queries))
        made = torch.tensor(np.array(classes)), torch.tensor(sets)
        return Episodes(support, y, query, z, *made, tuple(map(int, numbers)))

    def _one(
        self, draws: np.random.Generator, experts: dict[int, list[int]], keys: list[int]
    ) -> tuple[Tensor, np.ndarray, int]:
        """Images [ways, shots + queries, ...], their classes, and the expert of a within-task (-1)."""
        owner = None
        if self.within:
            owner = int(draws.choice(sorted(experts)))
            keys = experts[owner]
        chosen = draws.choice(np.array(keys), self.ways, replace=False)
        images = []
        for key in chosen.tolist():
            there = self.store.places(key, owner, self._since())
            images.append(self.store.at(key, draws.choice(there, self.shots + self.queries, replace=False)))
        return torch.stack(images), chosen, -1 if owner is None else owner

    def _since(self) -> int | None:
        return int(self.store.stamp[self.store.expert >= 0].max(initial=0)) if self.latest else None

    def _there(self) -> np.ndarray:
        """Which places hold an image that may be drawn."""
        there, since = self.store.expert >= 0, self._since()
        return there if since is None else there & (self.store.stamp >= since)

    def _keys(self) -> list[int]:
        """Classes with enough images."""
        there = self._there()
        return np.flatnonzero(there.sum(1) >= self.shots + self.queries).tolist()

    def _experts(self) -> dict[int, list[int]]:
        """Experts with enough classes of their own images, and these classes."""
        there = self._there()
        found = {}
        for expert in np.unique(self.store.expert[there]).tolist():
            own = ((self.store.expert == expert) & there).sum(1)
            keys = np.flatnonzero(own >= self.shots + self.queries).tolist()
            if len(keys) >= self.ways:
                found[expert] = keys
        return found


def quantised(images: Tensor) -> Tensor:
    """0 … 1 as uint8 0 … 255."""
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).cpu()
