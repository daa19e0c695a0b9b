"""iCaRL: a few exemplars of each class, outputs held by a binary distillation, and the nearest class mean as the answer.

For class-incremental streams of classifiers with features. Rebuffi et al., iCaRL: Incremental Classifier and Representation
Learning, CVPR 2017, arXiv 1611.07725.

    L = mean over samples and classes of BCE(f_c(x), t_c),    t_c = sigmoid(f_old,c(x)) for old classes, [y = c] for others
    answer = argmin_c || phi(x) - mu_c ||,    mu_c: mean of the exemplars' features, all of length 1

| paper | here |
|---|---|
| K, m | `settings.items`, and K over the classes seen |
| P_y, herding | `memory` (policy `chosen`): of every class its exemplars in herding order; shrinking keeps the prefix |
| phi | `features`: what the last linear layer is given, unless the user says otherwise |

Data touched: each experience, and once more at its end to choose exemplars; exemplars and one old network stay.

Departures: exemplars come as a replay batch beside each batch instead of one mixed epoch. Means are exact (programs average
batches of unequal size), of normalised features, and made when an experience ends.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any, ClassVar

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.features import before_the_head
from spolia.methods.continual.learner import OURS, TABLES
from spolia.methods.continual.replay import Replay, Replaying
from spolia.parts.memory import Memory, herded

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.methods.continual.features import Features
    from spolia.methods.continual.learner import Model
    from spolia.parts.stream import Batch, Experience


class ICarl(Replay):
    """Settings of `ICarlLearner`."""

    weight_decay: float = setting(1e-5, "of SGD", source=TABLES, ge=0)
    lot: int = setting(256, "inputs of a pass without gradient", source=OURS, ge=1)


class ICarlLearner(Replaying):
    settings: ICarl
    needs_boundaries: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module | Model, settings: ICarl, *, features: Features = before_the_head, seed: int = 0
    ):
        memory = Memory(settings.items, bytes=settings.bytes, policy="chosen", seed=seed)
        super().__init__(model, settings, memory=memory, seed=seed)
        memory.device = self.device
        self.features = features
        self.old = copy.deepcopy(self.network).requires_grad_(False).eval()
        self.known: list[int] = []
        self.means: dict[str, Tensor] = {}

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        stored, labels = [batch.x], batch.y.to(self.device)
        if len(self.memory):
            old = self.memory.draw(self.replay)
            stored, labels = [batch.x, old["x"]], torch.cat([labels, old["y"]])
        x = self.viewed(torch.cat([part.to(self.device) for part in stored]))
        logits = self.logits(x)
        targets = torch.nn.functional.one_hot(labels, logits.shape[1]).to(logits.dtype)
        if self.known:
            with torch.no_grad():
                targets[:, self.known] = self.model.outputs(self.old, x)[:, self.known].sigmoid()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets)
        return loss, logits[: len(batch.y)]

    def remember(self, batch: Batch, logits: Tensor) -> None:
        """Exemplars are chosen at the end."""

    def end(self, experience: Experience) -> None:
        known = {*self.known, *experience.classes}
        share = self.settings.items // len(known)
        if not share:
            what = f"{self.settings.items} samples for {len(known)} classes"
            raise SpoliaError(what, where="items", mend="give at least one a class")
        self._shrink(share)
        labels = experience.train.batch(slice(None)).y
        for label in experience.classes:
            own = experience.batch((labels == label).nonzero().squeeze(1).cpu().numpy())
            order = herded(self._normal(own.x), share)
            self.memory.put(x=own.x[order], y=own.y[order])
        self.known[:] = sorted(known)
        self.old.load_state_dict(self.network.state_dict())
        self._average()

    def predict(self, x: Any) -> Tensor:
        """-|phi(x) - mu_c|^2 [n, classes]; the smallest number for classes without exemplars."""
        if not self.means:
            return super().predict(x)
        gaps = torch.cdist(self._normal(x), self.means["of"]).square()
        missing = self.means["known"] == 0
        return (-gaps).masked_fill(missing, torch.finfo(gaps.dtype).min)

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"old": self.old, "known": self.known, "means": self.means}

    def _shrink(self, share: int) -> None:
        """The first `share` exemplars of every class."""
        if not len(self.memory):
            return
        labels, counts, stay = self.memory.all()["y"].tolist(), dict[int, int](), []
        for place, label in enumerate(labels):
            counts[label] = counts.get(label, 0) + 1
            if counts[label] <= share:
                stay.append(place)
        self.memory.keep(stay)

    def _average(self) -> None:
        held = self.memory.all()
        features, labels = self._normal(held["x"]), held["y"]
        with torch.no_grad(), self.at_rest():
            classes = self.logits(self.shown(held["x"][:1])).shape[1]
        total = features.new_zeros(classes, features.shape[1]).index_add_(0, labels, features)
        counts = torch.bincount(labels, minlength=classes)
        means = torch.nn.functional.normalize(total / counts.clamp(min=1).unsqueeze(1), dim=1)
        self.means.update(of=means, known=counts)

    def _normal(self, x: Any) -> Tensor:
        """Features of length 1 [n, d], as predicting sees the inputs."""
        with torch.no_grad(), self.at_rest():
            parts = [self.features(self.network, self.shown(part)) for part in x.split(self.settings.lot)]
        return torch.nn.functional.normalize(torch.cat(parts), dim=1)
