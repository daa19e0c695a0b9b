"""KnOTS: turn the changes of several adapters into one shared basis, and merge them there.

For LoRA adapters, whose subspaces rarely meet, so that merging element by element mixes unlike things. Stoica et al.,
Model merging with SVD to tie the KnOTS, ICLR 2025, arXiv 2410.19735. For every adapted matrix:

    [D_1 | .. | D_K] = U [S V_1^T | .. | S V_K^T],   D_k = scale_k B_k A_k
    D = lambda U merge(S V_1^T, .., S V_K^T)

| paper | here |
|---|---|
| U | `SharedBasis.basis` |
| S V_k^T | `SharedBasis.coordinates` |
| merge | `settings.combine`, by the functions of the sparsify family |

Data touched: none. Departure: TIES takes its threshold within each matrix; the published code takes one over the
coordinates of all matrices. The pairs must hold the adapter's scale: D = alpha / r B A, or alpha / sqrt(r) for rsLoRA.
With factors, the SVD is reduced to one of the summed ranks (core/lowrank), exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from spolia.core.checkpoint import storage
from spolia.core.lazy import torch
from spolia.core.lowrank import Factors, SharedBasis, shared_basis, shared_basis_dense
from spolia.core.settings import MergeSettings, PerModel, each, setting
from spolia.core.stream import Stack, TensorPlane
from spolia.methods.merge.sparsify import Dare, DareTies, Sparsified, Ties, sparsified

if TYPE_CHECKING:
    from torch import Tensor

_STOICA = "Stoica et al. 2025, code"


class Knots(MergeSettings):
    """Settings of `knots`."""

    combine: Literal["ties", "dare_ties", "dare", "sum"] = setting(
        "ties", "how the coordinates are merged", source=_STOICA
    )
    density: PerModel = setting(0.2, "share of the coordinates that is kept", source=_STOICA, unit="0 to 1")
    weight: PerModel = setting(1.0, "factor of each adapter", source=_STOICA)
    scale: float = setting(0.6, "lambda, factor of the merged change", source=f"{_STOICA}, ViT-B of rank 16")
    normalize: bool = setting(True, "TIES: mean of what agrees, not sum", source=_STOICA)
    floor: float = setting(1e-5, "singular values up to this one are dropped", source=_STOICA, ge=0)


def knots(factors: Factors, settings: Knots, *, seed: int = 0, name: str = "") -> Tensor:
    """The merged change [out, in] of one matrix, fp64, from pairs B [out, r], A [r, in]. `seed`, `name`: of DARE's coins."""
    return _merged(shared_basis(factors, settings.floor), settings, seed, name)


def knots_dense(changes: Sequence[Tensor], settings: Knots, *, seed: int = 0, name: str = "") -> Tensor:
    """The same from dense changes [out, in], where no factors are known."""
    return _merged(shared_basis_dense(changes, settings.floor), settings, seed, name)


def _merged(shared: SharedBasis, settings: Knots, seed: int, name: str) -> Tensor:
    experts = len(shared.coordinates)
    if settings.combine == "sum":
        weighted = zip(each(settings.weight, experts), shared.coordinates, strict=True)
        mix = torch.stack([w * c for w, c in weighted]).sum(0)
        return shared.basis @ mix.mul_(settings.scale)
    flat = [c.reshape(-1) for c in shared.coordinates]
    zero = torch.zeros_like(flat[0])
    kind = storage(zero)
    stack = Stack(
        name,
        tuple(shared.coordinates[0].shape),
        TensorPlane("basis", kind, zero),
        [TensorPlane(str(k), kind, row) for k, row in enumerate(flat)],
        list(range(experts)),
        seed,
        (0, len(zero)),
    )
    mix = torch.empty_like(zero)
    for block, values in sparsified(stack, _rule(settings)):
        mix[block.start : block.stop] = values
    return shared.basis @ mix.view(stack.shape)


def _rule(settings: Knots) -> Sparsified:
    density, weight, scale = settings.density, settings.weight, settings.scale
    if settings.combine == "ties":
        return Ties(density=density, weight=weight, scale=scale, normalize=settings.normalize, scope="tensor")
    kind = Dare if settings.combine == "dare" else DareTies
    return kind(density=density, weight=weight, scale=scale)
