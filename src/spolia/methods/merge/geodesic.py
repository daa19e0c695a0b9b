"""Merging along great circles: two models at chosen weights, or the middle of many, for whom slerp has too few places.

| method | does | source |
|---|---|---|
| nuslerp | slerp at t = w_2/(w_1 + w_2); one angle for the tensor, or for each row or column | Shoemake 1985 |
| multislerp | direction of the weighted mean of the directions, at the weighted mean of the norms | Buss & Fillmore 2001 |
| karcher | direction nearest to all by summed squared angle, at the weighted mean of the norms | Buss & Fillmore 2001 |

Shoemake, SIGGRAPH 1985, doi:10.1145/325165.325242. Buss & Fillmore, Spherical averages, ACM Transactions on Graphics
2001, doi:10.1145/502122.502124. The names are those of Goddard et al., Arcee's MergeKit, 2024, arXiv 2403.13257.

    u_k = x_k / |x_k|;   x_k = theta_k, or theta_k - theta_0 where a base is given (then theta_0 is added in the end)
    nuslerp:     sin((1-t) W)/sin W * x_1 + sin(t W)/sin W * x_2,   cos W = <u_1, u_2>
    multislerp:  m / |m| * sum_k w_k |x_k|,                         m = sum_k w_k u_k
    karcher:     u * sum_k w_k |x_k|,                               u <- exp_u(sum_k w_k log_u u_k) until it rests

| formula | here |
|---|---|
| w_k | `settings.weight`; shares of the sum where `normalize` |
| one W for | `settings.scope` |
| eps, tol | `settings.eps`, `settings.tol` |

Every result is a combination of the x_k, so all is decided on their K x K inner products, in fp64: two reads, and the
iterations of karcher cost nothing. mergekit's multislerp also maps its u_k to the tangent plane at m/|m| and back; their
mean there is m - |m| m/|m| = 0, so the step is left out. Departures: tensors without any change (all x_k = 0) are merged
where mergekit stops; a point opposite to karcher's u, which has no log, is passed over. Data touched: none.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import model_validator

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import Block, Stack
from spolia.errors import SpoliaError
from spolia.methods.merge.gram import combine, combine_rows, gram, row_grams, vectors

if TYPE_CHECKING:
    from torch import Tensor

_BUSS, _KIT = "Buss & Fillmore 2001", "Goddard et al. 2024, code"
_LEAST_NORM = 1e-7  # shorter vectors are divided by this: their direction is noise
_LEAST_SINE = 1e-8  # below it the arc is a straight line to fp64


class NuSlerp(MergeSettings):
    """Settings of `nuslerp`."""

    base: ClassVar[str] = "optional"
    experts: ClassVar[tuple[int, int | None]] = (2, 2)

    weight: PerModel = setting(1.0, "t is the second's share of both; they may sum to anything", source="midpoint")
    scope: Literal["tensor", "row", "column"] = setting(
        "tensor", "one angle for each: tensor, row (last dimension) or column (first dimension)", source=_KIT
    )

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        return 10 / shape[0] if self.scope == "column" and len(shape) > 1 else 0.0  # five fp64 numbers a column


class _Mean(MergeSettings):
    weight: PerModel = setting(1.0, "share of each expert", source=f"{_BUSS}: equal shares")

    @model_validator(mode="after")
    def _has_a_sum(self) -> _Mean:
        given = (self.weight,) if isinstance(self.weight, int | float) else self.weight
        if getattr(self, "normalize", True) and abs(sum(given)) < 1e-8:
            raise ValueError("the weights sum to zero, and are divided by their sum")
        return self


class MultiSlerp(_Mean):
    """Settings of `multislerp`."""

    base: ClassVar[str] = "optional"
    experts: ClassVar[tuple[int, int | None]] = (2, None)

    normalize: bool = setting(True, "divide the weights by their sum", source=_BUSS)
    eps: float = setting(1e-8, "added to norms; a mean direction shorter than this is none", source=_KIT, gt=0)


class Karcher(_Mean):
    """Settings of `karcher`."""

    base: ClassVar[str] = "unused"

    max_iter: int = setting(100, "most iterations", source="a handful suffices; they are cheap", ge=0)
    tol: float = setting(1e-7, "smallest step, angle and norm that counts", source="what fp64 products resolve", gt=0)


def nuslerp(stack: Stack, settings: NuSlerp) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each. A tensor that only one expert has is copied."""
    if len(stack.experts) == 1:
        yield from combine(stack, torch.ones(1))
        return
    first, second = each(settings.weight, 2)
    t = second / (first + second) if abs(first + second) >= 1e-6 else 0.5
    if settings.scope == "tensor" or len(stack.shape) < 2:
        yield from combine(stack, _arc(gram(stack), t))
    elif settings.scope == "row":
        for block in stack.blocks(whole_rows=True):
            rows = vectors(block).view(2, -1, stack.row)
            yield block, combine_rows(block, rows, _arc(row_grams(rows), t))
    else:
        yield from _by_columns(stack, t)


