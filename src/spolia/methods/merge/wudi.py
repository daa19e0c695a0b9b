"""WUDI-Merging: the merged change that disturbs least what each expert's own change does to its own inputs.

For experts of one base; the task vectors themselves stand in for the inputs. Cheng et al., Whoever Started the
Interference Should End It, ICML 2025, arXiv 2503.08099. For every weight matrix:

    loss(tau) = sum_k |(tau - tau_k) tau_k^T|_F^2 / |tau_k|_F^2
    start at sum_k tau_k, 300 steps of Adam at 1e-5;   theta = theta_0 + scale tau

The gradient is 2 (tau G - R) with G = sum_k tau_k^T tau_k / |tau_k|^2 and R = sum_k tau_k (tau_k^T tau_k) / |tau_k|^2, so
a step costs one product instead of 2 K. `solver: exact` goes to the minimiser itself, R G^+ (RegMean with the task
vectors as inputs). That is another method: 300 steps of 1e-5 end far before it. Other tensors: see `others`.

| paper | here |
|---|---|
| tau_m | `merged` |
| steps, learning rate | `settings.steps`, `settings.step_size` |

Data touched: none. Departures: other tensors take the mean task vector, as in other tools (`others: base` leaves them as
they were, as in the published code, which also merges the matrices of attention and MLP only); an expert that did not
change a matrix has no say in it, where the published code divides by zero. The exact minimiser is the shortest one:
eigenvalues of G below 1e-10 of the largest count as zero, in fp64.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from spolia.core.lazy import torch
from spolia.core.settings import setting
from spolia.core.stream import Block, Stack, Stopped
from spolia.methods.merge.matrices import MatrixMerge, added, changes, gram, mean_added, working

if TYPE_CHECKING:
    from torch import Tensor

_CHENG = "Cheng et al. 2025"
_FLOOR = 1e-10  # of an eigenvalue of G; R / eigenvalue then keeps six digits in fp64


class Wudi(MatrixMerge):
    """Settings of `wudi`."""

    scale: float = setting(1.0, "factor of the merged task vector", source=_CHENG)
    precision: Literal["float32", "float64"] = setting("float32", "type the steps are made in", source="published code")
    solver: Literal["adam", "exact"] = setting(
        "adam", "the paper's steps, or the minimiser itself (another method)", source=_CHENG
    )
    steps: int = setting(300, "steps of Adam", source=_CHENG, ge=0)
    step_size: float = setting(1e-5, "learning rate of Adam", source=_CHENG, gt=0)
    ridge: float = setting(
        0.0, "added to G for `solver: exact`, as a share of its mean eigenvalue", source="our choice: none", ge=0
    )
    others: Literal["mean", "base"] = setting(
        "mean", "tensors that are no matrices: mean task vector, or left as in the base", source="as other tools do"
    )

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        if not self.is_matrix(name, shape, experts):
            return 0.0
        square = shape[1] / shape[0]  # an [in, in] matrix in copies of this one
        if self.solver == "exact":
            return 1 + 2 * 4 + 2 * 5 * square
        return 2 + self.wide() * (7 + square) + 4 * square


def wudi(stack: Stack, settings: Wudi) -> Iterator[tuple[Block, Tensor]]:
    """Merged slices of one tensor."""
    if not settings.is_matrix(stack.name, stack.shape, len(stack.experts)):
        return mean_added(stack, settings.scale if settings.others == "mean" else 0.0)
    dtype = torch.float64 if settings.solver == "exact" else working(stack, settings)
    total = torch.zeros(stack.shape, dtype=dtype)  # sum of the task vectors [out, in]
    pulls = torch.zeros(stack.shape, dtype=dtype)  # R [out, in]
    grams = torch.zeros(stack.shape[1], stack.shape[1], dtype=dtype)  # G [in, in]
    for change in changes(stack, dtype):
        square = gram(change)
        norm = float(square.trace())
        if norm > 0:
            own = square.div_(norm).to(dtype)
            total += change
            pulls += change @ own
            grams += own
    if settings.solver == "exact":
        merged = minimiser(pulls, grams, settings.ridge)
    else:
        merged = descend(total, pulls, grams, settings, stack)
    return added(stack, merged, settings.scale)


def minimiser(pulls: Tensor, grams: Tensor, ridge: float) -> Tensor:
    """R (G + ridge)^+."""
    values, vectors = torch.linalg.eigh(grams)
    kept = values > _FLOOR * values[-1:]
    kept &= values > 0
    chosen = vectors[:, kept]
    return (pulls @ chosen) / (values[kept] + ridge * values.mean()) @ chosen.t()


def descend(start: Tensor, pulls: Tensor, grams: Tensor, settings: Wudi, stack: Stack) -> Tensor:
    """Adam from `start`, its usual moments (0.9, 0.999, 1e-8)."""
    merged = start
    mean, square = torch.zeros_like(merged), torch.zeros_like(merged)
    for step in range(1, settings.steps + 1):
        if stack.stop is not None and stack.stop.is_set():
            raise Stopped
        slope = torch.addmm(pulls, merged, grams, beta=-2, alpha=2)
        mean.lerp_(slope, 0.1)
        square.mul_(0.999).addcmul_(slope, slope, value=0.001)
        size = square.sqrt().div_((1 - 0.999**step) ** 0.5).add_(1e-8)
        merged.addcdiv_(mean, size, value=-settings.step_size / (1 - 0.9**step))
    return merged
