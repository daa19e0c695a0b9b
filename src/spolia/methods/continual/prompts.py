"""What learners of prompts share: a frozen encoder, parameters beside it, a head or prototypes, and which sessions learn.

The first `sessions` experiences learn prompts by gradient; later ones only give their classes a prototype, the mean feature of
their examples. With one session, as few-shot streams have it, prompts are those of the base classes. With as many as the
stream has, and `answer: head`, learners are as their papers have them.

Every answer is the input's own: what is chosen is chosen for each input from its own features, never for a batch. Programs that
let a batch vote leak the task to the test (75.6 against 65.2 % has been told of one).
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spolia.core.lazy import np, torch
from spolia.core.seeds import generator
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.learner import OURS, Learner, Model, Training
from spolia.methods.continual.prototypes import Prototypes, labels_of, over

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.methods.continual.learner import Factory, Show, View
    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Batch, Experience

PLUS = "Liu et al. 2024, L2P+"
USUAL = 20.0  # readings of a learner that is told no number: those of ASP and CODA-Prompt


class Prompting(Training):
    """Settings of all learners of prompts."""

    optimizer: Literal["adam", "sgd"] = setting("adam", "what takes the steps", source="as the method's paper")
    momentum: float = setting(0.9, "of SGD; adam has its own", source="as the method's paper", ge=0, lt=1)
    fresh: bool = setting(True, "a new optimiser for every experience", source="PILOT's settings")
    falls: Literal["none", "cosine"] = setting("none", "cosine: the rate goes to zero over `readings`", source=OURS)
    readings: float | None = setting(
        None, "of an experience's data until the cosine ends; null: the epochs of the run", source=OURS, gt=0
    )
    sessions: int = setting(
        1, "experiences that learn prompts; those after them only get prototypes", source=PLUS, ge=1
    )
    answer: Literal["prototypes", "head"] = setting("prototypes", "what gives answers after training", source=PLUS)
    lot: int = setting(128, "inputs of a pass without gradient", source=OURS, ge=1)


class PromptLearner(Learner, ABC):
    """`parameters`: what is learned, by name. `classes`: of the whole stream. Children have `prompted` and `loss`."""

    method: ClassVar[str] = ""
    training_only: ClassVar[tuple[str, ...]] = ("head",)  # beginnings of names that answers by prototypes do not need

    def __init__(
        self,
        encoder: Encoder,
        settings: Prompting,
        parameters: dict[str, Tensor],
        *,
        classes: int,
        seed: int = 0,
        view: View | None = None,
        show: Show | None = None,
        optimizer: Factory | None = None,
    ):
        self.encoder, self.classes = encoder, classes
        held = {name: torch.nn.Parameter(tensor.to(encoder.device)) for name, tensor in parameters.items()}
        network = torch.nn.ParameterDict(held)
        super().__init__(Model(network, optimizer, view=view, show=show), settings, seed=seed)
        self.prototypes = Prototypes(classes, encoder.width, encoder.device)
        self.now: list[int] = []  # classes of the experience at hand
        self.count: dict[str, int] = {"place": -1, "seen": 0, "size": 0}

    # --- what children change ----------------------------------------------------------------------------------------

    @abstractmethod
    def prompted(self, x: Any) -> Tensor:
        """Features [n, width] with prompts, of inputs as the encoder takes them; for answers, not for training."""

    def scores(self, features: Tensor) -> Tensor:
        """What the head says [n, classes]."""
        return torch.nn.functional.linear(features, self.learned("head_weight"), self.learned("head_bias"))

    # --- the protocol ------------------------------------------------------------------------------------------------

    def begin(self, experience: Experience) -> None:
        self.count.update(place=experience.place, seen=0, size=len(experience.train))
        self.now[:] = experience.classes
        if self.learning:
            super().begin(experience)

    def observe(self, batch: Batch) -> Any:
        """One step; the loss before it, None in sessions that take none."""
        if not self.learning:
            return None
        if self.settings.falls == "cosine":
            share = min(1.0, self.count["seen"] / ((self.settings.readings or USUAL) * self.count["size"]))
            for group in self.optimizer.param_groups:
                group["lr"] = self.settings.lr * (1 + math.cos(math.pi * share)) / 2
        loss = super().observe(batch)
        self.count["seen"] += len(batch.y)
        return loss

    def end(self, experience: Experience) -> None:
        part = experience.train
        self.prototypes.learn(over(part, self.settings.lot, self.features), labels_of(part))

    def predict(self, x: Any) -> Tensor:
        """Cosines to the prototypes, or the head's scores [n, classes]; the head's too before there is a prototype."""
        features = self.features(x)
        if self.settings.answer == "prototypes" and len(self.prototypes):
            return self.prototypes.answers(features)
        with torch.no_grad():
            return self.scores(features)

    def features(self, x: Any) -> Tensor:
        """Features with prompts [n, width] of stored inputs."""
        with torch.no_grad():
            return self.prompted(self.shown(x))

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"prototypes": self.prototypes, "now": self.now, "count": self.count}

    # --- what they use -----------------------------------------------------------------------------------------------

    @property
    def learning(self) -> bool:
        return 0 <= self.count["place"] < self.settings.sessions

    def learned(self, name: str) -> Tensor:
        """A learned tensor."""
        return self.network.get_parameter(name)

    def own(self, scores: Tensor, labels: Tensor) -> Tensor:
        """Their loss among the classes of the experience at hand."""
        now = torch.tensor(sorted(self.now), device=scores.device)
        return self.criterion(scores.index_select(1, now), torch.searchsorted(now, labels.to(now.device).contiguous()))

    def _optimizer(self) -> Any:
        own = self.settings
        if self.model.optimizer is None and own.optimizer == "adam":
            return torch.optim.Adam(self.parameters, lr=own.lr, weight_decay=own.weight_decay)
        return super()._optimizer()


def head(encoder: Encoder, classes: int, draws: np.random.Generator) -> dict[str, Tensor]:
    """A linear head as torch starts it."""
    bound = 1 / math.sqrt(encoder.width)
    return {
        "head_weight": uniform((classes, encoder.width), bound, draws),
        "head_bias": uniform((classes,), bound, draws),
    }


def uniform(shape: tuple[int, ...], bound: float, draws: np.random.Generator) -> Tensor:
    return torch.from_numpy(draws.uniform(-bound, bound, shape).astype("float32"))


def starts(seed: int, method: str) -> np.random.Generator:
    """Random numbers of a learner's first parameters."""
    return generator(seed, "prompts", method)


def check_blocks(encoder: Encoder, where: str, blocks: tuple[int, ...]) -> None:
    """SpoliaError for blocks that the encoder has not."""
    if blocks and max(blocks) >= encoder.depth:
        mend = f"name blocks below {encoder.depth}, such as [0, {encoder.depth - 1}]"
        raise SpoliaError(f"block {max(blocks)} of an encoder of {encoder.depth}", where=where, mend=mend)
