"""SCE: merge where the models differ most, each weighed by how much it changed there, minority signs erased.

Wan et al., FuseChat: Knowledge fusion of chat models, EMNLP 2025, arXiv 2408.07990.

    select     tau_k[p] = 0 unless the variance of tau_1[p] .. tau_K[p] is among the `density` largest of the tensor
    calculate  w_k = mean(tau_k^2) / sum_i mean(tau_i^2)
    erase      keep tau_k[p] if its sign is that of sum_i tau_i[p]
    theta = theta_0 + sum_k w_k tau_k [kept] / sum_k w_k [kept]

| paper | here |
|---|---|
| tau, the share selected | `settings.density`, of the elements whose variance is not zero |
| eta_k, the merging coefficient | w_k |

Of elements that have the variance at the threshold those of lowest index are kept; a sum that cancels counts as
positive. One expert has no variance: below density 1 nothing of it is kept. mergekit calls changes whose mean squares
sum to less than 1e-6 none, and gives all models equal weight then: `floor` does the same, but is 0 here, since ordinary
fine-tuning changes weights by less. Two reads; three, rarely five, with a selection. Data touched: none.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from spolia.core.lazy import np, torch
from spolia.core.select import Cut, cut_of_nonzero
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack
from spolia.methods.merge.gram import PIECE

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = "Wan et al. 2025"


class Sce(MergeSettings):
    """Settings of `sce`."""

    vectors: ClassVar[bool] = True

    density: float = setting(1.0, "share of elements selected", source="all, as in its code", ge=0, le=1)
    floor: float = setting(
        0.0, "mean squares that sum to less give equal weights; weights that sum to less count as this",
        source=f"{_PAPER}: none", ge=0,
    )  # fmt: skip


def sce(stack: Stack, settings: Sce) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    selected = _selection(stack, settings.density)
    weight = _weights(stack, selected, settings.floor).to(stack.dtype).unsqueeze(1)  # [experts, 1]
    least = max(settings.floor, torch.finfo(stack.dtype).tiny)
    keep = selected()
    for block in stack.blocks():
        deltas = keep(block.deltas())
        sign = torch.copysign(torch.ones((), dtype=stack.dtype), deltas.sum(0))
        agreeing = deltas.mul_(sign).clamp_(min=0)
        mix = (agreeing * weight).sum(0).mul_(sign)
        shares = agreeing.sign_().mul_(weight).sum(0).clamp_(min=least)  # nobody agreed: mix is 0 there
        assert block.base is not None
        yield block, block.base.add_(mix.div_(shares))


def _weights(stack: Stack, selected: Callable[[], Callable[[Tensor], Tensor]], floor: float) -> Tensor:
    """Each model's share of the squared changes: fp64 [experts]."""
    squares, keep = torch.zeros(len(stack.experts), dtype=torch.float64), selected()
    for block in stack.blocks():
        for piece in keep(block.deltas()).split(PIECE, dim=1):
            squares += piece.double().square_().sum(1)
    total = float(squares.sum())
    if total == 0 or total / stack.numel < floor:
        return torch.full_like(squares, 1 / len(squares))
    return squares / total


def _selection(stack: Stack, density: float) -> Callable[[], Callable[[Tensor], Tensor]]:
    """Makes, for each sweep, a `keep` that zeroes task vectors where the models differ little."""
    if density >= 1:
        return lambda: lambda deltas: deltas
    cut = cut_of_nonzero(stack, _variance, density)
    return (lambda: torch.Tensor.zero_) if cut is None else lambda: _above(cut)


def _above(cut: Cut) -> Callable[[Tensor], Tensor]:
    left = cut.quota

    def keep(deltas: Tensor) -> Tensor:
        nonlocal left
        variance = _variance(deltas).numpy()
        kept = variance > cut.value
        if left:
            equal = np.flatnonzero(variance == cut.value)[:left]
            kept[equal] = True
            left -= equal.size
        np.multiply(deltas.numpy(), kept, out=deltas.numpy())  # four times faster than torch's
        return deltas

    return keep


def _variance(deltas: Tensor) -> Tensor:
    """Of each element over the models, [experts, n] -> [n]; exactly 0 where all are equal. Much faster than torch's."""
    apart = deltas - deltas[0]
    return apart.sub_(apart.mean(0)).square_().mean(0)
