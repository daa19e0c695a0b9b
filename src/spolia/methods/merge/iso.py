"""Isotropic merging: give every direction of the merged change the same strength, so that no task is drowned.

For experts of one base whose summed changes are dominated by few directions. Marczak et al., No Task Left Behind,
ICML 2025, arXiv 2502.04959. For every weight matrix, with d = min(o, i):

    iso_c     sum_k tau_k = U S V^T;                  tau = mean(S) U V^T
    iso_cts   the first d_c triples of the sum; from each tau_k - U_c U_c^T tau_k the first (d - d_c) / K;
              their U and V side by side, each made orthonormal; tau = mean(all S) U V^T
    theta = theta_0 + alpha tau

Everything else (vectors, convolutions, `exclude`): the mean task vector in place of tau.

| paper | here |
|---|---|
| sigma-bar | mean over all d singular values, zeros included |
| k/r, share of the common space | `settings.common` |
| alpha | `settings.scale` |

Data touched: none; the paper tunes alpha on validation data. Departures: the polar factor U V^T comes from the Gram matrix
of the smaller side, exact to fp32 for directions above 1e-4 of the largest. Directions in which nothing changed stay
unchanged, where an SVD fills them with arbitrary ones; so a change of lower rank than d keeps that rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.core.stream import Block, Stack
from spolia.methods.merge.matrices import (
    MatrixMerge,
    added,
    changes,
    gram,
    inverse_root,
    mean_added,
    squareness,
    svd_copies,
    thin_svd,
    working,
)

if TYPE_CHECKING:
    from torch import Tensor


class IsoC(MatrixMerge):
    """Settings of `iso_c`."""

    scale: float = setting(1.0, "alpha, factor of the merged task vector", source="untuned; Marczak et al. tune it")

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        if not self.is_matrix(name, shape, experts):
            return 0.0
        return 2 + self.wide() * 3 + 8 * squareness(shape)  # the last: a Gram matrix in fp64, its vectors, a workspace


class IsoCts(MatrixMerge):
    """Settings of `iso_cts`."""

    scale: float = setting(1.0, "alpha, factor of the merged task vector", source="untuned; Marczak et al. tune it")
    common: float = setting(
        0.8, "share of the directions that is taken from the summed change", source="Marczak et al. 2025", ge=0, le=1
    )

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        if not self.is_matrix(name, shape, experts):
            return 0.0
        square = squareness(shape)
        return 2 + self.wide() * (svd_copies(shape) + 2 + square) + 3 * square  # an SVD, sum and factors, Gram matrices


def iso_c(stack: Stack, settings: IsoC) -> Iterator[tuple[Block, Tensor]]:
    """Merged slices of one tensor."""
    if not settings.is_matrix(stack.name, stack.shape, len(stack.experts)):
        return mean_added(stack, settings.scale)
    return added(stack, flattened(_total(stack, settings)), settings.scale)


def iso_cts(stack: Stack, settings: IsoCts) -> Iterator[tuple[Block, Tensor]]:
    """Merged slices of one tensor."""
    experts = len(stack.experts)
    if not settings.is_matrix(stack.name, stack.shape, experts):
        return mean_added(stack, settings.scale)
    size, own = shares(min(stack.shape), experts, settings.common)
    common = thin_svd(_total(stack, settings), size)
    triples, u = [common], common[0]
    for change in changes(stack, working(stack, settings)) if own else ():
        norm = float(change.norm())
        change -= u @ (u.t() @ change)
        triples.append(thin_svd(change, own, norm))
    return added(stack, _isotropic(triples, min(stack.shape)), settings.scale)


def shares(directions: int, experts: int, common: float) -> tuple[int, int]:
    """How many directions the common part gets, and how many each task; never more than there are."""
    own = min(round((directions - int(directions * common)) / experts), directions // experts)
    return directions - own * experts, own


def flattened(matrix: Tensor) -> Tensor:
    """mean(S) U V^T of a matrix U S V^T."""
    tall = matrix if matrix.shape[0] >= matrix.shape[1] else matrix.t()
    root, values = inverse_root(gram(tall))
    flat = tall @ root.mul_(values.mean()).to(matrix.dtype)
    return flat if tall is matrix else flat.t()


def _total(stack: Stack, settings: MatrixMerge) -> Tensor:
    total = torch.zeros(stack.shape, dtype=working(stack, settings))
    for change in changes(stack, total.dtype):
        total += change
    return total


def _isotropic(triples: list[tuple[Tensor, Tensor, Tensor]], directions: int) -> Tensor:
    u = torch.cat([u for u, _, _ in triples], dim=1)
    mean = float(torch.cat([s for _, s, _ in triples]).sum(dtype=torch.float64)) / directions
    vt = torch.cat([vt for _, _, vt in triples])
    triples.clear()
    if not len(vt):
        return u.new_zeros(u.shape[0], vt.shape[1])
    left, _ = inverse_root(gram(u))
    right, _ = inverse_root(gram(vt.t()))
    return u @ (left @ right).mul_(mean).to(u.dtype) @ vt
