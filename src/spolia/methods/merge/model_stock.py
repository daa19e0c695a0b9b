"""Model Stock: how far to trust the average of a few fine-tunes, read off the angle between them. No validation data.

Jang et al., Model Stock: All we need is just a few fine-tuned models, ECCV 2024, arXiv 2403.19522.

    t = N cos(phi) / (1 + (N - 1) cos(phi)),   theta = t * mean_k theta_k + (1 - t) * theta_0

The average lies on the line from theta_0 through the centre of the shell that fine-tunes of one base fill; t is where
the line comes nearest to that centre. Fine-tunes that agree (phi = 0) give the average, those at right angles the base.

| paper | here |
|---|---|
| w_0, w_k | `block.base`, `block.experts` |
| phi | angle between two task vectors; `settings.scope`: of the tensor, or of each row |
| N | number of experts |

The paper takes all pairs to have one angle; here cos(phi) is the mean of the pairs' cosines. Departures: t is kept in
[0, 1] (`clamp`), for a negative cosine would lead away from the experts; mergekit leaves it free and divides by no less
than 1e-6 (`least_product`), which makes small changes look orthogonal. A tensor that only one expert has stays the
base's. Data touched: none.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import Block, Stack
from spolia.methods.merge.gram import combine, combine_rows, gram, row_grams, vectors

if TYPE_CHECKING:
    from torch import Tensor

_PAPER = "Jang et al. 2024"


class ModelStock(MergeSettings):
    """Settings of `model_stock`."""

    experts: ClassVar[tuple[int, int | None]] = (2, None)

    scope: Literal["tensor", "row"] = setting("tensor", "what has one angle and one t", source=f"{_PAPER}: layer-wise")
    clamp: bool = setting(True, "keep t in 0..1", source=f"{_PAPER}: between base and average")
    least_product: float = setting(
        0.0,
        "a cosine is divided by the product of two norms, or by this if larger",
        source=f"{_PAPER}: the angle",
        ge=0,
    )


def model_stock(stack: Stack, settings: ModelStock) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    count = len(stack.experts)
    if settings.scope == "tensor" or len(stack.shape) < 2:
        yield from combine(stack, (_trust(gram(stack), settings) / count).expand(count))
        return
    for block in stack.blocks(whole_rows=True):
        rows = vectors(block).view(count, -1, stack.row)
        shares = (_trust(row_grams(rows), settings) / count).unsqueeze(-1)  # [rows, 1]
        yield block, combine_rows(block, rows, shares.expand(-1, count))


def _trust(products: Tensor, settings: ModelStock) -> Tensor:
    """t from the task vectors' inner products [..., N, N]: fp64 [...]."""
    count = products.shape[-1]
    if count == 1:
        return torch.zeros(products.shape[:-2], dtype=torch.float64)
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt()
    scale = norms.unsqueeze(-1) * norms.unsqueeze(-2)
    floor = max(settings.least_product, torch.finfo(torch.float64).tiny)  # no change at all: cosine 0
    cosines = (products / scale.clamp(min=floor)).clamp(-1, 1)
    pairs = torch.triu_indices(count, count, 1)
    cosine = cosines[..., pairs[0], pairs[1]].mean(-1)
    if settings.clamp:
        cosine = cosine.clamp(min=0)
    return count * cosine / (1 + (count - 1) * cosine)
