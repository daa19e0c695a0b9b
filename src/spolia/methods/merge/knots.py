"""KnOTS: turn the changes of several experts into one shared basis, and merge them there.

For LoRA adapters, whose subspaces rarely meet, so that merging element by element mixes unlike things; full fine-tunes
too. Stoica et al., Model merging with SVD to tie the KnOTS, ICLR 2025, arXiv 2410.19735. For every weight matrix:

    [D_1 | .. | D_K] = U [S V_1^T | .. | S V_K^T],   D_k = theta_k - theta_0, of an adapter scale_k B_k A_k
    theta = theta_0 + lambda U merge(S V_1^T, .., S V_K^T)

Where all experts are adapters on the base, the SVD is reduced to one of the summed ranks, exactly (core/lowrank). Everything
else (vectors, convolutions without factors, `exclude`) is merged by the same rule in its own coordinates.

| paper | here |
|---|---|
| U | `SharedBasis.basis` |
| S V_k^T | `SharedBasis.coordinates` |
| merge | `settings.combine`, by the functions of the sparsify family |
| lambda | `settings.scale` |

Data touched: none. Departures: TIES takes its threshold within each matrix; the published code takes one over the
coordinates of all matrices. Coordinates that rounding alone made are set to zero; there they count as votes. The
published code merges adapters only.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from spolia.core.checkpoint import storage
from spolia.core.lazy import torch
from spolia.core.lowrank import Factors, SharedBasis, shared_basis, shared_basis_dense
from spolia.core.settings import PerModel, setting
from spolia.core.stream import BLOCK, Block, FilePlane, Plane, Stack, TensorPlane
from spolia.methods.merge.matrices import VOCABULARY, MatrixMerge, changes, working
from spolia.methods.merge.sparsify import Dare, DareTies, Sparsified, Ties, sparsified
from spolia.parts.lora import LoraPlane

if TYPE_CHECKING:
    from torch import Tensor

_STOICA = "Stoica et al. 2025, code"


class Knots(MatrixMerge):
    """Settings of `knots`."""

    combine: Literal["ties", "dare_ties", "dare", "linear"] = setting(
        "ties", "how the coordinates are merged", source=_STOICA
    )
    density: PerModel = setting(
        0.2, "share of the coordinates that is kept; linear keeps all", source=_STOICA, unit="0 to 1"
    )
    weight: PerModel = setting(1.0, "factor of each expert", source=_STOICA)
    scale: float = setting(0.6, "lambda, factor of the merged change", source=f"{_STOICA}, ViT-B of rank 16")
    normalize: bool = setting(True, "ties: mean of what agrees, not sum", source=_STOICA)
    floor: float = setting(1e-5, "singular values up to this one are dropped", source=_STOICA, ge=0)
    exclude: str = setting(
        VOCABULARY,
        "regular expression; matrices whose name it finds stay in their own coordinates, unless given as factors",
        source="our choice, for their size",
    )
    precision: Literal["float32", "float64"] = setting(
        "float64", "type the matrices are decomposed in; factors always in float64", source=_STOICA
    )

    @field_validator("density")
    @classmethod
    def _share(cls, value: PerModel) -> PerModel:
        if not all(0 <= v <= 1 for v in ((value,) if isinstance(value, int | float) else value)):
            raise ValueError("must lie in 0..1")
        return value

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        if not self.is_matrix(name, shape, experts):
            return 0.0
        out, into = shape
        count = min(out, experts * into)  # singular values
        triangle = count / into
        # beside the changes: QR and SVD of the triangle, then the coordinates and what they are merged to; as measured
        steps = (6 + 6 * triangle, (experts + 4) * count / out + 1)
        return experts + self.wide() * max(steps)


def knots(stack: Stack, settings: Knots) -> Iterator[tuple[Block, Tensor]]:
    """Merged slices of one tensor."""
    given = _factors(stack)
    if given is not None:
        factors, turned = given
        basis, mix = merged_pair(factors, settings, seed=stack.seed, name=stack.name, places=stack.places)
        return _added(stack, *((mix.t(), basis.t()) if turned else (basis, mix)))
    if not settings.is_matrix(stack.name, stack.shape, len(stack.experts)):
        return sparsified(stack, _rule(settings))
    dense = list(changes(stack, stack.dtype))
    shared = shared_basis_dense(dense, settings.floor, working(stack, settings))
    dense.clear()
    return _added(stack, shared.basis, _merged(shared, settings, stack.seed, stack.name, stack.places))


def merged_pair(
    factors: Factors, settings: Knots, *, seed: int = 0, name: str = "", places: list[int] | None = None
) -> tuple[Tensor, Tensor]:
    """The merged change of one matrix as U [out, q] and merged coordinates [q, in], fp64, q at most the sum of ranks.

    From one pair B [out, r], A [r, in] an expert, which holds the adapter's scale. `seed`, `name`, `places`: of DARE's coins.
    """
    shared = shared_basis(factors, settings.floor)
    return shared.basis, _merged(shared, settings, seed, name, places or list(range(len(factors))))


def _merged(shared: SharedBasis, settings: Knots, seed: int, name: str, places: list[int]) -> Tensor:
    """merge(S V_1^T, ..) times lambda: [q, in]."""
    # rounding turns vectors by eps over the gap of their singular values; 2e-12 of the largest value in fp64 is none
    level = torch.finfo(shared.values.dtype).eps ** 0.75 * float(shared.values[0]) if len(shared.values) else 0.0
    flat = [c.masked_fill_(c.abs() <= level, 0).reshape(-1) for c in shared.coordinates]
    zero = torch.zeros_like(flat[0])
    kind, shape = storage(zero), tuple(shared.coordinates[0].shape)
    planes: list[Plane] = [TensorPlane(str(k), kind, row) for k, row in enumerate(flat)]
    stack = Stack(name, shape, TensorPlane("basis", kind, zero), planes, places, seed, (0, len(zero)))
    mix = torch.empty_like(zero)
    for block, values in sparsified(stack, _rule(settings)):
        mix[block.start : block.stop] = values
    return mix.view(shape)


def _rule(settings: Knots) -> Sparsified:
    density, weight, scale = settings.density, settings.weight, settings.scale
    if settings.combine == "ties":
        return Ties(density=density, weight=weight, scale=scale, normalize=settings.normalize, scope="tensor")
    if settings.combine == "linear":
        return Dare(density=1.0, weight=weight, scale=scale)  # nothing dropped: the weighted sum
    kind = Dare if settings.combine == "dare" else DareTies
    return kind(density=density, weight=weight, scale=scale)


def _factors(stack: Stack) -> tuple[list[tuple[Tensor, Tensor]], bool] | None:
    """Scaled B [out, r], A [r, in] of every expert, and whether the tensor is stored as [in, out].

    None where an expert is no adapter on this very base. One that leaves the tensor alone has rank 0.
    """
    adapted = [plane for plane in stack.experts if isinstance(plane, LoraPlane)]
    under = [plane.under if isinstance(plane, LoraPlane) else plane for plane in stack.experts]
    if len(stack.shape) < 2 or not adapted or not all(_same(plane, stack.base) for plane in under):
        return None
    turned = adapted[0].turned
    if any(plane.turned != turned for plane in adapted):
        return None
    out, into = (adapted[0].left.shape[0], adapted[0].right.shape[1])[:: -1 if turned else 1]
    pairs = []
    for plane in stack.experts:
        if not isinstance(plane, LoraPlane):
            pairs.append((torch.empty(out, 0, dtype=torch.float64), torch.empty(0, into, dtype=torch.float64)))
            continue
        left, right = plane.left * plane.scale, plane.right
        if not bool(torch.isfinite(left).all() & torch.isfinite(right).all()):
            stack.blame(0, stack.numel)
        pairs.append((right.t(), left.t()) if turned else (left, right))
    return pairs, turned


def _same(plane: Plane, base: Plane | None) -> bool:
    """Whether both read the same stored tensor."""
    if isinstance(plane, FilePlane) and isinstance(base, FilePlane):
        return plane.info == base.info
    if isinstance(plane, TensorPlane) and isinstance(base, TensorPlane):
        return plane.flat.data_ptr() == base.flat.data_ptr() and plane.dtype == base.dtype
    return False


def _added(stack: Stack, left: Tensor, right: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """The base plus left [rows, q] @ right [q, columns], some rows at a time, summed in fp64 and rounded once."""
    assert stack.base is not None
    columns, nothing = right.shape[1], torch.empty(0, 0)
    step = max(1, 8 * BLOCK // columns)
    for row in range(0, left.shape[0], step):
        change = (left[row : row + step] @ right).reshape(-1)
        start, stop = row * columns, row * columns + len(change)
        out = torch.empty(stop - start, dtype=stack.dtype)
        stack.base.read(start, stop, out)
        yield Block(start, stop, None, nothing), out.add_(change)
