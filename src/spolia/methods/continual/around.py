"""What goes around a learner: it has the four verbs too, and hands on what it does not change."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from pydantic import ValidationError, ValidationInfo, field_validator

from spolia.catalog import find
from spolia.core import kept
from spolia.core.settings import Settings, setting
from spolia.errors import did_you_mean
from spolia.methods.continual.learner import OURS

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.methods.continual.learner import Learner
    from spolia.parts.stream import Batch, Experience


Hosts = Literal["finetune", "er", "er_ace", "der", "derpp", "agem", "ewc", "si", "mas", "lwf", "icarl", "unified"]


class Hosted(Settings):
    """Settings of what goes around a learner. Recipes and `spolia.continual` make the host; a Learner is given its own."""

    host: Hosts = setting("finetune", "learner that it goes around, where none is handed in", source=OURS)
    host_settings: dict[str, Any] = setting(
        {}, "settings of that learner; those not named have its defaults", source=OURS, validate_default=True
    )

    @field_validator("host_settings")
    @classmethod
    def _whole(cls, value: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        """All settings of the host, so that a run's recipe says them."""
        if info.data.get("host") is None:  # told already
            return value
        kind = find(info.data["host"]).settings_class()
        for name in value.keys() - kind.model_fields.keys():
            what = f"`{name}` is no setting of {info.data['host']}; {did_you_mean(name, kind.model_fields)}"
            raise ValueError(f"host_settings: {what}")
        try:
            return kind(**value).model_dump(mode="json")
        except ValidationError as error:
            (first, *_) = error.errors(include_url=False)
            raise ValueError(f"host_settings: {'.'.join(map(str, first['loc']))}: {first['msg']}") from None

    def hosted(self) -> Any:
        """The host's settings."""
        return find(self.host).settings_class()(**self.host_settings)


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
