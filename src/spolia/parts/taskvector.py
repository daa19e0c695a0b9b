"""Task vectors: what fine-tuning changed, as something one can add, subtract, scale and compare."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class TaskVector:
    """Expert minus base, fp32 (fp64 for fp64 models), floating-point tensors only."""

    tensors: dict[str, Tensor]

    @classmethod
    def between(cls, base: Mapping[str, Tensor], expert: Mapping[str, Tensor]) -> TaskVector:
        """`expert - base`; SpoliaError when names or shapes differ."""
        if base.keys() != expert.keys():
            odd = sorted(base.keys() ^ expert.keys())[0]
            raise SpoliaError(f"only one of the two models has tensor `{odd}`", mend="use fine-tunes of one base")
        changes = {}
        for name, start in base.items():
            if start.shape != expert[name].shape:
                raise SpoliaError(
                    f"tensor `{name}` is {list(start.shape)} in the base, {list(expert[name].shape)} in the expert"
                )
            if start.is_floating_point():
                wide = torch.float64 if start.dtype == torch.float64 else torch.float32
                changes[name] = expert[name].to(wide) - start.to(wide)
        return cls(changes)

    def _fits(self, other: TaskVector) -> None:
        """Silently dropping a tensor would give a plausible, wrong number."""
        for name in sorted(self.tensors.keys() ^ other.tensors.keys()):
            raise SpoliaError(f"only one of the two task vectors has tensor `{name}`", mend="use experts of one base")

    def __add__(self, other: TaskVector) -> TaskVector:
        self._fits(other)
        return TaskVector({name: change + other.tensors[name] for name, change in self.tensors.items()})

    def __neg__(self) -> TaskVector:
        return self * -1.0

    def __sub__(self, other: TaskVector) -> TaskVector:
        return self + -other

    def __mul__(self, factor: float) -> TaskVector:
        return TaskVector({name: change * factor for name, change in self.tensors.items()})

    __rmul__ = __mul__

    def dot(self, other: TaskVector) -> float:
        """Inner product over all tensors, summed in fp64."""
        self._fits(other)
        return math.fsum(float((a.double() * other.tensors[name].double()).sum()) for name, a in self.tensors.items())

    @property
    def norm(self) -> float:
        return math.sqrt(self.dot(self))

    def cosine(self, other: TaskVector) -> float:
        """Cosine of the angle between two task vectors; nan when one is zero."""
        length = self.norm * other.norm
        return self.dot(other) / length if length else math.nan

    def apply(self, base: Mapping[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        """`base + scale * self`, in the base's types; nothing given is changed."""
        for name in self.tensors.keys() - base.keys():
            raise SpoliaError(f"the base lacks tensor `{name}`", mend="use the base the task vector was made with")
        return {
            name: (start.to(self.tensors[name].dtype) + scale * self.tensors[name]).to(start.dtype)
            if name in self.tensors
            else start.clone()
            for name, start in base.items()
        }
