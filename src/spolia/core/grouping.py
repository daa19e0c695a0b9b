"""Groups of items by how unlike they are: items that differ together, items that are alike together, or by chance.

    within(D, groups) = mean of D_ij over all pairs of items that share a group

| way | what it does |
|---|---|
| balanced | equal sizes; from a random start the swap of two items that raises `within` most, until none does |
| homogeneous | the same with the swap that lowers it most |
| spectral | spectral clustering of D taken for an affinity (scikit-learn): sizes as they come (TGR, arXiv 2405.16560) |
| random | equal sizes, by chance |

Sizes of equal groups differ by one at most. D [n, n] is symmetric; its diagonal is not looked at. Adding a number to all of
D, or multiplying it by one above 0, leaves the equal groups as they are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

Way = Literal["balanced", "homogeneous", "spectral", "random"]
RESTARTS = 8  # random starts of a swap search; the best end counts
_SPECTRAL_STARTS = 30  # of k-means, as in the released code


def grouped(dissimilarity: Tensor, groups: int, way: Way, draws: np.random.Generator) -> list[list[int]]:
    """Places of every group, in rising order; the groups by their first place. All items are in exactly one."""
    count = len(dissimilarity)
    if dissimilarity.shape != (count, count) or not torch.isfinite(dissimilarity).all():
        what = f"{list(dissimilarity.shape)}, or not finite"
        raise SpoliaError(what, where="dissimilarity", mend="give a number for each pair of items")
    if not 1 <= groups <= count:
        raise SpoliaError(f"{groups} groups of {count} items", where="groups", mend=f"choose 1 to {count}")
    d = dissimilarity.detach().double().cpu().numpy()
    d = (d + d.T) / 2
    np.fill_diagonal(d, 0.0)
    if way == "random":
        labels = _equal(count, groups, draws)
    elif way == "spectral":
        labels = _spectral(d, groups, int(draws.integers(2**31)))
    else:
        sign = 1.0 if way == "balanced" else -1.0
        ends = [_swapped(sign * d, _equal(count, groups, draws)) for _ in range(RESTARTS)]
        labels = max(ends, key=lambda end: sign * _total(d, end))
    found = [np.flatnonzero(labels == label).tolist() for label in np.unique(labels)]
    return sorted(found)


def within(dissimilarity: Tensor, groups: list[list[int]]) -> float:
    """Mean dissimilarity of the pairs that share a group; 0 where no two do."""
    pairs = sum(len(group) * (len(group) - 1) for group in groups)
    total = 0.0
    for group in groups:
        part = dissimilarity[group][:, group].double()
        total += float(part.sum() - part.diagonal().sum())
    return total / pairs if pairs else 0.0


def _equal(count: int, groups: int, draws: np.random.Generator) -> np.ndarray:
    """Labels [count] of groups whose sizes differ by one at most."""
    return draws.permutation(np.arange(count) % groups)


def _total(d: np.ndarray, labels: np.ndarray) -> float:
    return float((d * (labels[:, None] == labels)).sum())


def _swapped(d: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Labels after swaps, each the one that raises the sum of d within groups most."""
    labels, items = labels.copy(), np.arange(len(labels))
    least = 1e-12 * max(1.0, float(np.abs(d).max()))  # below is rounding, and swaps could go round for ever
    member = np.eye(labels.max() + 1)[labels]  # [n, groups]
    while True:
        near = d @ member  # [n, groups]: to all of a group
        own = near[items, labels]
        there = near[:, labels]  # [i, j]: of i to the group of j
        gain = there + there.T - 2 * d - own[:, None] - own
        gain[labels[:, None] == labels] = 0.0
        i, j = np.unravel_index(int(gain.argmax()), gain.shape)
        if gain[i, j] <= least:
            return labels
        labels[[i, j]] = labels[[j, i]]
        member[[i, j]] = member[[j, i]]


def _spectral(d: np.ndarray, groups: int, seed: int) -> np.ndarray:
    try:
        from sklearn.cluster import SpectralClustering
    except ImportError:
        mend = "pip install 'spolia[digits]', or take balanced"
        raise SpoliaError("spectral groups need scikit-learn", where="grouping", mend=mend) from None
    if d.min() < 0:
        raise SpoliaError("is negative somewhere", where="dissimilarity", mend="take balanced, which does not mind")
    tool = SpectralClustering(groups, affinity="precomputed", n_init=_SPECTRAL_STARTS, random_state=seed)
    return tool.fit_predict(d)
