"""The smooth tau by sines: no pair is ever formed, and the error is chosen beforehand.

On the range that the logits span, phi(y) ~ sum_m b_m sin(w_m y), w_m = pi m / P with P a quarter beyond the range, by
least squares. Sines of differences separate, so with S = sin(w x), C = cos(w x) as matrices [C, M]:

    product         sum_{i<j} phi(k D t) phi(k D s) = sum (b b') o ((St' Ss) o (Ct' Cs) - (St' Cs) o (Ct' Ss))     O(C M^2)
    hard_teacher    sum_j sgn(D t_ij) cos(w s_j) by running sums in the teacher's order, ties left out             O(C M)

`fitted` takes the fewest terms with |error| <= tolerance in phi and in phi' over the whole range. Of the loss that is at
most tolerance (`hard_teacher`) or 2 tolerance + tolerance^2 (`product`); of an element of its gradient as much times
2 k / C, the largest that it can be. Rounding comes on top.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch
from spolia.core.ranking_exact import Sums
from spolia.core.ranking_terms import Tau

if TYPE_CHECKING:
    from torch import Tensor

MOST_TERMS = 320
_BEYOND = 1.25  # half period over range
_ELEMENTS = 1 << 22  # of a matrix of sines held at once
_STEPS = 8  # of the range, to a factor of 2: batches of like range share a fit


@dataclass(frozen=True)
class Series:
    """phi(y) ~ sum_m factors_m sin(frequencies_m y) for |y| <= reach; `error` bounds what is wrong with phi and phi'."""

    reach: float
    frequencies: tuple[float, ...]
    factors: tuple[float, ...]
    error: float


def series_for(phi: str, spread: float, tolerance: float) -> Series | None:
    """The shortest series for k times a range of logits; None where MOST_TERMS do not reach the tolerance."""
    if not math.isfinite(spread):
        return None
    reach = 2.0 ** (math.ceil(_STEPS * math.log2(max(spread, 1.0))) / _STEPS)
    return fitted(phi, reach, tolerance)


