"""Task vectors changed before a merge sees them: one step put around a stack, and another around that.

A `Step` maps the task vectors of a tensor to others, the experts kept apart. `Changed` is a stack whose blocks are what a
step makes of the blocks before it, so a chain costs one more look at each block and no copy of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spolia.core.settings import narrowed
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Step:
    """A preprocessing. Its settings say, as a merge's do, whether it is `elementwise` or wants `whole_rows`."""

    name: str
    settings: Any
    survey: Callable[[Any, Any], Any]  # (model, settings) -> what is found in the whole model first
    rule: Callable[[Stack, Any, Any], Iterator[tuple[Block, Tensor]]]  # (stack, settings, found) -> [experts, n]

    def to_dict(self) -> dict[str, Any]:
        """As a recipe has it."""
        return {"name": self.name, **self.settings.model_dump(mode="json")}


@dataclass
class _Vectors(Block):
    """A block whose `experts` are task vectors."""

    def deltas(self) -> Tensor:
        return self.experts


@dataclass
class Changed(Stack):
    """A stack after a step. Only what reads it by `Block.deltas` sees the change: the planes are those of the models."""

    before: Stack | None = None
    step: Step | None = None
    found: Any = None

    @classmethod
    def of(cls, stack: Stack, step: Step, found: Any) -> Changed:
        """`stack` with the step around it."""
        return cls(
            stack.name,
            stack.shape,
            stack.base,
            stack.experts,
            stack.places,
            stack.seed,
            stack.span,
            stack.spare_bytes,
            stack.stop,
            stack.block,
            stack.grain,
            before=stack,
            step=step,
            found=found,
        )

    def blocks(self, whole_rows: bool = False) -> Iterator[Block]:
        assert self.before is not None and self.step is not None
        grain = max(self.grain, self.row if whole_rows else 1)
        before = replace(self.before, span=self.span, stop=self.stop, block=self.block, grain=grain)
        for block, vectors in self.step.rule(before, narrowed(self.step.settings, self.places), self.found):
            yield _Vectors(block.start, block.stop, block.base, vectors)

    def sample(self, count: int) -> Tensor | None:
        """None: places far apart cannot be had without what lies between them."""
        return None
