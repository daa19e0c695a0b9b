"""The factors of one module of several adapters, merged into one pair: what `merge_adapters` does to each module."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.lowrank import svd_of_sum
from spolia.errors import SpoliaError
from spolia.methods.merge.knots import Knots, merged_pair
from spolia.parts.adapter import Adapter
from spolia.parts.lora import whole

if TYPE_CHECKING:
    from torch import Tensor


def first_with(members: list[Adapter], module: str) -> Adapter:
    """The first that adapts the module."""
    return next(member for member in members if module in member.pairs)


def rank_of(members: list[Adapter], module: str, most: int | None, chosen: Knots | None) -> int:
    """Rank of the merged module. `most`: at most this."""
    total = sum(member.pairs[module].rank for member in members if module in member.pairs)
    if chosen is None and (most is None or total <= most):
        return total  # a concatenation
    a, b = shapes(members, module)
    return min(total, most or total, b[0], math.prod(a[1:]))


def shapes(members: list[Adapter], module: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Of A and B, but for the rank."""
    owner = first_with(members, module)
    return owner.weights.entries[owner.pairs[module].a].shape, owner.weights.entries[owner.pairs[module].b].shape


def merged(
    members: list[Adapter], shares: list[float], chosen: Knots | None, seed: int, module: str, rank: int
) -> tuple[Tensor, Tensor, float]:
    """B and A of the merged module in fp64, of exactly `rank`, and the squared norm that was cut off."""
    a, b = shapes(members, module)
    factors = [
        _scaled(member, module, b[0], math.prod(a[1:]), share if chosen is None else 1.0)
        for share, member in zip(shares, members, strict=True)
    ]
    if chosen is not None:
        factors = [merged_pair(factors, chosen, seed=seed, name=f"{module}.weight")]
    dropped, total = 0.0, sum(len(right) for _, right in factors)
    if rank < total:
        u, s, vt = svd_of_sum(factors)
        root = s[:rank].sqrt()
        left, right, dropped = u[:, :rank] * root, root.unsqueeze(1) * vt[:rank], float(s[rank:].square().sum())
    else:
        empty = rank - total  # directions that were dropped below the rank that the headers promised
        left = torch.nn.functional.pad(torch.cat([left for left, _ in factors], dim=1), (0, empty))
        right = torch.nn.functional.pad(torch.cat([right for _, right in factors]), (0, 0, 0, empty))
    return left.reshape(*left.shape, *b[2:]), right.reshape(len(right), *a[1:]), dropped


def _scaled(member: Adapter, module: str, out: int, into: int, share: float) -> tuple[Tensor, Tensor]:
    """share * scale * B [out, r] and A [r, in] of a module; of rank 0 where the adapter leaves it alone."""
    pair = member.pairs.get(module)
    if pair is None:
        return torch.empty(out, 0, dtype=torch.float64), torch.empty(0, into, dtype=torch.float64)
    a, b = whole(member.weights, pair.a), whole(member.weights, pair.b)
    for name, factor in ((pair.a, a), (pair.b, b)):
        if not bool(torch.isfinite(factor).all()):
            mend = "this adapter is broken: leave it out or get a sound copy"
            raise SpoliaError(f"tensor `{name}` holds NaN or Inf", where=str(member.path), mend=mend)
    return b.flatten(1) * (share * pair.scale), a.flatten(1)


def square(b: Tensor, a: Tensor) -> float:
    """Squared Frobenius norm of B A."""
    b, a = b.flatten(1), a.flatten(1)
    return float(((b.t() @ b) * (a @ a.t())).sum())
