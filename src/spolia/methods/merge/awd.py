"""AWD, adaptive weight disentanglement: take from every task vector what all share, so that the rest disturb each other less.

For experts of one base whose task vectors point in similar directions. Xiong et al., Multi-Task Model Merging via Adaptive
Weight Disentanglement, arXiv 2411.18729. For a group of weights (the whole model, a tensor, a row):

    min_delta  mean_{i != j} |cos(tau_i - delta, tau_j - delta)| + alpha |delta|_2,     delta = 0 at the start
    theta = theta_0 + lambda sum_k w_k (tau_k - delta)

Every gradient is a combination of the task vectors, so delta = sum_k a_k tau_k throughout and all that is needed is the
Gram matrix G of the group. With u = G a, q = a.u, D_ij = G_ij - u_i - u_j + q, n_i^2 = D_ii, C = D / (n_i n_j), S = sign C:

    c_i = -2 / (K (K - 1)) [ sum_j S_ij / (n_i n_j) - sum_j S_ij C_ij / n_i^2 ]
    a <- a - beta_t (c - (sum c) a),   a <- a max(0, 1 - beta_t alpha / sqrt(q)),   beta_t = beta (1 - t / T)

| paper | here |
|---|---|
| tau_k | row k of `block.deltas()` |
| delta | `coefficients` a of the task vectors |
| alpha, beta, T | `settings.alpha`, `step_size`, `steps` |
| lambda | `settings.scale` |

Data touched: none. Departures: `solver: prox` with a decaying step ends at the kink of |cos|, where the paper's fixed step
(`solver: paper`) oscillates around it; it works in units of the group's rms norm, so that one alpha suits all groups. The
paper does not say its granularity in what we could read and published no code; rows are what its authors' later code has.
With one group the result is task arithmetic with the weights w_k - a_k sum_i w_i. Cosines below 1e-7 count as zero, experts
that moved a group by less than a thousandth of the others take no part in it, and delta = 0 where the steps end higher than
they began: in dead channels of a network vectors differ by many orders of magnitude.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import field_validator

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, PerModel, Settings, each, setting
from spolia.core.stream import Block, Stack, Stopped
from spolia.methods.merge.matrices import VOCABULARY

if TYPE_CHECKING:
    from torch import Tensor

_XIONG = "Xiong et al. 2024"
_SPEC = "our choice, in units of the group's rms norm"
_DEAD = 1e-7  # cosines below it are rounding: orthogonal vectors must stay as they are
_STILL = 1e-3  # of the group's rms norm: a task vector below it takes no part, as no step is small enough for it
_ZERO = 1e-12  # of a task vector's norm: a remainder below it has no direction
_GROUPS = 1024  # solved together: what they need stays in the cache
_FEW = 256  # rows below which a tensor is solved with others: alone, its steps would be calls more than arithmetic


class Disentangling(Settings):
    """What the shared vectors follow from: settings of `awd` as a preprocessing."""

    granularity: Literal["global", "tensor", "row"] = setting(
        "row", "what one shared vector is sought for", source="the authors' later code"
    )
    alpha: float = setting(0.1, "weight of the shared vector's length", source=f"{_XIONG}, through a third party", ge=0)
    solver: Literal["prox", "paper"] = setting(
        "prox", "decaying proximal steps, or the paper's fixed ones", source=_SPEC
    )
    step_size: float | None = setting(
        None, "beta; by default 0.02 for prox, 0.01 for paper", source=f"{_SPEC}; {_XIONG}", gt=0
    )
    steps: int | None = setting(None, "T; by default 500 for prox, 300 for paper", source=f"{_SPEC}; {_XIONG}", ge=0)
    momentum: float = setting(0.0, "of the paper's steps", source=_XIONG, ge=0, lt=1)
    exclude: str = setting(
        VOCABULARY,
        "regular expression; tensors whose name it finds are summed as they are, unless the group is the whole model",
        source="our choice",
    )

    @field_validator("exclude")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    @property
    def elementwise(self) -> bool:
        return self.granularity != "row"

    @property
    def whole_rows(self) -> bool:
        return self.granularity == "row"

    def takes(self, name: str, shape: tuple[int, ...]) -> bool:
        """Whether a tensor has a shared vector of its own: matrices and kernels outside the vocabulary."""
        if self.granularity == "global":
            return True
        return len(shape) > 1 and not (self.exclude and re.search(self.exclude, name))


class Awd(Disentangling, MergeSettings):
    """Settings of `awd`."""

    vectors: ClassVar[bool] = True
    scale: float = setting(0.3, "lambda, factor of the summed remainders", source="as task_arithmetic")
    weight: PerModel = setting(1.0, "factor of each remainder", source=_XIONG)


@dataclass(frozen=True)
class Disentangled:
    """What the survey found: a [groups, experts] by tensor (`everywhere`: of all others), and how orthogonal groups are."""

    coefficients: Mapping[str, Tensor]
    everywhere: Tensor | None
    facts: Mapping[str, float]

    def of(self, stack: Stack) -> Tensor:
        """a [groups, experts] of a tensor's experts, fp64: one group, or one a row; zero where nothing is shared."""
        if (own := self.coefficients.get(stack.name)) is not None:
            return own
        if self.everywhere is not None:
            return self.everywhere[:, stack.places]
        return torch.zeros(1, len(stack.experts), dtype=torch.float64)


