"""Exact singular value decompositions of what is given as low-rank factors, without ever forming the large matrix.

Changes B_k A_k with B_k [out, r] and A_k [r, in] (LoRA). A QR decomposition of the tall factors leaves a core of at most
(sum r) x (sum r), whose SVD is that of the whole: no squaring, no digits lost. All of it in fp64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

Factors = Sequence[tuple["Tensor", "Tensor"]]  # B [out, r], A [r, in]; each pair may have a rank of its own


@dataclass(frozen=True)
class SharedBasis:
    """[D_1 | .. | D_K] = U [C_1 | .. | C_K] with orthonormal U: D_k = basis @ coordinates[k]."""

    basis: Tensor  # U [out, q]
    values: Tensor  # singular values of the concatenation [q]
    coordinates: list[Tensor]  # S V_k^T [q, in]


def svd_of_sum(factors: Factors) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, q], S [q], V^T [q, in] of sum_k B_k A_k, q = min(out, in, sum r)."""
    qb, rb = torch.linalg.qr(torch.cat([b.double() for b, _ in factors], dim=1))
    qa, ra = torch.linalg.qr(torch.cat([a.double() for _, a in factors]).t())
    u, s, vt = torch.linalg.svd(rb @ ra.t(), full_matrices=False)
    return qb @ u, s, vt @ qa.t()


def shared_basis(factors: Factors, floor: float = 0.0) -> SharedBasis:
    """The thin SVD of [B_1 A_1 | .. | B_K A_K]; singular values at or below `floor` are dropped."""
    qb, rb = torch.linalg.qr(torch.cat([b.double() for b, _ in factors], dim=1))
    columns, cores, spans, at = [], [], [], 0
    for _, a in factors:
        q, r = torch.linalg.qr(a.double().t())  # A^T = Q R: [in, p], [p, r]
        cores.append(rb[:, at : at + len(a)] @ r.t())
        columns.append(q)
        spans.append(q.shape[1])
        at += len(a)
    u, s, vt = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
    kept = s > floor
    scaled = s[kept].unsqueeze(1) * vt[kept]
    return SharedBasis(
        qb @ u[:, kept],
        s[kept],
        [part @ q.t() for part, q in zip(scaled.split(spans, dim=1), columns, strict=True)],
    )


def shared_basis_dense(changes: Sequence[Tensor], floor: float = 0.0, dtype: torch.dtype | None = None) -> SharedBasis:
    """The same of dense changes [out, in], in `dtype` (None: fp64).

    A QR decomposition, some changes at a time, leaves a triangle with the left singular vectors and values of the
    concatenation, which is never laid out itself.
    """
    kind = dtype or torch.float64
    out, into = changes[0].shape
    together = max(1, out // max(into, 1))
    triangle = torch.empty(0, out, dtype=kind)  # R of [D_1 | .. | D_k]^T: [at most out, out]
    for at in range(0, len(changes), together):
        triangle = torch.cat([triangle, *(change.to(kind).t() for change in changes[at : at + together])])
        if len(triangle) > out:
            triangle = torch.linalg.qr(triangle, mode="r").R
    u, s, _ = torch.linalg.svd(triangle.t(), full_matrices=False)
    kept = s > floor
    basis = u[:, kept]
    return SharedBasis(basis, s[kept], [basis.t() @ change.to(kind) for change in changes])