def multislerp(stack: Stack, settings: MultiSlerp) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each. SpoliaError where the directions of more than two cancel."""
    weight = torch.tensor(each(settings.weight, len(stack.experts)), dtype=torch.float64)
    if settings.normalize:
        weight /= weight.sum()
    products = gram(stack)
    norms = products.diagonal().sqrt()
    toward = weight / (norms + settings.eps)
    length = _norm(toward, products)
    if len(weight) == 1:
        shares = torch.ones_like(weight)
    elif not length <= max(settings.eps, _LEAST_NORM):  # or it is NaN, which the result then shows
        shares = toward / length * (weight @ norms)
    elif len(weight) == 2 or not bool(norms.any()):
        shares = weight  # opposite directions, or nothing but zeros: the straight line
    else:
        raise SpoliaError("the experts' directions cancel", where=stack.name, mend="change a weight, or use `karcher`")
    yield from combine(stack, shares)


def karcher(stack: Stack, settings: Karcher) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    weight = torch.tensor(each(settings.weight, len(stack.experts)), dtype=torch.float64)
    weight /= weight.sum()
    products = gram(stack)
    norms = products.diagonal().sqrt()
    long = (norms > settings.tol).nonzero().squeeze(1)  # others have a norm, but no direction
    if len(weight) > 1 and len(long):
        part = norms[long]
        middle = _middle(products[long][:, long] / torch.outer(part, part), weight[long], settings)
        mean_norm = weight @ norms
        weight = torch.zeros_like(weight)
        weight[long] = middle / part * mean_norm
    yield from combine(stack, weight)


def _arc(products: Tensor, t: float) -> Tensor:
    """Shares of both ends, from their inner products [..., 2, 2]: fp64 [..., 2]. Zero stands at a right angle to all."""
    norms = products.diagonal(dim1=-2, dim2=-1).sqrt().clamp(min=_LEAST_NORM)
    angle = (products[..., 0, 1] / norms.prod(-1)).clamp(-1, 1).acos()
    sine = angle.sin()
    ends = torch.stack([((1 - t) * angle).sin(), (t * angle).sin()], -1) / sine.clamp(min=_LEAST_SINE).unsqueeze(-1)
    line = torch.tensor([1 - t, t], dtype=torch.float64)
    return torch.where((sine < _LEAST_SINE).unsqueeze(-1), line, ends)


def _by_columns(stack: Stack, t: float) -> Iterator[tuple[Block, Tensor]]:
    """One angle for each position behind the first dimension. Columns are summed up over the whole tensor first."""
    columns = stack.numel // stack.shape[0]
    sums = torch.zeros(3, columns, dtype=torch.float64)  # <x1, x1>, <x1, x2>, <x2, x2>
    for block in stack.blocks():
        wide = vectors(block).double()
        place = torch.arange(block.start, block.stop) % columns
        for row, (a, b) in enumerate(((0, 0), (0, 1), (1, 1))):
            sums[row].index_add_(0, place, wide[a] * wide[b])
    shares = _arc(sums[[0, 1, 1, 2]].t().reshape(columns, 2, 2), t).t().to(stack.dtype)
    for block in stack.blocks():
        mix = vectors(block).mul_(shares[:, torch.arange(block.start, block.stop) % columns]).sum(0)
        yield block, mix if block.base is None else mix.add_(block.base)


def _middle(cosines: Tensor, weight: Tensor, settings: Karcher) -> Tensor:
    """Karcher mean of unit vectors with these inner products [k, k], as coefficients [k] of them."""
    weight = weight / weight.sum()
    length = _norm(weight, cosines)
    if length < settings.tol:  # no middle in sight: start at the first
        u = torch.zeros_like(weight)
        u[0] = 1.0
    else:
        u = weight / length
    for _ in range(settings.max_iter):
        cosine = (cosines @ u).clamp(-1, 1)
        angle = cosine.acos()
        pull = torch.where(angle.sin() < settings.tol, 0.0, weight * angle / angle.sin().clamp(min=settings.tol))
        step = pull - (pull @ cosine) * u  # sum_k w_k log_u(u_k)
        length = _norm(step, cosines)
        if length < settings.tol:
            break
        u = math.cos(length) * u + math.sin(length) / length * step
        u = u / _norm(u, cosines)
    return u


def _norm(coefficients: Tensor, products: Tensor) -> float:
    return math.sqrt(max(float(coefficients @ products @ coefficients), 0.0))
