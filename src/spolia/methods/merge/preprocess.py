"""Preprocessing: what is done to the task vectors of all experts before another merge adds, or learns to add, them.

A step leaves each expert its own vector. Steps stand in a row, each surveying what the one before it leaves.

| name | what it does to the task vectors | paper |
|---|---|---|
| ties | keeps the largest magnitudes, elects signs, zeroes what has another | Yadav et al. 2023, arXiv 2306.01708 |
| awd | takes out of each what all share | Xiong et al. 2024, arXiv 2411.18729 |

With `task_arithmetic` behind it `ties` is the sum of the TIES paper's code as AdaMerging has it, `awd` the method `awd`;
with `adamerging` behind it `ties` is AdaMerging++. Data touched: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, Literal

from pydantic import field_validator

from spolia.core.settings import PerModel, Settings, setting
from spolia.core.stream import Block, Stack
from spolia.methods.merge import awd, sparsify
from spolia.parts.preprocessed import Step

if TYPE_CHECKING:
    from torch import Tensor

_YADAV = "Yadav et al. 2023"


class Trimming(Settings):
    """Settings of `ties` as a preprocessing."""

    density: PerModel = setting(0.2, "share of each task vector that is kept", source=_YADAV, unit="0 to 1")
    scope: Literal["model", "tensor", "row"] = setting("model", "what one threshold is taken over", source=_YADAV)
    zero_sign: Literal["majority", "+"] = setting(
        "majority", "sign where the votes cancel: that of most elements of the model, or plus", source=_YADAV
    )

    @field_validator("density")
    @classmethod
    def _share(cls, value: PerModel) -> PerModel:
        if not all(0 <= v <= 1 for v in ((value,) if isinstance(value, int | float) else value)):
            raise ValueError("must lie in 0..1")
        return value

    @property
    def elementwise(self) -> bool:
        return self.scope == "model"

    @property
    def whole_rows(self) -> bool:
        return self.scope == "row"

    def as_merge(self) -> sparsify.Ties:
        """The method's settings that mean the same."""
        return sparsify.Ties(density=self.density, scope=self.scope, zero_sign=self.zero_sign)


STEPS: dict[str, type[Settings]] = {"ties": Trimming, "awd": awd.Disentangling}


def step_of(name: str, settings: Settings) -> Step:
    """The preprocessing called `name`."""
    if name == "ties":
        return Step(name, settings, _survey, _trimmed)
    assert name == "awd"
    return Step(name, settings, awd.survey, awd.remainders)


def _survey(model: Any, settings: Trimming) -> Any:
    return sparsify.survey(model, settings.as_merge())


def _trimmed(stack: Stack, settings: Trimming, found: Any) -> Iterator[tuple[Block, Tensor]]:
    return sparsify.separated(stack, settings.as_merge(), found)
