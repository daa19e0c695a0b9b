"""What learners with a memory share: its settings, its filling, and one forward pass for new and old together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.errors import SpoliaError
from spolia.methods.continual.learner import OURS, TABLES, Learner, Model, Training
from spolia.parts.memory import Memory

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.parts.stream import Batch


class Replay(Training):
    """Settings of a memory and of what is drawn from it."""

    items: int = setting(500, "samples that the memory holds", unit="samples", source=TABLES, ge=1)
    bytes: int | None = setting(None, "and no more than fit into this", unit="bytes", source=OURS, ge=1)
    policy: Literal["reservoir", "balanced"] = setting(
        "reservoir", "who stays: every sample alike, or as many of each class", source=TABLES
    )
    replay: int = setting(32, "samples of a draw from the memory", unit="samples", source=TABLES, ge=1)
    joint_forward: bool | None = setting(
        None, "new and old samples in one pass; by default unless batch statistics would mix", source=OURS
    )


class Replaying(Learner):
    """A learner with a memory, filled with the batches as they are stored, not as they are viewed."""

    def __init__(self, model: nn.Module | Model, settings: Replay, *, memory: Memory | None = None, seed: int = 0):
        super().__init__(model, settings, seed=seed)
        if memory is None:
            how = {"bytes": settings.bytes, "policy": settings.policy, "seed": seed, "device": self.device}
            memory = Memory(settings.items, **how)
        self.memory, self.replay = memory, settings.replay
        joint, mixes = settings.joint_forward, has_batch_statistics(self.network)
        if joint and mixes:
            what = "its batch normalisation would mix the statistics of new and old samples"
            raise SpoliaError(what, where="joint_forward", mend="leave joint_forward out, or give false")
        self.joint = not mixes if joint is None else joint

    def together(self, *stored: Any) -> list[Tensor]:
        """Logits of several lots of stored inputs, each viewed anew."""
        if not self.joint or not all(torch.is_tensor(x) for x in stored):
            return [self.logits(self.viewed(x)) for x in stored]
        x = torch.cat([x.to(self.device) for x in stored])
        return list(self.logits(self.viewed(x)).split([len(x) for x in stored]))

    def remember(self, batch: Batch, logits: Tensor) -> None:
        self.memory.add(x=batch.x, y=batch.y)

    def kept(self) -> dict[str, Any]:
        return super().kept() | {"memory": self.memory}


def has_batch_statistics(network: nn.Module) -> bool:
    """Whether a sample's outputs in train mode depend on its batch."""
    return any(isinstance(part, torch.nn.modules.batchnorm._BatchNorm) for part in network.modules())
