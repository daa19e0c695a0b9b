"""TSV-Merge: keep each task's strongest singular directions and turn them away from each other before adding.

For experts of one base, as many as you like, whose changes share directions. Gargiulo et al., Task Singular Vectors,
CVPR 2025, arXiv 2412.00081. For every weight matrix:

    tau_k ~ U_k S_k V_k^T, the first r = floor(min(o, i) / K) triples;   U = [U_1 .. U_K],  V = [V_1 .. V_K]
    tau = U (U^T U)^(-1/2)  diag(S_1 .. S_K)  ((V^T V)^(-1/2)) V^T;      theta = theta_0 + alpha tau

U (U^T U)^(-1/2) is the matrix with orthonormal columns nearest to U. Everything else (vectors, convolutions, `exclude`):
the mean task vector in place of tau.

| paper | here |
|---|---|
| U_k, S_k, V_k^T | `thin_svd` |
| nearest orthonormal matrix | `inverse_root` of the Gram matrix |
| alpha | `settings.scale` |

Data touched: none; the paper tunes alpha on validation data. Departures: triples that are rounding noise (a task of
lower rank than r) are left out before the orthogonalisation, and directions that coincide share their energy, where the
published code completes both arbitrarily; a matrix with fewer rows or columns than experts takes the mean, where the
published code loses its change. The factors are kept thin, so the result is the published one without its zero padding.
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


class Tsv(MatrixMerge):
    """Settings of `tsv`."""

    scale: float = setting(1.0, "alpha, factor of the merged task vector", source="Gargiulo et al. 2025")

    def is_matrix(self, name: str, shape: tuple[int, ...], experts: int) -> bool:
        return super().is_matrix(name, shape, experts) and min(shape) >= experts

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        if not self.is_matrix(name, shape, experts):
            return 0.0
        square = squareness(shape)
        return 2 + self.wide() * (svd_copies(shape) + 1 + square) + 2 * square  # an SVD, the factors, a Gram matrix


def tsv(stack: Stack, settings: Tsv) -> Iterator[tuple[Block, Tensor]]:
    """Merged slices of one tensor."""
    if not settings.is_matrix(stack.name, stack.shape, len(stack.experts)):
        return mean_added(stack, settings.scale)
    rank = min(stack.shape) // len(stack.experts)
    triples = [thin_svd(change, rank) for change in changes(stack, working(stack, settings))]
    return added(stack, whitened(triples), settings.scale)


def whitened(triples: list[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """U (U^T U)^(-1/2) diag(S) (V^T V)^(-1/2) V^T of the concatenated triples [out, in]; empties the list."""
    u = torch.cat([u for u, _, _ in triples], dim=1)
    s = torch.cat([s for _, s, _ in triples])
    vt = torch.cat([vt for _, _, vt in triples])
    triples.clear()
    if not len(s):
        return u.new_zeros(u.shape[0], vt.shape[1])
    left, _ = inverse_root(gram(u))
    right, _ = inverse_root(gram(vt.t()))
    core = ((left * s) @ right).to(u.dtype)  # [K r, K r]
    return u @ core @ vt
