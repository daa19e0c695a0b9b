"""The exact r-th largest magnitude of a stream, by histograms of float bits.

The bits of |x| read as an integer sort like the floats. A histogram of the highest 16 bits finds the bucket that holds
the wanted rank, one of the next 16 bits inside that bucket finds the next bits, and so on: two sweeps for fp32, four for
fp64, a few hundred kB whatever the size, exact always.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.stream import Stack

Count = Callable[["Tensor", "Tensor"], None]
Sweep = Callable[[Count, "Tensor"], None]
BINS = 1 << 16
SAMPLE = 1 << 17  # elements of each task vector looked at first


@dataclass(frozen=True)
class Cut:
    """The magnitude at a rank; `quota` of the `ties` elements that equal it belong to the top."""

    value: float
    quota: int
    ties: int


def cuts(sweep: Sweep, ranks: Sequence[Sequence[int]], dtype: torch.dtype) -> list[list[Cut]]:
    """Per row, the magnitudes at the given ranks (1 is the largest).

    `sweep(count, totals)` must call `count(block, totals)`, which adds to the int64 totals, for every block [rows, n] of
    the stream (fp32 or fp64); workers may count into totals of their own that are added up. Ranks lie in 1..length.
    """
    wide = dtype == torch.float64
    queries = [(row, rank) for row, wanted in enumerate(ranks) for rank in wanted]
    if not queries:
        return [[] for _ in ranks]
    prefix = [0] * len(queries)
    left = [rank for _, rank in queries]
    ties = [0] * len(queries)
    shifts = (48, 32, 16, 0) if wide else (16, 0)
    for shift in shifts:
        wanted = sorted({(row, prefix[q]) for q, (row, _) in enumerate(queries)})
        counts = torch.zeros(len(wanted), BINS, dtype=torch.int64)
        sweep(_counter(wanted, shift, first=shift == shifts[0]), counts)
        from_top = counts.flip(1).cumsum(1)  # [wanted, bins]; how many lie at or above each bin
        for q, (row, _) in enumerate(queries):
            line = wanted.index((row, prefix[q]))
            above = int(torch.searchsorted(from_top[line], left[q]))
            bucket = BINS - 1 - above
            left[q] -= int(from_top[line, above - 1]) if above else 0
            ties[q] = int(counts[line, bucket])
            prefix[q] = prefix[q] << 16 | bucket
    integer = torch.int64 if wide else torch.int32
    values = torch.tensor(prefix, dtype=integer).view(dtype).tolist()
    answers = iter(Cut(value, quota, tie) for value, quota, tie in zip(values, left, ties, strict=True))
    return [[next(answers) for _ in wanted] for wanted in ranks]


def cuts_of(stack: Stack, ranks: Sequence[Sequence[int]]) -> list[list[Cut]]:
    """`cuts` of one tensor's task vectors, mostly in a single sweep.

    A sample brackets each wanted magnitude; the sweep counts what lies above the bracket and collects what lies inside,
    about one element in a hundred. Where the bracket misses, as it may in tensors of odd structure, the histograms decide.
    """
    sample = stack.sample(SAMPLE)
    if sample is None:
        return cuts(stack.sweep, ranks, stack.dtype)
    bands = [[_Band.around(row, rank, stack) for rank in wanted] for row, wanted in zip(sample, ranks, strict=True)]
    for block in stack.blocks():
        for magnitudes, wanted in zip(block.deltas().abs_().numpy(), bands, strict=True):
            for band in wanted:
                band.take(magnitudes)
    found = [[band.cut() for band in wanted] for wanted in bands]
    if any(cut is None for wanted in found for cut in wanted):
        return cuts(stack.sweep, ranks, stack.dtype)
    return [[cut for cut in wanted if cut is not None] for wanted in found]


def cut_of_nonzero(stack: Stack, magnitudes: Callable[[Tensor], Tensor], share: float) -> Cut | None:
    """The cut that leaves `share` of the `magnitudes` [n] of one tensor's task vectors that are not zero; None: nothing.

    How many are not zero is counted in the sweep that collects those inside the sample's bracket.
    """
    sample, nonzero = stack.sample(SAMPLE), 0
    seen = magnitudes(sample) if sample is not None else torch.zeros(1)
    guess = max(1, round(share * stack.numel * int(seen.count_nonzero()) / len(seen)))
    band = _Band.around(seen, guess, stack) if sample is not None else None
    for block in stack.blocks():
        found = magnitudes(block.deltas()).numpy()
        nonzero += int(np.count_nonzero(found))
        if band is not None:
            band.take(found)
    rank = int(share * nonzero + 1e-9)
    if rank == 0:
        return None
    if band is not None:
        band.rank = rank
        if (cut := band.cut()) is not None:
            return cut

    def sweep(count: Count, totals: Tensor) -> None:
        for block in stack.blocks():
            count(magnitudes(block.deltas()).unsqueeze(0), totals)

    return cuts(sweep, [[rank]], stack.dtype)[0][0]


@dataclass
class _Band:
    """Magnitudes between `low` and `high`, collected, and counts of those above and at either end: what decides a rank.

    Where many elements share one magnitude, as changes of bf16 models do, it is mostly an end, and costs no room.
    """

    rank: int
    low: float
    high: float
    inside: np.ndarray  # room for those strictly between
    filled: int = 0
    above: int = 0
    at_high: int = 0
    at_low: int = 0

    @classmethod
    def around(cls, sample: Tensor, rank: int, stack: Stack) -> _Band:
        """The sample's magnitudes four standard deviations to either side of the wanted one."""
        count, share = len(sample), rank / stack.numel
        spread = 4 * (count * share * (1 - share)) ** 0.5 + 2
        low, high = count - 2 - int(share * count + spread), count - 1 - int(share * count - spread)
        places = [place for place in (low, high) if 0 <= place < count]
        ordered = np.partition(sample.abs().numpy(), places) if places else np.empty(0)
        room = int(3 * spread / count * stack.numel) + 1024
        return cls(
            rank,
            float(ordered[low]) if low >= 0 else 0.0,
            float(ordered[high]) if high < count else float("inf"),
            np.empty(min(room, stack.numel), sample.numpy().dtype),
        )

    def take(self, magnitudes: np.ndarray) -> None:
        above, from_high = magnitudes > self.high, magnitudes >= self.high
        self.above += (larger := int(np.count_nonzero(above)))
        self.at_high += int(np.count_nonzero(from_high)) - larger
        if self.low == self.high:
            return
        over_low = magnitudes > self.low
        self.at_low += int(np.count_nonzero(magnitudes >= self.low)) - int(np.count_nonzero(over_low))
        more = magnitudes[over_low ^ from_high]
        stop = self.filled + len(more)
        if stop <= len(self.inside):
            self.inside[self.filled : stop] = more
        self.filled = stop

    def cut(self) -> Cut | None:
        """The cut at the rank; None where the bracket missed it, or held more than there was room for."""
        left = self.rank - self.above
        if not 0 < left <= self.at_high + self.filled + self.at_low:
            return None
        if left <= self.at_high:
            return Cut(self.high, left, self.at_high) if np.isfinite(self.high) else None
        left -= self.at_high
        if left > self.filled:
            return Cut(self.low, left - self.filled, self.at_low)
        if self.filled > len(self.inside):
            return None
        inside = self.inside[: self.filled]
        inside.partition(len(inside) - left)
        value = inside[len(inside) - left]
        larger = int(np.count_nonzero(inside > value))
        return Cut(float(value), left - larger, int(np.count_nonzero(inside == value)))


