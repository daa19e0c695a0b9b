"""One model as it is, or scaled: for copies in another type or shard size, and for parts of recipes that stack layers.

As in Goddard et al., Arcee's MergeKit: A toolkit for merging large language models, 2024, arXiv 2403.13257.

    theta = s * theta_1

| formula | here |
|---|---|
| theta_1 | the only expert |
| s | `settings.scale` |

Data touched: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


class Passthrough(MergeSettings):
    """Settings of `passthrough`."""

    base: ClassVar[str] = "unused"
    experts: ClassVar[tuple[int, int | None]] = (1, 1)

    scale: PerModel = setting(1.0, "factor of every weight", source="a plain copy")

    @property
    def elementwise(self) -> bool:
        return True


def passthrough(stack: Stack, settings: Passthrough) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    (scale,) = each(settings.scale, 1)
    for block in stack.blocks():
        yield block, block.experts[0] if scale == 1 else block.experts[0].mul_(scale)
