"""Labels: the bits that stand for a token, all of one length b = ceil(log2 V), and assignments that a language model likes.

In the order of the vocabulary, neighbours are similar strings and one wrong bit makes a likely word of a likely word. What
an error costs is bounded (Bhattacharyya, union over pairs) for a receiver that knows the model, by

    J = sum_{u < v} C_uv Z^d(u, v),    C_uv = E_context sqrt(P(u | context) P(v | context)),    Z = exp(-Eb/N0)

d being the Hamming distance of the labels, Eb/N0 that of a bit on the air. `aware_labels` lowers J by swaps: with W(x, y) =
Z^d(x, y), A_q what token a would cost at q's label, D_q what q would cost at a's, E the present costs,

    change of J = A_q + D_q - E_a - E_q - 2 C_aq + 2 C_aq W(a, q)      for all q at once; the best if below 0.

A is a product with W, which is a tensor power of [[1, Z], [Z, 1]]: 2^b b operations. Labels no token has can be swapped to.
The index order is the published one; permutation and assignment are ours.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch
from spolia.core.modulation import to_bits
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.textcode_confusion import Confusion


@dataclass(frozen=True, eq=False)
class Labels:
    """The label of every token, as a whole number whose bits are sent, the highest first."""

    codes: Tensor
    """int64 [V], all different."""
    width: int
    """b."""

    def __post_init__(self) -> None:
        codes = self.codes
        least, most = (int(codes.min()), int(codes.max())) if codes.numel() else (0, -1)
        if codes.unique().numel() != codes.numel() or not 0 <= least <= most < 1 << self.width:
            mend = f"different whole numbers from 0 to {(1 << self.width) - 1}, one for each token"
            raise SpoliaError("labels do not tell tokens apart", where="labels", mend=mend)

    def __len__(self) -> int:
        return self.codes.numel()

    @cached_property
    def bits(self) -> Tensor:
        """uint8 [V, b]."""
        return to_bits(self.codes, self.width)

    @cached_property
    def inverse(self) -> Tensor:
        """The token of every label [2^b]; -1 where there is none."""
        found = torch.full((1 << self.width,), -1, device=self.codes.device)
        found[self.codes] = torch.arange(len(self), device=self.codes.device)
        return found

    @property
    def fingerprint(self) -> str:
        raw = self.codes.cpu().numpy().astype("<i8").tobytes()
        return hashlib.blake2b(raw, digest_size=16, salt=str(self.width).encode()).hexdigest()

    def signs(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
        """1 - 2 bits [V, b]; made once for each type and device."""
        key = dtype or torch.float32, torch.device(device or self.codes.device)
        if key not in self._made:
            self._made[key] = 1 - 2 * self.bits.to(key[1], key[0])
        return self._made[key]

    def scores(self, llrs: Tensor) -> Tensor:
        """ln p(y | token), up to a term of y alone [..., V], from the LLRs of a label [..., b]."""
        return llrs @ self.signs(llrs.dtype, llrs.device).t() / 2

    @cached_property
    def _made(self) -> dict[tuple[torch.dtype, torch.device], Tensor]:
        return {}

    def to(self, device: torch.device | str) -> Labels:
        return Labels(self.codes.to(device), self.width)


def width_of(vocabulary: int) -> int:
    """b, bits that tell `vocabulary` tokens apart; at least 1."""
    return max((vocabulary - 1).bit_length(), 1)


def index_labels(vocabulary: int) -> Labels:
    """Token number as label."""
    return Labels(torch.arange(vocabulary), width_of(vocabulary))


def permuted_labels(vocabulary: int, rng: np.random.Generator) -> Labels:
    """Labels drawn at random without repetition from all 2^b."""
    width = width_of(vocabulary)
    return Labels(torch.from_numpy(rng.permutation(1 << width)[:vocabulary]), width)


def aware_labels(
    confusion: Confusion, ebn0_db: float, rng: np.random.Generator, sweeps: int = 3, movable: int | None = None
) -> Labels:
    """Labels of low J at `ebn0_db`, a local minimum of swaps or what `sweeps` reach, from a random start.

    `movable` tokens, those confused most, look for a better label; all by default. On the confusion's device, fp64.
    """
    start = permuted_labels(confusion.size, rng)
    swaps = _Swaps(confusion, start, ebn0_db)
    order = confusion.times(torch.ones(confusion.size, dtype=torch.float64, device=confusion.device))
    visits = order.argsort(descending=True, stable=True)[:movable].tolist()
    for _ in range(sweeps):
        if not sum([swaps.improve(token) for token in visits]):
            break
    return Labels(swaps.codes[: confusion.size].cpu(), start.width)


def bound(confusion: Confusion, labels: Labels, ebn0_db: float, repeats: Sequence[int] | None = None) -> float:
    """J; with `repeats` [b], bit j of a label is sent so many times."""
    codes = labels.codes.to(confusion.device)
    power = _powers(labels.width, ebn0_db, repeats).to(confusion.device)
    return float(confusion.costs(codes, power).sum()) / 2


def protected(confusion: Confusion, labels: Labels, ebn0_db: float, extra: int) -> tuple[int, ...]:
    """How often to send each bit of a label [b]: once, and `extra` bits a token where each lowers J most."""
    repeats = [1] * labels.width
    for _ in range(extra):
        tried = [[r + (i == j) for i, r in enumerate(repeats)] for j in range(labels.width)]
        repeats = min(tried, key=lambda chosen: bound(confusion, labels, ebn0_db, chosen))
    return tuple(repeats)


class _Swaps:
    """Labels under way, those without a token included, and what each token costs now."""

    def __init__(self, confusion: Confusion, start: Labels, ebn0_db: float):
        self.confusion, self.size, self.width = confusion, confusion.size, start.width
        free = (start.inverse < 0).nonzero().flatten()
        self.codes = torch.cat([start.codes, free]).to(confusion.device)  # [2^b]
        self.power = _powers(start.width, ebn0_db, None).to(confusion.device)
        self.z = float(self.power[1])
        self._refresh()

    def improve(self, token: int) -> bool:
        """Swap the token's label with the one that lowers J most, if any does."""
        row, own = self.confusion.row(token), self.codes[token]
        there = torch.zeros_like(self.power)
        there[self.codes[: self.size]] = row
        near = self.power[self.codes ^ own]  # W(q, a) [2^b]
        change = self._spread(there)[self.codes] - self.costs[token]
        change[: self.size] += self.confusion.times(near[: self.size]) - self.costs
        change[: self.size] += 2 * row * (near[: self.size] - 1)
        change[token] = 0.0
        other = int(change.argmin())
        if change[other] >= -1e-12 * self.scale:
            return False
        self._swap(token, other, row)
        return True

    def _swap(self, a: int, q: int, row: Tensor) -> None:
        """Exchange two labels and keep the costs right: other tokens' change by the two terms that moved."""
        known = self.codes[: self.size]
        old, new = self.codes[a].clone(), self.codes[q].clone()
        moved = self.power[known ^ new] - self.power[known ^ old]
        self.costs += row * moved
        if q < self.size:
            self.costs -= self.confusion.row(q) * moved
        self.codes[a], self.codes[q] = new, old
        for token in (a, q):
            if token < self.size:
                near = self.power[self.codes[: self.size] ^ self.codes[token]]
                self.costs[token] = self.confusion.row(token) @ near

    def _refresh(self) -> None:
        self.costs = self.confusion.costs(self.codes[: self.size], self.power)
        self.scale = float(self.costs.sum())

    def _spread(self, f: Tensor) -> Tensor:
        """W f, bit by bit."""
        for _ in range(self.width):
            pair = f.view(2, -1)
            f = (pair + self.z * pair.flip(0)).t().reshape(-1)  # the bit done goes to the end: after all, order is back
        return f


def _powers(width: int, ebn0_db: float, repeats: Sequence[int] | None) -> Tensor:
    """Z^(differing bits, each counted as often as it is sent) of every exclusive or of two labels [2^b], fp64."""
    weights = torch.ones(width) if repeats is None else torch.tensor(repeats)
    count = (to_bits(torch.arange(1 << width), width) * weights).sum(-1).double()
    return torch.exp(-(10 ** (ebn0_db / 10)) * count) if math.isfinite(ebn0_db) else (count == 0).double()
