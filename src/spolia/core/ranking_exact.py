"""The smooth tau by blocks: exact, its gradient found in the same sweep, memory of a few blocks whatever the classes.

All terms are symmetric in i and j, so blocks on and above the diagonal suffice. The tanh of a difference needs no tanh
for each pair: with A = exp(2 k s) and q_ij = 1 / (A_i + A_j),

    tanh k(s_i - s_j) = 2 A_i q_ij - 1,    1 - tanh^2 = 4 A_i A_j q_ij^2,

one division a pair and products with vectors. With `hard_teacher` the classes are first put in the teacher's order:
above the diagonal the teacher's sign is then 1 everywhere, but where a tie lies across the edge of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.ranking_terms import Tau, phi_with_slope

if TYPE_CHECKING:
    from torch import Tensor

_ENTRIES = 1 << 19  # pairs of a block on a CPU: three buffers of 2 MB stay in the last cache, calls cost little
_ENTRIES_DEVICE = 1 << 24  # elsewhere: enough to fill the device
_ROWS = 64  # of a block, at most
_REACH = 40.0  # k times the range of the logits, at most, for A: q^2 stays a normal fp32 number


@dataclass(frozen=True)
class Sums:
    """Of every sample: sum_{i<j} w_ij v_ij [n], its slope in s [n, C], and sum_{i<j} w_ij |phi(k D t)| [n], where asked."""

    total: Tensor
    slope: Tensor | None
    most: Tensor | None


def exact(s: Tensor, t: Tensor, tau: Tau, weights: Tensor | None, slopes: bool) -> Sums:
    """The sums of s, t [n, C], fp32 or fp64."""
    count, order = s.shape[1], None
    if tau.form == "hard_teacher":
        t, order = t.sort(dim=1, descending=True)
        s, weights = s.gather(1, order), weights if weights is None else weights.gather(1, order)
    rows = min(_ROWS, max(16, -(-count // 2)))
    entries = _ENTRIES if s.device.type == "cpu" else _ENTRIES_DEVICE
    together = min(len(s), max(1, entries // (rows * count)))
    spare = [s.new_empty(together * rows * count) for _ in range(3)]
    parts = []
    for start in range(0, len(s), together):
        at = slice(start, start + together)
        blocks = _Blocks(s[at], t[at], None if weights is None else weights[at], tau, slopes, spare)
        parts.append(blocks.swept(rows))
    slope = torch.cat([part.slope for part in parts if part.slope is not None]) if slopes else None
    if slope is not None and order is not None:
        slope = torch.empty_like(slope).scatter_(1, order, slope)
    most = [part.most for part in parts if part.most is not None]
    return Sums(torch.cat([part.total for part in parts]), slope, torch.cat(most) if most else None)


class _Blocks:
    """Some samples [n, C], swept block by block."""

    def __init__(
        self, s: Tensor, t: Tensor, weights: Tensor | None, tau: Tau, slopes: bool, spare: list[Tensor]
    ) -> None:
        self.phi, self.k = tau.plain
        self.tau, self.weights, self.spare = tau, weights, spare
        fast = self.phi == "tanh" and tau.form != "joint"
        self.student, self.fast = _scaled(s, self.k, fast)
        self.teacher, self.fast_teacher = _scaled(t, self.k, fast) if tau.form == "product" else (t, False)
        self.ties = (t[:, 1:] == t[:, :-1]).any(0).tolist() if tau.form == "hard_teacher" else []
        self.total, self.slope = s.new_zeros(len(s)), torch.zeros_like(s) if slopes else None
        self.most = s.new_zeros(len(s)) if tau.normalize and tau.form == "product" else None

    def swept(self, rows: int) -> Sums:
        count = self.student.shape[1]
        for start in range(0, count, rows):
            stop = min(start + rows, count)
            self._block(slice(start, stop), slice(start, stop), square=True)
            if stop < count:
                self._block(slice(start, stop), slice(stop, count), square=False)
        return Sums(self.total, self.slope, self.most)

    def _block(self, i: slice, j: slice, square: bool) -> None:
        """Pairs of the classes i with the classes j; a square holds each of its pairs twice."""
        shape = (len(self.student), i.stop - i.start, j.stop - j.start)
        size = shape[0] * shape[1] * shape[2]
        p, q, held = (one[:size].view(shape) for one in self.spare)
        share = 0.5 if square else 1.0
        factor = self._factor(i, j, square, held, q)
        if factor is not None and self.most is not None:
            self.most.add_(torch.abs(factor, out=q).sum((1, 2)), alpha=share)
        if self.fast:
            total, rows, columns = self._by_division(i, j, p, q, factor)
        else:
            total, rows, columns = self._by_phi(i, j, p, q, factor)
        self.total.add_(total, alpha=share)
        if self.slope is not None and rows is not None and columns is not None:
            self.slope[:, i] += rows
            if not square:  # terms of (j, i) are those of (i, j) with the other sign
                self.slope[:, j] -= columns

    def _factor(self, i: slice, j: slice, square: bool, held: Tensor, spare: Tensor) -> Tensor | None:
        """w_ij times the teacher's part [n, i, j]; None where it is 1 throughout."""
        factor = None
        if self.tau.form == "product":
            factor = torch.sub(self.teacher[:, i, None], self.teacher[:, None, j], out=held)
            if self.fast_teacher:
                factor.div_(torch.add(self.teacher[:, i, None], self.teacher[:, None, j], out=spare))
            else:
                phi_with_slope(factor, self.phi, spare)
        elif self.tau.form == "hard_teacher" and (square or self.ties[j.start - 1]):
            factor = torch.sub(self.teacher[:, i, None], self.teacher[:, None, j], out=held).sign_()
        if self.weights is not None:
            pair = torch.add(self.weights[:, i, None], self.weights[:, None, j], out=held if factor is None else spare)
            factor = pair if factor is None else factor.mul_(pair)
        return factor

    def _by_division(self, i: slice, j: slice, p: Tensor, q: Tensor, factor: Tensor | None) -> tuple:
        """Total [n] and the slopes' sums over j [n, i] and over i [n, j], where the student's part is a tanh."""
        left, right = self.student[:, i], self.student[:, j]
        torch.add(left.unsqueeze(2), right.unsqueeze(1), out=p).reciprocal_()
        if factor is None:
            total = 2 * (left * p.sum(2)).sum(1) - p.shape[1] * p.shape[2]
            weighed = p
        else:
            weighed = torch.mul(p, factor, out=q)
            total = 2 * (left * weighed.sum(2)).sum(1) - factor.sum((1, 2))
        if self.slope is None:
            return total, None, None
        weighed.mul_(p)
        columns = torch.bmm(left.unsqueeze(1), weighed).squeeze(1).mul_(right).mul_(4 * self.k)
        rows = weighed.mul_(right.unsqueeze(1)).sum(2).mul_(left).mul_(4 * self.k)  # bmm is slow this way round
        return total, rows, columns

    def _by_phi(self, i: slice, j: slice, p: Tensor, q: Tensor, factor: Tensor | None) -> tuple:
        """The same for any phi."""
        torch.sub(self.student[:, i, None], self.student[:, None, j], out=p)
        gap = None
        if self.tau.form == "joint":
            gap = self.teacher[:, i, None] - self.teacher[:, None, j]
            p.mul_(gap)
        phi_with_slope(p, self.phi, q)
        if factor is not None:
            p.mul_(factor)
        if self.slope is None:
            return p.sum((1, 2)), None, None
        for more in (factor, gap):
            if more is not None:
                q.mul_(more)
        return p.sum((1, 2)), q.sum(2).mul_(self.k), q.sum(1).mul_(self.k)


def _scaled(x: Tensor, k: float, fast: bool) -> tuple[Tensor, bool]:
    """exp(2 k x) about the middle of its range where that fits, and True; else k x. Found in fp64, rounded once."""
    if not x.numel():
        return x, False
    low, high = x.aminmax(dim=1, keepdim=True)
    wide = x.double()
    if fast and float((high.double() - low).amax()) * k <= _REACH:
        return (2 * k * (wide - (low.double() + high.double()) / 2)).exp().to(x.dtype), True
    return ((wide - (low.double() + high.double()) / 2) * k).to(x.dtype), False
