"""Closed form of a bottleneck: the linear map of rank r that predicts, in the least-squares sense, merged minus expert.

The fast path of `surgery` and `deep`: one pass over the inputs and one solve a site, no steps. Ridge of reduced rank:
Izenman, Reduced-rank regression for the multivariate linear model, 1975, doi:10.1016/0047-259X(75)90042-1.

    A = [Z_m, 1],  B = Z_m - Z_e,  W = (A'A + lambda I)^-1 A'B
    W_r = W Q_r Q_r',   Q_r the leading eigenvectors of B'A W;   z_hat = z - [z, 1] W_r

Only A'A and A'B are kept, so inputs may come in any order and portions, and sums of several machines add up.

| formula | here |
|---|---|
| A'A, A'B | `Gram.aa`, `Gram.ab` |
| lambda | `ridge` times the mean diagonal of A'A |
| Q_r | `up`; W Q_r is `down` with the row of ones in `shift` |

Data touched: what the caller shows it; here merged and expert features of unlabelled inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.bottleneck import Bottleneck


@dataclass
class Gram:
    """Sums over rows z of the merged model and e of the expert, in fp64: a'a [d + 1, d + 1] and a'b [d + 1, d]."""

    aa: Tensor
    ab: Tensor

    @classmethod
    def empty(cls, width: int, device: torch.device | None = None) -> Gram:
        place = torch.device("cpu") if device is not None and device.type == "mps" else device  # it has no fp64
        made = torch.zeros(width + 1, 2 * width + 1, dtype=torch.float64, device=place)
        return cls(made[:, : width + 1], made[:, width + 1 :])

    def add(self, merged: Tensor, expert: Tensor) -> Gram:
        """Counts rows [rows, d] of both."""
        z, e = (rows.to(self.aa.device).double() for rows in (merged, expert))
        a = torch.cat([z, z.new_ones(len(z), 1)], 1)
        self.aa += a.T @ a
        self.ab += a.T @ (z - e)
        return self

    def __add__(self, other: Gram) -> Gram:
        return Gram(self.aa + other.aa, self.ab + other.ab)


def ridge_map(gram: Gram, ridge: float) -> Tensor:
    """W [d + 1, d] of full rank. Directions in which no row varies get nothing where ridge is 0."""
    penalty = ridge * gram.aa.diagonal().mean()
    square = gram.aa + penalty * torch.eye(len(gram.aa), dtype=gram.aa.dtype, device=gram.aa.device)
    factor, failed = torch.linalg.cholesky_ex(square)
    if not failed and ridge > 0:
        return torch.cholesky_solve(gram.ab, factor)
    values, vectors = torch.linalg.eigh(square)
    sound = values > values[-1] * 1e-13  # what fp64 sums leave of a zero
    inverse = torch.where(sound, 1 / torch.where(sound, values, 1.0), 0.0)
    return vectors @ (inverse[:, None] * (vectors.T @ gram.ab))


def solve(gram: Gram, ridge: float, rank: int) -> Bottleneck:
    """The linear bottleneck of `rank` (at most d) that is the optimum of ridge regression among those."""
    from spolia.parts.bottleneck import Bottleneck

    width = gram.ab.shape[1]
    whole = ridge_map(gram, ridge)
    made = Bottleneck(width, min(rank, width), linear=True)
    if rank < width:
        fitted = gram.ab.T @ whole  # W'(A'A + lambda I) W, of the rows that the ridge adds too  [d, d]
        leading = torch.linalg.eigh((fitted + fitted.T) / 2).eigenvectors[:, -rank:].flip(1)  # [d, r]
    else:
        leading = torch.eye(width, dtype=whole.dtype, device=whole.device)
    inner = whole @ leading  # [d + 1, r]
    assert made.shift is not None
    with torch.no_grad():
        made.down.copy_(inner[:-1].T)
        made.shift.copy_(inner[-1])
        made.up.copy_(leading)
    return made
