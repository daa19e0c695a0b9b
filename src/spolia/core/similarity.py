"""How alike two networks see the same inputs, from their features alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.divergence import wide
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


def linear_cka(a: Tensor, b: Tensor) -> Tensor:
    """Linear centred kernel alignment of features [n, d] and [n, e] of the same inputs: a scalar in 0 … 1.

    |A'B|^2 / (|A'A| |B'B|), columns centred (Kornblith et al. 2019, arXiv 1905.00414). Rotations, scales and shifts of either
    side change nothing; independent features are alike by about (d e)^1/2 / n. Features that do not vary are alike by 0.
    """
    if a.dim() != 2 or b.dim() != 2 or len(a) != len(b):
        what = f"features {list(a.shape)} and {list(b.shape)}"
        raise SpoliaError(what, where="cka", mend="give [n, d] and [n, e], of the same n inputs")
    a, b = (wide(x) - wide(x).mean(0) for x in (a, b))
    if a.shape[1] + b.shape[1] > 2 * len(a):  # by samples: the same numbers, smaller matrices
        k, m = a @ a.T, b @ b.T
        cross, own, other = (k * m).sum(), k.norm(), m.norm()
    else:
        cross, own, other = (a.T @ b).square().sum(), (a.T @ a).norm(), (b.T @ b).norm()
    return cross / (own * other).clamp(min=torch.finfo(a.dtype).tiny)
