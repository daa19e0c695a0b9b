"""NCM: the nearest class mean of a frozen encoder's features. The cheap baseline that every table of prompts has to show.

For few-shot class-incremental streams on a pretrained encoder; SimpleCIL in Zhou et al., Revisiting Class-Incremental Learning
with Pre-Trained Models, 2023, arXiv 2303.07338. With `share` above 0 the calibration of Wang et al., Few-Shot
Class-Incremental Learning via Training-Free Prototype Calibration, NeurIPS 2023, arXiv 2312.05229 (TEEN).

    mu_c = mean over the examples of c of phi(x),    answer = argmax_c cos(phi(x), mu_c)
    from the second experience on   mu_c <- (1 - a) mu_c + a sum_b softmax_b(tau cos(mu_c, mu_b)) mu_b,  b: classes of the first

| paper | here |
|---|---|
| phi | `encoder.plain` |
| a, tau | `settings.share`, `settings.temperature` |

Data touched: each experience once, when it ends; nothing is trained.

Departures: means of features as they are, not of features of length 1, as SimpleCIL has them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

from spolia.core import kept
from spolia.core.settings import Settings, setting
from spolia.methods.continual.learner import OURS, as_floats
from spolia.methods.continual.prototypes import Prototypes, labels_of, over
from spolia.parts.network import moved

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Show, View
    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Batch, Experience


class Ncm(Settings):
    """Settings of `NcmLearner`."""

    share: float = setting(
        0.0, "a, of a new class's mean that comes from like classes; 0: none", source=OURS, ge=0, le=1
    )
    temperature: float = setting(16.0, "tau, how alike those have to be", source="Wang et al. 2023", gt=0)
    lot: int = setting(128, "inputs of a pass", source=OURS, ge=1)


class NcmLearner:
    """`classes`: of the whole stream. `show`: what the encoder sees of stored inputs; training has no view of its own."""

    method: ClassVar[str] = "ncm"
    needs_boundaries: ClassVar[bool] = True
    training_only: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        encoder: Encoder,
        settings: Ncm,
        *,
        classes: int,
        seed: int = 0,
        view: View | None = None,
        show: Show | None = None,
    ):
        self.encoder, self.settings, self.classes = encoder, settings, classes
        self.network = encoder.module
        self.show = show or as_floats
        self.prototypes = Prototypes(classes, encoder.width, encoder.device)
        self.count: dict[str, int] = {"place": -1}

    def begin(self, experience: Experience) -> None:
        self.count["place"] = experience.place

    def observe(self, batch: Batch) -> None:
        """Nothing is learned by steps."""

    def end(self, experience: Experience) -> None:
        part = experience.train
        self.prototypes.learn(over(part, self.settings.lot, self.features), labels_of(part))
        if experience.place:
            self.prototypes.shrink(list(experience.classes), self.settings.share, self.settings.temperature)

    def predict(self, x: Any) -> Tensor:
        """Cosines [n, classes]."""
        return self.prototypes.answers(self.features(x))

    def features(self, x: Any) -> Tensor:
        return self.encoder.plain(self.show(moved(x, self.encoder.device)))

    @property
    def held(self) -> int:
        """Bytes of the prototypes."""
        return sum(t.numel() * t.element_size() for t in self.prototypes.state_dict().values())

    def kept(self) -> dict[str, Any]:
        return {"prototypes": self.prototypes, "count": self.count}

    def state_dict(self) -> dict[str, Any]:
        return {name: kept.capture(name, value) for name, value in self.kept().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.kept().items():
            kept.restore(name, value, state[name])