def awd(stack: Stack, settings: Awd, found: Disentangled) -> Iterator[tuple[Block, Tensor]]:
    """Merged blocks of one tensor: [n] each."""
    weights = torch.tensor(each(settings.weight, len(stack.experts)), dtype=torch.float64)
    factors = settings.scale * (weights - found.of(stack) * weights.sum())  # of the task vectors [groups, experts]
    factors = factors.to(stack.dtype)
    if len(factors) == 1:
        for block in stack.blocks():
            assert block.base is not None
            yield block, torch.addmv(block.base, block.deltas().t(), factors[0])
        return
    row = stack.numel // len(factors)
    for block in _as_matrix(stack).blocks(whole_rows=True):
        assert block.base is not None
        own = factors[block.start // row : block.stop // row].t().unsqueeze(2)  # [experts, rows, 1]
        change = block.deltas().view(len(own), -1, row).mul_(own).sum(0)
        yield block, block.base.add_(change.reshape(-1))


def remainders(stack: Stack, settings: Disentangling, found: Disentangled) -> Iterator[tuple[Block, Tensor]]:
    """Task vectors without what they share, each by itself: blocks [experts, n].

    Products and sums are rounded one by one: no bit hangs on where blocks begin, so every sweep meets the same numbers.
    """
    shared = found.of(stack).to(stack.dtype)  # [groups, experts]
    grouped = replace(stack, shape=(len(shared), stack.numel // len(shared)))
    for block in grouped.blocks(whole_rows=len(shared) > 1):
        vectors = block.deltas()
        row = grouped.row if len(shared) > 1 else vectors.shape[1]
        own = shared[block.start // row : block.stop // row] if len(shared) > 1 else shared
        parts = vectors.view(len(vectors), -1, row)  # [experts, rows, n]
        common = torch.zeros_like(parts[0])
        for part, factor in zip(parts, own.t().unsqueeze(2), strict=True):
            common += part * factor
        parts -= common
        yield block, vectors


def survey(model: Any, settings: Disentangling) -> Disentangled:
    """The coefficients of every group, from one read of all models."""
    if settings.granularity == "global":
        count = len(model.sizes)
        gram = torch.zeros(1, count, count, dtype=torch.float64)
        for own, places in model.each(lambda stack: (_grams(stack, settings), stack.places)).values():
            gram[:, torch.tensor(places)[:, None], places] += own  # in one order, whatever the threads
        everywhere, seen = disentangle(gram, settings)
        return Disentangled({}, everywhere, _facts([seen]))

    def solve(stack: Stack) -> Tensor | tuple[Tensor, Tensor]:
        grams = _grams(stack, settings)
        return grams if len(grams) < _FEW else disentangle(grams, settings, stack.stop)

    found = model.each(solve)
    solved = found | _together({name: own for name, own in found.items() if not isinstance(own, tuple)}, settings)
    coefficients = {name: a for name, (a, _) in solved.items() if len(a)}
    return Disentangled(coefficients, None, _facts([seen for _, seen in solved.values()]))


def disentangle(grams: Tensor, settings: Disentangling, stop: threading.Event | None = None) -> tuple[Tensor, Tensor]:
    """a [groups, experts] of the shared vectors, fp64, from Gram matrices [groups, experts, experts].

    And for every group the mean |cos| of the task vectors, that of the remainders, and |delta| over the mean norm of the
    task vectors: [groups, 3]. Where fewer than two experts changed anything, a = 0.
    """
    a, seen = torch.zeros(grams.shape[:2], dtype=torch.float64), torch.zeros(len(grams), 3, dtype=torch.float64)
    for part in torch.arange(len(grams)).split(_GROUPS) if grams.shape[1] > 1 else ():
        side_by_side = grams[part].double().permute(1, 2, 0).contiguous()  # [experts, experts, groups]
        a[part], seen[part] = _solve(side_by_side, settings, stop)
    return a, seen


def _solve(gram: Tensor, settings: Disentangling, stop: threading.Event | None) -> tuple[Tensor, Tensor]:
    """As `disentangle`, for groups side by side: every step is a few long loops over them."""
    prox = settings.solver == "prox"
    if prox:
        gram = gram / gram.diagonal().mean(1).clamp(min=torch.finfo(gram.dtype).tiny)
    pairs = _Pairs(gram)
    a, u, q = torch.zeros_like(pairs.own), torch.zeros_like(pairs.own), torch.zeros_like(pairs.own[0])
    before, push = pairs.mean_cosine(u, q), 0.0
    steps = settings.steps if settings.steps is not None else 500 if prox else 300
    size = settings.step_size if settings.step_size is not None else 0.02 if prox else 0.01
    for step in range(steps):
        if stop is not None and stop.is_set():
            raise Stopped
        c = pairs.slope(u, q)
        slope = c - c.sum(0) * a
        beta = size * (1 - step / steps)
        if prox:
            a = a - beta * slope
        else:
            push = settings.momentum * push + slope + settings.alpha * torch.where(q > 0, a / q.sqrt(), 0.0)
            a = a - size * push
        u = (gram * a).sum(1)
        q = (a * u).sum(0).clamp_(min=0)  # |delta|^2
        if prox:
            shrink = (1 - beta * settings.alpha / q.sqrt()).clamp_(min=0).nan_to_num_(0.0)  # delta = 0 stays so
            a, u, q = a * shrink, u * shrink, q * shrink.square()
    worse = pairs.cost(u, q, settings.alpha) > pairs.cost(torch.zeros_like(u), torch.zeros_like(q), settings.alpha)
    a, u, q = (x.masked_fill(worse, 0.0) for x in (a, u, q))
    length = q.sqrt() / pairs.own.sqrt().mean(0).clamp(min=torch.finfo(gram.dtype).tiny)
    return a.t(), torch.stack([before, pairs.mean_cosine(u, q), length], dim=1)


class _Pairs:
    """The K (K - 1) / 2 pairs of experts, for groups side by side. What hardly moved has no direction and takes no part."""

    def __init__(self, gram: Tensor):
        count = len(gram)
        self.i, self.j = torch.triu_indices(count, count, 1)
        self.gram, self.own = (
            gram[self.i, self.j],
            gram.diagonal().t().contiguous(),
        )  # [pairs, groups], [experts, groups]
        self.floor = _STILL**2 * self.own.mean(0)  # of a squared norm
        self.members = torch.zeros(count, len(self.i), dtype=gram.dtype)  # 1 where an expert is of a pair
        self.members[self.i, range(len(self.i))] = self.members[self.j, range(len(self.i))] = 1.0

    def cosines(self, u: Tensor, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """C and 1 / (n_i n_j) of every pair [pairs, groups], 1 / n_i of every expert."""
        squared = self.own - 2 * u + q
        inverse = torch.where((self.own > self.floor) & (squared > _ZERO**2 * self.own), squared.rsqrt(), 0.0)
        product = inverse[self.i] * inverse[self.j]
        return (self.gram - u[self.i] - u[self.j] + q) * product, product, inverse

    def slope(self, u: Tensor, q: Tensor) -> Tensor:
        """c [experts, groups]."""
        cosines, product, inverse = self.cosines(u, q)
        live = cosines.abs() > _DEAD
        pulls = self.members @ (cosines.sign() * product * live)
        return (pulls - inverse.square() * (self.members @ (cosines.abs() * live))) / -len(self.i)

    def cost(self, u: Tensor, q: Tensor, alpha: float) -> Tensor:
        """What is minimised [groups]."""
        return self.cosines(u, q)[0].abs().sum(0) / len(self.i) + alpha * q.sqrt()

    def mean_cosine(self, u: Tensor, q: Tensor) -> Tensor:
        """Mean |C| over the pairs that have one [groups]."""
        cosines, product, _ = self.cosines(u, q)
        return cosines.abs().sum(0) / (product > 0).sum(0).clamp(min=1)


def _together(grams: dict[str, Tensor], settings: Disentangling) -> dict[str, tuple[Tensor, Tensor]]:
    """The tensors' groups solved side by side, those with equally many experts."""
    solved = {}
    for count in sorted({gram.shape[1] for gram in grams.values()}):
        own = {name: gram for name, gram in grams.items() if gram.shape[1] == count}
        sizes = [len(gram) for gram in own.values()]
        a, seen = (found.split(sizes) for found in disentangle(torch.cat(list(own.values())), settings))
        solved |= dict(zip(own, zip(a, seen, strict=True), strict=True))
    return solved


def _grams(stack: Stack, settings: Disentangling) -> Tensor:
    """G of every group of a tensor [groups, experts, experts], fp64; no group where it has no shared vector."""
    count, rows = len(stack.experts), settings.granularity == "row"
    if not settings.takes(stack.name, stack.shape) or (rows and not stack.numel):
        return torch.zeros(0, count, count, dtype=torch.float64)
    if not rows:
        total = torch.zeros(1, count, count, dtype=torch.float64)
        for block in stack.blocks():
            wide = block.deltas().double()
            total[0].addmm_(wide, wide.t())
        return total
    stack, grams = _as_matrix(stack), []
    for block in stack.blocks(whole_rows=True):
        vectors = block.deltas().double().view(count, -1, stack.row).transpose(0, 1)  # [rows, experts, n]
        grams.append(vectors @ vectors.mT)
    return torch.cat(grams)


def _as_matrix(stack: Stack) -> Stack:
    """The same tensor [out, rest], as kernels are read here."""
    return replace(stack, shape=(stack.shape[0], stack.numel // stack.shape[0]))


def _facts(seen: list[Tensor]) -> dict[str, float]:
    """Means over all groups."""
    rows = torch.cat([part for part in seen if len(part)]) if any(len(part) for part in seen) else torch.zeros(1, 3)
    names = ("mean |cos| of task vectors", "mean |cos| of remainders", "|delta| over mean norm")
    return dict(zip(names, rows.mean(0).tolist(), strict=True))