def _counter(wanted: list[tuple[int, int]], shift: int, first: bool) -> Count:
    def count(block: Tensor, totals: Tensor) -> None:
        bits = block.view(torch.int64 if block.dtype == torch.float64 else torch.int32)
        for line, (row, prefix) in enumerate(wanted):
            if first:  # the sign bit goes
                found = torch.bincount((bits[row] >> shift).bitwise_and_(0x7FFF), minlength=1 << 15)
                totals[line, : 1 << 15] += found
            else:  # only elements that share the bits found so far
                array, above = bits[row].numpy(), shift + 16
                same = (array & (((1 << 8 * array.itemsize - 1) - 1) >> above << above)) == prefix << above
                lower = torch.from_numpy(array[same])
                if len(lower):
                    totals[line] += torch.bincount((lower >> shift).bitwise_and_(BINS - 1), minlength=BINS)

    return count


def ranks_in_rows(magnitudes: Tensor) -> Tensor:
    """Rank of each element in its row, 0 for the smallest, equal ones in index order. [rows, n] -> int32 [rows, n]."""
    rows, n = magnitudes.shape
    if magnitudes.dtype == torch.float64:
        order = magnitudes.argsort(dim=1, stable=True)
    else:  # bits above, index below: one plain sort of integers, several times faster than an argsort
        keys = (magnitudes.view(torch.int32).to(torch.int64) << 32).bitwise_or_(torch.arange(n))
        keys.numpy().sort(axis=1)
        order = keys.bitwise_and_(0xFFFFFFFF)
    places = torch.arange(n, dtype=torch.int32).expand(rows, n)
    return torch.empty(rows, n, dtype=torch.int32).scatter_(1, order, places)