@lru_cache(maxsize=128)
def fitted(phi: str, reach: float, tolerance: float) -> Series | None:
    """The shortest series on [-reach, reach], to a sixteenth of its terms; None where MOST_TERMS are too few."""
    low, high, best = 0, min(MOST_TERMS, 8 + int(1.5 * reach)), None  # too few, perhaps enough
    while best is None:
        series = fit(phi, reach, high)
        if series.error <= tolerance:
            best = series
        elif high == MOST_TERMS:
            return None
        else:
            low, high = high, min(MOST_TERMS, 2 * high)
    while high - low > max(1, high // 16):
        middle = (low + high) // 2
        series = fit(phi, reach, middle)
        low, high, best = (low, middle, series) if series.error <= tolerance else (middle, high, best)
    return best


def fit(phi: str, reach: float, terms: int) -> Series:
    """Least squares on half the range (all is odd), phi' weighed like phi."""
    grid = np.linspace(0.0, reach, max(400, 16 * terms))
    frequencies = np.pi * np.arange(1, terms + 1) / (_BEYOND * reach)
    angles = np.outer(grid, frequencies)
    sines = np.concatenate([np.sin(angles), np.cos(angles) * frequencies])
    wanted = np.concatenate(_values(phi, grid))
    values, vectors = np.linalg.eigh(sines.T @ sines)
    kept = values > 1e-13 * values[-1]  # what is below is rounding, and would come back as large factors
    factors = vectors[:, kept] @ ((vectors[:, kept].T @ (sines.T @ wanted)) / values[kept])
    # Points are 0.16 radian of the shortest wave apart: between them an error of thrice its frequency grows by 3 % at most.
    error = 1.05 * float(np.abs(sines @ factors - wanted).max()) + 1e-9
    return Series(reach, tuple(frequencies.tolist()), tuple(factors.tolist()), error)


def _values(phi: str, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """phi(y) and phi'(y), y >= 0."""
    match phi:
        case "tanh":
            return np.tanh(y), 1 / np.cosh(np.minimum(y, 300.0)) ** 2
        case "arctan":
            return np.arctan(y) * 2 / np.pi, 2 / np.pi / (1 + y * y)
        case "softsign":
            return y / (1 + y), 1 / (1 + y) ** 2
        case "erf":
            return torch.erf(torch.from_numpy(y)).numpy(), 2 / np.sqrt(np.pi) * np.exp(-y * y)
    raise AssertionError(phi)


def spread(x: Tensor, k: float) -> float:
    """k times the widest range of a row: where the series must hold."""
    if not x.numel():
        return 0.0
    low, high = x.aminmax(dim=1)
    return k * float((high.double() - low.double()).amax())


def separated(
    s: Tensor, t: Tensor, tau: Tau, weights: Tensor | None, slopes: bool, fits: tuple[Series, Series]
) -> Sums:
    """The sums of the form `product`, of s, t [n, C]; `fits` of student and teacher, which must reach far enough."""
    _, k = tau.plain
    student, teacher = _Waves(s, k, fits[0]), _Waves(t, k, fits[1])
    width = 2 * max(len(fit.frequencies) for fit in fits)
    count, total = s.shape[1], s.new_empty(len(s))
    slope = torch.empty_like(s) if slopes else None
    chunk = max(1, min(count, _ELEMENTS // width))
    together = max(1, _ELEMENTS // (width * count))
    for start in range(0, len(s), together):
        at = slice(start, start + together)
        own = None if weights is None else weights[at].unsqueeze(2)
        pieces = [slice(low, low + chunk) for low in range(0, count, chunk)]
        whole = len(pieces) == 1  # then sines are made once, not once a pass
        kept = (teacher.of(at, pieces[0]), student.of(at, pieces[0])) if whole else None
        sizes = (len(s[at]), 2 * len(teacher.factors), 2 * len(student.factors))
        plain, weighed = s.new_zeros(sizes), s.new_zeros(sizes)  # Gram matrices, without and with the weights
        for piece in pieces:
            ft, fs = kept or (teacher.of(at, piece), student.of(at, piece))
            plain += ft.mT @ fs
            if own is not None:
                weighed += ft.mT @ (own[:, piece] * fs)
        kernel = _kernel(plain, teacher.factors, student.factors)
        total[at] = (kernel * (0.5 * plain if own is None else weighed)).sum((1, 2))
        if slope is None:
            continue
        other = None if own is None else _kernel(weighed, teacher.factors, student.factors)
        for piece in pieces:
            ft, fs = kept or (teacher.of(at, piece), student.of(at, piece))
            back = ft @ kernel  # dtotal / d sines of the student [n, classes, 2 M]
            if own is not None and other is not None:
                back = torch.baddbmm(own[:, piece] * back, ft, other)
            slope[at, piece] = student.through(back, fs)
    return Sums(total, slope, _most(t, tau, weights, fits[1]))


def _kernel(gram: Tensor, teacher: Tensor, student: Tensor) -> Tensor:
    """d/dFs of the double sum is Ft times this [n, 2 Mt, 2 Ms], linear in the Gram matrix of the sines."""
    a, b = len(teacher), len(student)
    pair = teacher.unsqueeze(1) * student
    kernel = torch.empty_like(gram)
    torch.mul(pair, gram[:, a:, b:], out=kernel[:, :a, :b])
    torch.mul(pair, gram[:, :a, :b], out=kernel[:, a:, b:])
    torch.mul(-pair, gram[:, a:, :b], out=kernel[:, :a, b:])
    torch.mul(-pair, gram[:, :a, b:], out=kernel[:, a:, :b])
    return kernel


class _Waves:
    """[sin | cos] of k x times every frequency."""

    def __init__(self, x: Tensor, k: float, series: Series):
        self.x, self.k = _centred(x, k), k
        assert spread(self.x, 1.0) <= 1.001 * series.reach, "the series does not reach as far as the logits"
        self.frequencies = self.x.new_tensor(series.frequencies)
        self.factors = self.x.new_tensor(series.factors)

    def of(self, samples: slice, classes: slice) -> Tensor:
        """[n, classes, 2 M]."""
        x = self.x[samples, classes]
        made = x.new_empty(*x.shape, 2 * len(self.frequencies))
        sines, cosines = made.tensor_split(2, dim=2)
        torch.mul(x.unsqueeze(2), self.frequencies, out=cosines)
        torch.sin(cosines, out=sines)
        cosines.cos_()
        return made

    def through(self, back: Tensor, made: Tensor) -> Tensor:
        """The slope in x [n, classes] of what has the slope `back` in the sines."""
        sines, cosines = made.tensor_split(2, dim=2)
        to_sines, to_cosines = back.tensor_split(2, dim=2)
        return self.k * (torch.addcmul(to_sines * cosines, to_cosines, sines, value=-1) @ self.frequencies)


def sorted_sums(s: Tensor, t: Tensor, tau: Tau, weights: Tensor | None, slopes: bool, series: Series) -> Sums:
    """The sums of the form `hard_teacher`, of s, t [n, C], some frequencies and samples at a time."""
    _, k = tau.plain
    count = s.shape[1]
    t, order = t.sort(dim=1, descending=True)
    x = _centred(s, k).gather(1, order)
    assert spread(x, 1.0) <= 1.001 * series.reach, "the series does not reach as far as the logits"
    own = None if weights is None else weights.gather(1, order)
    frequencies, factors = x.new_tensor(series.frequencies), x.new_tensor(series.factors)
    total, slope = s.new_zeros(len(s)), torch.zeros_like(s) if slopes else None
    at_once = max(1, min(len(frequencies), _ELEMENTS // 4 // max(count, 1)))
    together = max(1, _ELEMENTS // 4 // (at_once * max(count, 1)))
    for start in range(0, len(s), together):
        at = slice(start, start + together)
        signs = _Signs(t[at], None if own is None else own[at].unsqueeze(1))
        for low in range(0, len(frequencies), at_once):
            w, b = frequencies[low : low + at_once], factors[low : low + at_once]
            angles = w.unsqueeze(1) * x[at].unsqueeze(1)  # [n, frequencies, C]
            sines, cosines = angles.sin(), angles.cos_()
            with_sines, with_cosines = signs.summed(sines), signs.summed(cosines)
            if slope is not None:
                pulls = torch.addcmul(cosines * with_cosines, sines, with_sines)
                slope[at] += k * (b * w) @ pulls
            pulls = sines.mul_(with_cosines).sub_(cosines.mul_(with_sines)).sum(2)
            total[at] += 0.5 * (pulls @ b)
    if slope is not None:
        slope = torch.empty_like(slope).scatter_(1, order, slope)
    return Sums(total, slope, None)


class _Signs:
    """sum_j w_ij sgn(t_i - t_j) x_j for every i, of classes in the teacher's order, by running sums."""

    def __init__(self, t: Tensor, own: Tensor | None):
        self.own, self.first, self.last = own, None, None
        if bool((t[:, 1:] == t[:, :-1]).any()):  # the tied classes of i stand at first .. last
            rising = (-t).contiguous()
            self.first = torch.searchsorted(rising, rising, right=False).unsqueeze(1)
            self.last = torch.searchsorted(rising, rising, right=True).unsqueeze(1).sub_(1)

    def summed(self, x: Tensor) -> Tensor:
        """Of x [n, frequencies, C]."""
        if self.own is None:
            return self._plain(x)
        return self._plain(x).mul_(self.own).add_(self._plain(self.own * x))

    def _plain(self, x: Tensor) -> Tensor:
        running = x.cumsum(2)
        whole = running[:, :, -1:]
        if self.first is None or self.last is None:
            return torch.sub(x, running, alpha=2).add_(whole)
        upto = running.gather(2, self.last.expand_as(x))
        first = self.first.expand_as(x)
        before = running.gather(2, first).sub_(x.gather(2, first))
        return (whole - upto).sub_(before)


def _most(t: Tensor, tau: Tau, weights: Tensor | None, series: Series) -> Tensor | None:
    """sum_{i<j} w_ij |phi(k D t)| [n] where it is the divisor: in the teacher's order its terms have one sign."""
    if not tau.normalize:
        return None
    return sorted_sums(t, t, tau, weights, False, series).total


def _centred(x: Tensor, k: float) -> Tensor:
    """k x about the middle of its range, [n, C]: angles stay small."""
    low, high = x.aminmax(dim=1, keepdim=True)
    wide = x.double()
    return ((wide - (low.double() + high.double()) / 2) * k).to(x.dtype)
