"""What is made of an accuracy matrix: R[i][j], in per cent, is the accuracy on test j after experience i.

Definitions differ between programs in what they pad, clip and change in place; these are the written ones, and change nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

Matrix = Sequence[Sequence[float]]


def average(matrix: Matrix) -> float:
    """AA: mean of the last row."""
    return fmean(matrix[-1])


def incremental_average(matrix: Matrix) -> float:
    """AIA: mean over experiences of the mean accuracy on the tests so far."""
    return fmean(fmean(row[: i + 1]) for i, row in enumerate(matrix))


def backward_transfer(matrix: Matrix) -> float:
    """BWT: mean of R[T-1][j] - R[j][j] over all tests but the last; below 0 something was forgotten."""
    return fmean(matrix[-1][j] - matrix[j][j] for j in range(len(matrix) - 1))


def forgetting(matrix: Matrix, clip: bool = False) -> float:
    """Mean of max_{j <= l <= T-2} R[l][j] - R[T-1][j] over all tests but the last. It may be below 0.

    `clip`: each difference at least 0, as programs have it that take the last row into the maximum.
    """
    last = len(matrix) - 1
    gaps = [max(matrix[i][j] for i in range(j, last)) - matrix[last][j] for j in range(last)]
    return fmean(max(0.0, gap) for gap in gaps) if clip else fmean(gaps)


def forward_transfer(matrix: Matrix, baseline: Sequence[float]) -> float:
    """FWT: mean of R[j-1][j] - b[j] over all tests but the first, b untrained. Without meaning where classes are unseen."""
    return fmean(matrix[j - 1][j] - baseline[j] for j in range(1, len(matrix)))


def pooled(matrix: Matrix, sizes: Sequence[int], i: int) -> float:
    """Accuracy on the union of the tests 0 … i after experience i."""
    return sum(n * a for n, a in zip(sizes[: i + 1], matrix[i][: i + 1], strict=True)) / sum(sizes[: i + 1])


def harmonic(old: float, new: float) -> float:
    """2 old new / (old + new), 0 where both are 0."""
    return 2 * old * new / (old + new) if old + new else 0.0
