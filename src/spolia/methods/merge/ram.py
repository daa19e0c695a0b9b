"""RAM: changes that one expert alone made are kept whole, shared ones are averaged. For sparse changes, as from RL.

Yuan et al., Behavior knowledge merge in reinforced agentic models, 2026, arXiv 2601.13572.

    active    |tau_k[p]| > epsilon;   n[p] experts are active at p
    ram       theta = theta_0 + sum_k [active] tau_k / max(n, 1)
    ramplus   where n[p] = 1, tau_k counts 1 + r clip(rho_k, 0, alpha) times, to make up for the averaging elsewhere;
              rho_k = active elements it shares with others / active elements of its own

| paper | here | | paper | here |
|---|---|---|---|---|
| epsilon | `settings.epsilon` | | r | `settings.boost` |
| rho_k over the model | `settings.scope` | | alpha | `settings.cap` |

mergekit's `ramplus_tl` takes rho_k from each tensor alone (`scope: tensor`); it is the same method otherwise. A model
with no elements of its own has nothing to boost. ram: one read; ramplus: two. Data touched: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor

_KIT = "Goddard et al. 2024, code"


class Ram(MergeSettings):
    """Settings of `ram`."""

    vectors: ClassVar[bool] = True
    boosts: ClassVar[bool] = False

    epsilon: float = setting(
        1e-5, "changes up to this count as none", source="Yuan et al. 2026", unit="of weights", ge=0
    )

    @property
    def elementwise(self) -> bool:
        return True


class RamPlus(Ram):
    """Settings of `ramplus`."""

    boosts: ClassVar[bool] = True

    boost: float = setting(0.1, "r, how much a share of 1 adds to what is an expert's own", source=_KIT)
    cap: float = setting(0.2, "alpha, largest share that counts", source=_KIT, ge=0)
    scope: Literal["model", "tensor"] = setting("model", "what elements are counted over", source="Yuan et al. 2026")

    @property
    def elementwise(self) -> bool:
        return self.scope == "model"


def survey(model: Any, settings: Ram) -> Tensor | None:
    """Counts of each expert's shared and own elements over the whole model, [2, experts]; None where none are needed."""
    if not isinstance(settings, RamPlus) or settings.scope != "model":
        return None
    total = torch.zeros(2, len(model.sizes), dtype=torch.int64)
    for places, counts in model.each(lambda stack: (stack.places, _counts(stack, settings.epsilon))).values():
        total[:, places] += counts
    return total


def ram(stack: Stack, settings: Ram, survey: Tensor | None = None) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each. `survey` holds the counts over the model where the scope asks for them."""
    factor = None
    if isinstance(settings, RamPlus):
        counts = _counts(stack, settings.epsilon) if survey is None else survey[:, stack.places]
        shared, own = counts.double()
        ratio = (shared / own.clamp(min=1)).clamp(max=settings.cap)
        factor = (1 + settings.boost * ratio).to(stack.dtype).unsqueeze(1)  # [experts, 1]
    for block in stack.blocks():
        changes = torch.nn.functional.hardshrink(block.deltas(), settings.epsilon)
        active = _active(changes).sum(0)
        mix = changes.sum(0).div_(active.clamp(min=1))
        if factor is not None:
            mix = torch.where(active == 1, changes.mul_(factor).sum(0), mix)
        assert block.base is not None
        yield block, block.base.add_(mix)


def _counts(stack: Stack, epsilon: float) -> Tensor:
    """How many active elements each expert shares with others, and how many are its own: int64 [2, experts]."""
    total = torch.zeros(2, len(stack.experts), dtype=torch.int64)
    for block in stack.blocks():
        active = _active(torch.nn.functional.hardshrink(block.deltas(), epsilon))
        every = active.sum(1)
        alone = active.mul_((2 - active.sum(0)).clamp_(min=0)).sum(1)  # 2 - n is 1 where n = 1, else it does not count
        total += torch.stack([every - alone, alone]).long()
    return total


def _active(changes: Tensor) -> Tensor:
    """1 where an element is not 0, else 0: fp32 [experts, n]. Faster than masks, and sums of a block are exact."""
    return changes.sign().abs_()
