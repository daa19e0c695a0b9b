"""What goes around a learner: it has the four verbs too, and hands on what it does not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from spolia.core import kept

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.methods.continual.learner import Learner
    from spolia.parts.stream import Batch, Experience


class Around:
    """Around a Learner, or around something that is around one."""

    def __init__(self, host: Learner | Around):
        self.host = host

    @property
    def inner(self) -> Learner:
        """The learner in the middle."""
        return self.host.inner if isinstance(self.host, Around) else self.host

    @property
    def network(self) -> nn.Module:
        return self.inner.network

    @property
    def optimizer(self) -> Any:
        return self.inner.optimizer

    @property
    def held(self) -> int:
        return self.host.held

    def begin(self, experience: Experience) -> None:
        self.host.begin(experience)

    def observe(self, batch: Batch) -> Tensor:
        loss, logits = self.loss(batch)
        self.descend(loss)
        self.remember(batch, logits.detach())
        return loss.detach()

    def end(self, experience: Experience) -> None:
        self.host.end(experience)

    def predict(self, x: Any) -> Tensor:
        return self.host.predict(x)

    def loss(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.host.loss(batch)

    def descend(self, loss: Tensor) -> None:
        self.host.descend(loss)

    def remember(self, batch: Batch, logits: Tensor) -> None:
        self.host.remember(batch, logits)

    def kept(self) -> dict[str, Any]:
        return {"host": self.host}

    def state_dict(self) -> dict[str, Any]:
        return {name: kept.capture(name, value) for name, value in self.kept().items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, value in self.kept().items():
            kept.restore(name, value, state[name])
