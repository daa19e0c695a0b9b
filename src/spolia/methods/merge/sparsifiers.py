"""What the sparsify family keeps of a task vector: thresholds, coins, and the model-wide statistics behind them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from spolia.core.lazy import np, torch
from spolia.core.seeds import bernoulli, entropy, words16
from spolia.core.select import Count, Cut, cuts, cuts_of, ranks_in_rows
from spolia.core.settings import each, narrowed
from spolia.core.stream import Block, Stack

if TYPE_CHECKING:
    from torch import Tensor

Keep = Callable[[Block, "Tensor"], "Tensor"]  # (block, task vectors [experts, n]) -> what is kept of them, in place
Cuts = list[list[Cut]]  # per expert: the cut below which nothing is kept, then the one above which nothing is


@dataclass
class Survey:
    """Statistics of the whole model: thresholds (scope "model"), shares of ties by tensor, and the majority sign."""

    cuts: Cuts | None = None
    quotas: dict[str, list[list[int]]] = field(default_factory=dict)
    majority: float = 1.0


class Model(Protocol):
    """All tensors of a merge, as a survey sees them."""

    sizes: list[int]  # elements of each expert

    def sweep(self, count: Count, totals: Tensor) -> None:
        """`count(task vectors, totals)` for every block of every tensor; totals must be integers."""
        ...

    def each(self, function: Callable[[Stack], Any]) -> dict[str, Any]:
        """`function` of every tensor, by name in natural order."""
        ...

    def dtype(self) -> torch.dtype: ...


def survey(model: Model, settings: Any) -> Survey | None:
    """The statistics these settings need, in as many sweeps as they take; None when every tensor stands alone."""
    found = Survey()
    if settings.kind == "magnitude" and settings.scope == "model":
        ranks = [
            _ranks(n, d, g, settings.count)
            for n, d, g in zip(model.sizes, *_shares(settings, len(model.sizes)), strict=True)
        ]
        found.cuts = cuts(model.sweep, ranks, model.dtype())
        if settings.at_threshold == "exact" and any(cut.quota < cut.ties for row in found.cuts for cut in row):
            found.quotas = _share_out(model, found.cuts)
    if settings.elect and settings.zero_sign == "majority":
        votes = model.each(lambda stack: _votes(stack, settings, found))
        found.majority = -1.0 if sum(votes.values()) < 0 else 1.0
    elif found.cuts is None:
        return None
    return found


def _votes(stack: Stack, settings: Any, found: Survey) -> int:
    mine = narrowed(settings, stack.places)
    weight = torch.tensor(each(mine.weight, len(stack.experts)), dtype=stack.dtype).unsqueeze(1)
    keep, total = rescaled(stack, mine, found, weight)(), 0
    for block in stack.blocks(by_rows(mine)):
        total += int(keep(block, block.deltas()).sum(0).sign_().sum(dtype=torch.float64))
    return total


def _share_out(model: Model, wanted: Cuts) -> dict[str, list[list[int]]]:
    """How many ties each tensor may keep, when they are taken in natural order of the names."""

    def ties(stack: Stack) -> list[list[int]]:
        counts = [[0] * len(row) for row in wanted]
        for block in stack.blocks():
            for delta, place in zip(block.deltas(), stack.places, strict=True):
                for c, cut in enumerate(wanted[place]):
                    counts[place][c] += int((delta.abs() == cut.value).sum())
        return counts

    left = [[cut.quota for cut in row] for row in wanted]
    quotas = {}
    for name, counts in model.each(ties).items():
        take = [[min(a, b) for a, b in zip(*rows, strict=True)] for rows in zip(left, counts, strict=True)]
        left = [[a - b for a, b in zip(*rows, strict=True)] for rows in zip(left, take, strict=True)]
        quotas[name] = take
    return quotas


def rescaled(stack: Stack, settings: Any, found: Survey | None, factor: Tensor) -> Callable[[], Keep]:
    """What makes a fresh `keep` whose changes are made up for what it drops, times `factor` [experts, 1]."""
    sweep = sparsifier(stack, settings, found)
    if settings.rescale == "l1":
        ratio, bits = _l1_ratio(stack, settings, sweep)
        factor = factor * ratio
        if bits:
            return lambda: _remembered(bits, factor)

    def scaled() -> Keep:
        keep = sweep()
        return lambda block, deltas: keep(block, deltas).mul_(factor)

    return scaled


def _l1_ratio(stack: Stack, settings: Any, sweep: Callable[[], Keep]) -> tuple[Tensor, dict[int, list[np.ndarray]]]:
    """|tau_k|_1 / |kept_k|_1 of the tensor, [experts, 1]; and what was kept, a bit an element, if memory allows."""
    experts = len(stack.experts)
    before, after = torch.zeros(experts, dtype=torch.float64), torch.zeros(experts, dtype=torch.float64)
    remember = stack.numel * experts // 8 <= stack.spare_bytes
    bits: dict[int, list[np.ndarray]] = {}
    coins = _draws(stack, each(settings.density, experts)) if settings.kind == "random" else None
    keep, sizes = sweep(), torch.empty(0, dtype=stack.dtype)
    for block in stack.blocks(by_rows(settings)):
        deltas = block.deltas()
        sizes.resize_(deltas.shape)  # one buffer for all blocks
        before += torch.abs(deltas, out=sizes).sum(1)
        if coins is not None:
            kept = coins(block)
            for size, one in zip(sizes, kept, strict=True):
                size.mul_(torch.from_numpy(one.view(np.uint8)).to(size))
            after += sizes.sum(1)
        else:
            changes = keep(block, deltas)
            after += torch.abs(changes, out=sizes).sum(1)
            kept = list((changes != 0).numpy())
        if remember:
            bits[block.start] = [np.packbits(one) for one in kept]
    return torch.where((before < 1e-7) | (after < 1e-7), 1.0, before / after).to(stack.dtype).unsqueeze(1), bits


def _remembered(bits: dict[int, list[np.ndarray]], factor: Tensor) -> Keep:
    """Keeps what `bits` say, times `factor`: a byte looks up the factors of its eight elements."""
    ones = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1)  # [256, 8]
    tables = [ones * one for one in factor.numpy().ravel()]
    spare = [np.empty((0, 8), tables[0].dtype)]

    def keep(block: Block, deltas: Tensor) -> Tensor:
        for delta, packed, table in zip(deltas.numpy(), bits[block.start], tables, strict=True):
            if len(spare[0]) != packed.size:
                spare[0] = np.empty((packed.size, 8), table.dtype)
            factors = np.take(table, packed, axis=0, out=spare[0], mode="clip").ravel()  # another mode would copy
            np.multiply(delta, factors[: delta.size], out=delta)
        return deltas

    return keep


def by_rows(settings: Any) -> bool:
    """True where a block must hold whole rows."""
    return settings.kind == "magprune" or (settings.kind == "magnitude" and settings.scope == "row")


def sparsifier(stack: Stack, settings: Any, found: Survey | None) -> Callable[[], Keep]:
    """Makes a fresh `keep` for each sweep over the tensor (it may count what it has let through)."""
    experts = len(stack.experts)
    if settings.kind == "random":
        return lambda: _coins(stack, each(settings.density, experts), settings.rescale == "inverse_p")
    if settings.kind == "magprune":
        windows = list(zip(each(settings.density, experts), each(settings.epsilon, experts), strict=True))
        return lambda: _magprune(stack, windows, settings.rescale == "inverse_p")
    density, gamma = _shares(settings, experts)
    if settings.scope == "row":
        bands = [_band(stack.row, d, g, settings.count) for d, g in zip(density, gamma, strict=True)]
        return lambda: _row_bands(stack, bands)
    if settings.scope == "model" and found is not None and found.cuts is not None:
        chosen = [found.cuts[place] for place in stack.places]
    else:
        ranks = [_ranks(stack.numel, d, g, settings.count) for d, g in zip(density, gamma, strict=True)]
        chosen = cuts_of(stack, ranks) if stack.numel else [[] for _ in ranks]
    quotas = found.quotas.get(stack.name) if found is not None else None
    left = [quotas[p] for p in stack.places] if quotas else [[cut.quota for cut in row] for row in chosen]
    exact = settings.at_threshold == "exact"
    whole = [d >= 1 for d in density]
    return lambda: _thresholds(chosen, [list(row) for row in left], exact, whole)


def _shares(settings: Any, experts: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    return each(settings.density, experts), each(settings.gamma, experts)


def _band(n: int, density: float, gamma: float, count: str) -> tuple[int, int]:
    """How many of n elements, largest first, are dropped from the top, and how many come before the bottom is dropped."""
    if density <= 0 or n == 0:
        return 0, 0
    exact = density * n
    kept = {"round": round(exact), "floor": int(exact + 1e-9), "legacy": int(exact + 1e-9) + 1}[count]
    kept = max(1, min(n, kept))  # a bias of three elements keeps one
    top = min(int(gamma * n + 1e-9), n - kept)
    return top, top + kept


def _ranks(n: int, density: float, gamma: float, count: str) -> list[int]:
    top, last = _band(n, density, gamma, count)
    if last == 0 or density >= 1:
        return []
    return [last, top] if top else [last]


def _thresholds(chosen: Cuts, left: list[list[int]], exact: bool, whole: list[bool]) -> Keep:
    def keep(block: Block, deltas: Tensor) -> Tensor:
        for k, row in enumerate(chosen):
            if whole[k]:
                continue
            if not row:
                deltas[k].zero_()
                continue
            kept = _top(deltas[k], row[0], left[k], 0, exact)
            if len(row) > 1:
                kept = kept.sub_(_above(deltas[k], row[1], left[k], exact))
            deltas[k] = kept
        return deltas

    return keep


def _top(delta: Tensor, cut: Cut, left: list[int], c: int, exact: bool) -> Tensor:
    """The elements of `delta` at or above the cut, zeros elsewhere; of those that equal it only `left[c]` more."""
    if cut.value == 0:
        return delta.clone()
    if not exact or cut.quota == cut.ties:
        below = torch.nextafter(torch.tensor(cut.value, dtype=delta.dtype), torch.zeros((), dtype=delta.dtype))
        return torch.nn.functional.hardshrink(delta, float(below))
    kept = torch.nn.functional.hardshrink(delta, cut.value)
    if left[c] > 0:
        equal = np.flatnonzero(np.abs(delta.numpy()) == cut.value)[: left[c]]
        left[c] -= equal.size
        kept.numpy()[equal] = delta.numpy()[equal]
    return kept


def _above(delta: Tensor, cut: Cut, left: list[int], exact: bool) -> Tensor:
    """What is dropped from the top. Where ties straddle the cut, "all" means that all of them stay."""
    if not exact and cut.quota < cut.ties:
        return torch.nn.functional.hardshrink(delta, cut.value)
    return _top(delta, cut, left, 1, exact)


def _row_bands(stack: Stack, bands: list[tuple[int, int]]) -> Keep:
    def keep(block: Block, deltas: Tensor) -> Tensor:
        for delta, (top, last) in zip(deltas, bands, strict=True):
            rows = delta.view(-1, stack.row)
            if last < stack.row or top:  # of equal ones the lowest index counts as the largest
                rank = ranks_in_rows(rows.abs().flip(1)).flip(1)
                inside = (rank >= stack.row - last).logical_and_(rank < stack.row - top)
                np.multiply(rows.numpy(), inside.numpy(), out=rows.numpy())
        return deltas

    return keep


def _coins(stack: Stack, density: tuple[float, ...], inverse: bool) -> Keep:
    draws = _draws(stack, density)

    def keep(block: Block, deltas: Tensor) -> Tensor:
        for delta, coins, d in zip(deltas, draws(block), density, strict=True):
            if d < 1:
                values = delta.numpy()  # numpy multiplies by a mask four times faster than torch
                np.multiply(values, coins, out=values)
                if inverse and d > 0:
                    delta.div_(d)
        return deltas

    return keep


def _draws(stack: Stack, density: tuple[float, ...]) -> Callable[[Block], list[np.ndarray]]:
    """Whether each element of a block is kept, for every expert: bool [n] each."""
    roots = [entropy(stack.seed, stack.name, place) for place in stack.places]
    return lambda block: [
        bernoulli(root, block.start, block.stop, d) if d < 1 else np.ones(block.stop - block.start, bool)
        for root, d in zip(roots, density, strict=True)
    ]


def _magprune(stack: Stack, windows: list[tuple[float, float]], inverse: bool) -> Keep:
    roots = [entropy(stack.seed, stack.name, place) for place in stack.places]

    def keep(block: Block, deltas: Tensor) -> Tensor:
        for delta, root, (d, epsilon) in zip(deltas, roots, windows, strict=True):
            if d >= 1:
                continue
            if d <= 0:
                delta.zero_()
                continue
            rows = delta.view(-1, stack.row)
            level = keep_levels(ranks_in_rows(rows.abs()), stack.row, d, epsilon)  # of 65536
            words = torch.from_numpy(words16(root, block.start, block.stop).astype(np.float32)).view_as(rows)
            np.multiply(rows.numpy(), (words < level).numpy(), out=rows.numpy())
            if inverse:
                rows.mul_(65536.0).div_(level)
        return deltas

    return keep


def half_window(density: float, epsilon: float) -> float:
    """Epsilon, or as much of it as keeps the window's probabilities above 0 and at most 1."""
    return min(epsilon, density - 2**-16, 1 - density)


def keep_levels(rank: Tensor, row: int, density: float, epsilon: float) -> Tensor:
    """Keep-probability of each rank in 65536ths, rising linearly over a window that stays inside (0, 1]: fp32."""
    half = half_window(density, epsilon) if row > 1 else 0.0
    step = 2 * half / max(row - 1, 1)
    return rank.to(torch.float32).mul_(step * 65536).add_((density - half) * 65536).round_().clamp_(1, 65536)
