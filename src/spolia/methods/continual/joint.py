"""Joint: train on everything that has come so far, as if nothing had to be given back. The upper bound of every table.

For whoever wants to know what a stream costs against having it all: multi-task learning, Caruana 1997,
doi:10.1023/A:1007379606734.

    theta <- theta - lr grad CE(f(x), y),    (x, y) of the union of experiences 0 … t

Data touched: all experiences up to the one at hand, again and again; the signature says so: it takes the stream.

Departures: tables usually train a new network on everything at the end. Here training goes on through the stream and takes
t + 1 steps where others take one, so that experience t makes as many passes over the union as others make over their own
data and every row of the accuracy matrix has its bound.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.methods.continual.learner import Learner, Model, Training
from spolia.parts.stream import Batch

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.stream import Experience, Stream


class Joint(Training):
    """Settings of `JointLearner`."""


class JointLearner(Learner):
    """Its batches are drawn from `stream`; of those it is shown only the size counts."""

    def __init__(self, model: nn.Module | Model, settings: Joint, *, stream: Stream, seed: int = 0):
        super().__init__(model, settings, seed=seed)
        self.stream, self.at = stream, {"experience": -1, "drawn": 0, "epoch": 0}

    def begin(self, experience: Experience) -> None:
        super().begin(experience)
        self.at.update(experience=experience.place, drawn=0)

    def observe(self, batch: Batch) -> Tensor:
        losses = [super(JointLearner, self).observe(batch) for _ in range(self.at["experience"] + 1)]
        return torch.stack(losses).mean()

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return super().loss(self._drawn(len(batch.y)))

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"at": self.at}

    def _drawn(self, count: int) -> Batch:
        """The next `count` of the union: all of it once, in an order of its own, then again."""
        past = self.stream.experiences[: self.at["experience"] + 1]
        ends = np.cumsum([len(e.train) for e in past])
        total, start = int(ends[-1]), self.at["drawn"]
        count = min(count, total)
        places = (np.arange(start, start + count)) % total
        epochs = np.arange(start, start + count) // total
        names = ("joint", len(past), 0)
        orders = {e: generator(self.seed, *names, e).permutation(total) for e in np.unique(epochs).tolist()}
        chosen = np.array([orders[e][p] for e, p in zip(epochs.tolist(), places.tolist(), strict=True)])
        self.at["drawn"] += count
        parts = []
        for t, experience in enumerate(past):
            low = int(ends[t - 1]) if t else 0
            own = chosen[(chosen >= low) & (chosen < ends[t])] - low
            if own.size:
                parts.append(experience.batch(own))
        return Batch(torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts]))
