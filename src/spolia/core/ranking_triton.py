"""The smooth tau as one GPU kernel: exact, fp32, no memory beside its results, no atomics. Imported when it is used.

A program holds some classes of one sample and walks over all others; pairs live in registers. It stores its part of the
sum and the finished slope of its classes, so that two runs give the same bits.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

from spolia.core.ranking_exact import Sums
from spolia.core.ranking_terms import Tau

if TYPE_CHECKING:
    from torch import Tensor

_I, _J = 32, 64  # classes held by a program, classes met at a time
_FORMS = {"product": 0, "joint": 1, "hard_teacher": 2}
_PHIS = {"tanh": 0, "softsign": 1, "erf": 2}


def fused(s: Tensor, t: Tensor, tau: Tau, weights: Tensor | None) -> Sums:
    """Sums of s, t [n, C] in fp32; without weights or `normalize`, and without arctan."""
    phi, k = tau.plain
    assert weights is None and not tau.normalize and phi in _PHIS, tau
    n, count = s.shape
    programs = triton.cdiv(count, _I)
    parts, slope = s.new_empty(n, programs), torch.empty_like(s)
    _kernel[(n, programs)](
        s.contiguous(), t.contiguous(), parts, slope, count, programs, k, _FORMS[tau.form], _PHIS[phi], _I, _J
    )
    return Sums(parts.sum(1) / 2, slope, None)


@triton.jit
def _smooth(x, phi: tl.constexpr):
    """phi(x) and phi'(x)."""
    if phi == 0:
        e = tl.exp(-2.0 * tl.abs(x))
        size = (1.0 - e) / (1.0 + e)
        value = tl.where(x < 0, -size, size)
        slope = 4.0 * e / ((1.0 + e) * (1.0 + e))
    elif phi == 1:
        slope = 1.0 / (1.0 + tl.abs(x))
        value = x * slope
        slope = slope * slope
    else:
        value = tl.erf(x)
        slope = 1.1283791670955126 * tl.exp(-x * x)
    return value, slope


@triton.jit
def _kernel(
    student,
    teacher,
    parts,
    slopes,
    count,
    programs,
    k,
    form: tl.constexpr,
    phi: tl.constexpr,
    width_i: tl.constexpr,
    width_j: tl.constexpr,
):
    sample = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = sample * count
    i = block * width_i + tl.arange(0, width_i)
    si = tl.load(student + row + i, mask=i < count, other=0.0)
    ti = tl.load(teacher + row + i, mask=i < count, other=0.0)
    total = tl.zeros([width_i], dtype=tl.float32)
    slope = tl.zeros([width_i], dtype=tl.float32)
    for start in range(0, count, width_j):
        j = start + tl.arange(0, width_j)
        sj = tl.load(student + row + j, mask=j < count, other=0.0)
        tj = tl.load(teacher + row + j, mask=j < count, other=0.0)
        ds = si[:, None] - sj[None, :]
        dt = ti[:, None] - tj[None, :]
        if form == 0:
            weight, _ = _smooth(k * dt, phi)
            value, rise = _smooth(k * ds, phi)
            value = value * weight
            rise = rise * weight
        elif form == 1:
            value, rise = _smooth(k * ds * dt, phi)
            rise = rise * dt
        else:
            weight = tl.where(dt > 0, 1.0, 0.0) - tl.where(dt < 0, 1.0, 0.0)
            value, rise = _smooth(k * ds, phi)
            value = value * weight
            rise = rise * weight
        inside = (i < count)[:, None] & (j < count)[None, :]
        total += tl.sum(tl.where(inside, value, 0.0), axis=1)
        slope += tl.sum(tl.where(inside, rise, 0.0), axis=1)
    tl.store(parts + sample * programs + block, tl.sum(total, axis=0))
    tl.store(slopes + row + i, slope * k, mask=i < count)
