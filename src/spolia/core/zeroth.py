"""Gradients of what can only be asked for values: finite differences along random directions, each sample its own.

    g = (d / q) sum_j [F(v + e u_j) - F(v)] / e  u_j,     u_j uniform on the unit sphere of d dimensions, e the radius

Unbiased for linear F, and for quadratic F too: that part of the error is odd in u. For linear F the cosine with the true
gradient is about sqrt(q / (q + d - 1)), and exactly sqrt(q / d) for orthogonal directions.

| estimator | how |
|---|---|
| two-point, multi-point | `estimate(count=1)`, `estimate(count=q)`: q + 1 values a sample, q where F(v) is known |
| antithetic | `antithetic=True`: [F(v + e u) - F(v - e u)] / 2e; 2 q values, no odd error |
| orthogonal | `kind="orthogonal"`: q <= d directions at right angles; least variance |
| low-rank | `basis=`: directions in a subspace of r dimensions, r for d; the gradient's part in there, unbiased |
| generator space | `along`: directions that a generator can move in; the shortest gradient that explains what was seen |

Duchi et al. 2015, arXiv 1312.2139, for several points; Choromanski et al. 2018, arXiv 1804.02395, for orthogonal ones.
F takes points [m, n, ...] of n samples and gives values [m, n]; sample i's value may depend on its own point alone.
Differences are taken in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    Values = Callable[[Tensor], Tensor]  # points [m, n, ...] -> values [m, n]

Kind = Literal["sphere", "orthogonal"]
CLEAR = 10.0  # a change of this many steps of the answers' resolution is told from rounding
_GROWTH = 4.0  # from one radius tried to the next
_DEPENDENT = 1e-6  # directions count as dependent below this share of the largest; fp32 Gram matrices are good to 1e-7


@dataclass(frozen=True)
class Estimate:
    """Of every sample: the gradient [n, ...], and the variance [n] of that estimate summed over its components.

    The variance is itself estimated, from how directions differ: NaN for a single one. `queries`: values asked for.
    """

    gradient: Tensor
    variance: Tensor
    queries: int


def estimate(
    f: Values,
    v: Tensor,
    count: int,
    draws: np.random.Generator,
    *,
    radius: float = 1e-3,
    kind: Kind = "sphere",
    basis: Tensor | None = None,
    antithetic: bool = False,
    value: Tensor | None = None,
    chunk: int | None = None,
) -> Estimate:
    """The gradient of F at v [n, ...] from `count` directions.

    `basis`: orthonormal rows [r, d] that directions stay in. `value`: F(v) [n], where it is known. `chunk`: directions
    asked for together, all by default; orthogonal ones are held all the same.
    """
    n, d = len(v), v[0].numel()
    dimension = d if basis is None else len(basis)
    _check(count, dimension, kind, radius, chunk)
    asked, value = (0, value) if antithetic or value is not None else (n, f(v.unsqueeze(0))[0])
    total = torch.zeros(n, d, dtype=v.dtype, device=v.device)
    squares = torch.zeros(n, dtype=torch.float64, device=v.device)
    whole = orthogonal(count, n, dimension, draws).to(v) if kind == "orthogonal" else None
    for start in range(0, count, chunk or count):
        m = min(chunk or count, count - start)
        u = sphere(m, n, dimension, draws).to(v) if whole is None else whole[start : start + m]
        if basis is not None:
            u = u @ basis.to(v)
        slopes = _slopes(f, v, u.view(m, *v.shape), radius, antithetic, value)  # [m, n], fp64
        total += torch.einsum("mn,mnd->nd", slopes.to(v.dtype), u)
        squares += slopes.square().sum(0)
        asked += (2 if antithetic else 1) * m * n
    gradient = total * (dimension / count)
    apart = dimension**2 * squares / count - gradient.double().square().sum(1)
    variance = apart.clamp(min=0) / (count - 1) if count > 1 else torch.full_like(squares, math.nan)
    if kind == "orthogonal":  # drawn without replacement
        variance = variance * (1 - count / dimension)
    return Estimate(gradient.view_as(v), variance, asked)


def along(
    f: Values,
    v: Tensor,
    directions: Tensor,
    *,
    radius: float = 1e-3,
    antithetic: bool = False,
    value: Tensor | None = None,
) -> Estimate:
    """The shortest gradient [n, ...] whose slopes along `directions` [q, n, ...], of any length, are those seen.

    For linear F it is the gradient's projection on their span: less error than an unbiased estimate, and bias instead of
    variance, which is NaN.
    """
    q, n = directions.shape[:2]
    asked, value = (0, value) if antithetic or value is not None else (n, f(v.unsqueeze(0))[0])
    lengths = directions.flatten(2).norm(dim=2).clamp(min=torch.finfo(v.dtype).tiny)  # [q, n]
    units = directions / lengths.view(q, n, *[1] * (v.dim() - 1))
    slopes = _slopes(f, v, units, radius, antithetic, value)
    rows = units.flatten(2).transpose(0, 1)  # [n, q, d]
    gram = (rows @ rows.transpose(1, 2)).double()
    weights = torch.linalg.pinv(gram, rtol=_DEPENDENT, hermitian=True) @ slopes.T.unsqueeze(2)  # [n, q, 1]
    gradient = (rows.transpose(1, 2) @ weights.to(v.dtype)).view_as(v)
    return Estimate(gradient, torch.full_like(slopes[0], math.nan), asked + (2 if antithetic else 1) * q * n)


def sphere(count: int, n: int, dimension: int, draws: np.random.Generator) -> Tensor:
    """Unit vectors [count, n, dimension] of uniform direction, fp32."""
    drawn = torch.from_numpy(draws.standard_normal((count, n, dimension), dtype=np.float32))
    return drawn / drawn.norm(dim=2, keepdim=True)


def orthogonal(count: int, n: int, dimension: int, draws: np.random.Generator) -> Tensor:
    """As `sphere`, those of one sample at right angles to each other: Haar measure, from a QR decomposition."""
    drawn = torch.from_numpy(draws.standard_normal((n, dimension, count), dtype=np.float32))
    q, r = torch.linalg.qr(drawn)
    signs = r.diagonal(dim1=1, dim2=2).sign()  # LAPACK's own signs would favour some directions
    return (q * signs.unsqueeze(1)).permute(2, 0, 1).contiguous()


def coarse(channels: int, side: int, low: int) -> Tensor:
    """Orthonormal rows [channels low^2, channels side^2]: images that a grid of low x low points spans bilinearly."""
    points = torch.eye(low * low, dtype=torch.float64).view(low * low, 1, low, low)
    shown = torch.nn.functional.interpolate(points, size=(side, side), mode="bilinear", align_corners=False)
    rows = torch.linalg.qr(shown.flatten(1).T).Q.T  # [low^2, side^2]
    return torch.block_diag(*[rows] * channels).float()


def expected_cosine(count: int, dimension: int, kind: Kind = "sphere") -> float:
    """Cosine of estimate and gradient to be expected of a linear F."""
    if kind == "orthogonal":
        return math.sqrt(count / dimension)
    return math.sqrt(count / (count + dimension - 1))


def clear_radius(
    answers: Callable[[Tensor], Tensor],
    v: Tensor,
    draws: np.random.Generator,
    *,
    start: float = 1e-3,
    most: float = 1.0,
    resolution: float = 0.0,
) -> tuple[float, int]:
    """The least radius tried whose change of `answers` [n, C] is, in the median, clear of their rounding; and queries.

    From `start`, in factors of 4, up to `most`. A change is the largest of a sample's components.
    """
    if not resolution:
        return start, 0
    u = sphere(1, len(v), v[0].numel(), draws)[0].to(v).view_as(v)
    before, asked, radius = answers(v), len(v), start
    while radius < most:
        change = (answers(v + radius * u) - before).abs().amax(1).median()
        asked += len(v)
        if change >= CLEAR * resolution:
            return radius, asked
        radius = min(radius * _GROWTH, most)
    return most, asked


def _slopes(f: Values, v: Tensor, u: Tensor, radius: float, antithetic: bool, value: Tensor | None) -> Tensor:
    """Differences over the radius along u [m, n, ...]: [m, n] fp64."""
    if antithetic:
        ahead, behind = f(torch.cat([v + radius * u, v - radius * u])).double().chunk(2)
        return (ahead - behind) / (2 * radius)
    assert value is not None
    return (f(v + radius * u).double() - value.double()) / radius


def _check(count: int, dimension: int, kind: Kind, radius: float, chunk: int | None) -> None:
    if count < 1 or radius <= 0 or (chunk is not None and chunk < 1):
        raise SpoliaError(
            f"count={count}, radius={radius}, chunk={chunk}", where="zeroth", mend="give numbers above zero"
        )
    if kind == "orthogonal" and count > dimension:
        what = f"{count} directions at right angles in {dimension} dimensions"
        raise SpoliaError(what, where="zeroth", mend=f"give at most {dimension}, or kind='sphere'")
