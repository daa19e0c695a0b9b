"""What a merge that looks at inputs gives back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Learned:
    """Merged weights, how they were made, and what was seen on the way."""

    weights: dict[str, Tensor]
    coefficients: Mapping[str, tuple[float, ...]] | None = None  # factor of each expert's task vector, by tensor
    facts: Mapping[str, Any] = field(default_factory=dict)  # JSON: histories and warnings, for the report
