"""Search for the likeliest text: the M-algorithm over a prior, batched over frames, and its greedy form in few passes.

    score(x_1 … x_t) = score(x_1 … x_{t-1}) + alpha ln P(x_t | x_<t) + l_t(x_t)

Of all continuations of a frame's hypotheses the best `width` go on; those `threshold` nats behind the best do not (the
T-algorithm). Anderson and Mohan, Sequential coding algorithms: a survey and cost analysis, 1984. Scores are not renormalised
and have no length penalty: all hypotheses explain the same samples. A beam is exact only where width >= V^(T-1).

Tokens are pruned exactly before the choice: ln P <= 0, so a token whose l_t, added to the best hypothesis, stays below the
width-th candidate found among the tokens nearest to what was heard cannot enter.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.prior import Contexts, Prior

    Heard = Callable[[int], Tensor]
    """l_t of every token at place t [N, V]."""


_WEIGHED = 8  # continuations of a row, at least, by which the weight of what is dropped is reckoned


@dataclass(frozen=True)
class Width:
    """How a search is cut down."""

    most: int = 16
    """Hypotheses of a frame that go on."""
    threshold: float = math.inf
    """Nats behind the best."""
    near: int = 256
    """Tokens nearest to what was heard that are looked at first; all of them where that is not enough."""


@dataclass(frozen=True, eq=False)
class Found:
    """Texts of N frames, the best first: tokens [N, B, T], scores [N, B], -inf where there are fewer than B."""

    tokens: Tensor
    scores: Tensor
    log_kept: Tensor
    """ln of the share of the candidates' weight that stayed, multiplied over all places [N]."""
    rows: int
    """Hypotheses read by the prior."""
    calls: int


def beam(heard: Heard, length: int, prior: Prior, contexts: Contexts, alpha: float, width: Width) -> Found:
    """The M-algorithm: frames [N] of `length` tokens, each after its context."""
    reading = prior.start(contexts, length)
    log_p = reading.log_probs  # [rows, V]
    frames, device = len(contexts), log_p.device
    rows, count = _Rows.even(frames, 1, device), frames
    score, log_kept = torch.zeros(frames, device=device), torch.zeros(frames, device=device)
    tokens = torch.empty(frames, 0, dtype=torch.long, device=device)
    best, live = score[:, None], torch.ones(frames, 1, dtype=torch.bool, device=device)
    for t in range(length):
        best, parents, chosen, weight = _continued(log_p, heard(t).to(device), score, rows, alpha, width)
        live = (best >= best[:, :1] - width.threshold) & (best > -math.inf)  # [N, k]
        if bool(live.all()):
            kept, parents, chosen, score = best, parents.flatten(), chosen.flatten(), best.flatten()
            rows = rows if rows.each == best.shape[1] else _Rows.even(frames, best.shape[1], device)
        else:
            if not bool(live[:, 0].all()):
                raise SpoliaError(f"no token is possible at place {t}", where="prior", mend="one that is nowhere zero")
            kept, parents, chosen, score = best.masked_fill(~live, -math.inf), parents[live], chosen[live], best[live]
            rows = _Rows.of(rows.owner[parents], frames)
        log_kept += kept.logsumexp(1) - weight
        tokens = torch.cat([tokens[parents], chosen[:, None]], dim=1)
        if t + 1 < length:
            log_p = reading.step(parents, chosen)
            count += len(chosen)
    table = tokens.new_zeros(*best.shape, length)
    table[live] = tokens
    table = torch.where(live[:, :, None], table, table[:, :1])
    return Found(table, torch.where(live, best, -math.inf), log_kept.clamp(max=0.0), count, length)


@dataclass(frozen=True, eq=False)
class _Rows:
    """Which frame a row is of: rows of a frame stand together, best first."""

    owner: Tensor
    first: Tensor
    """Row at which each frame begins [N]."""
    slot: Tensor
    """Place of a row in its frame."""
    each: int | None
    """Rows of every frame; None where they differ."""

    @classmethod
    def even(cls, frames: int, each: int, device: torch.device) -> _Rows:
        every = torch.arange(frames * each, device=device)
        return cls(every // each, every[::each], every % each, each)

    @classmethod
    def of(cls, owner: Tensor, frames: int) -> _Rows:
        first = torch.searchsorted(owner, torch.arange(frames, device=owner.device))
        return cls(owner, first, torch.arange(len(owner), device=owner.device) - first[owner], None)

    def spread(self, values: Tensor) -> Tensor:
        """What is known of frames [N, C], for every row [rows, C]."""
        return values.expand(len(self.owner), -1) if len(values) == 1 else values[self.owner]

    def table(self, values: Tensor) -> Tensor:
        """Values of rows [rows, C] by frame [N, k C], -inf where there is no row."""
        if self.each is not None:
            return values.view(len(self.first), -1)
        found = values.new_full((len(self.first), int(self.slot.max()) + 1, values.shape[1]), -math.inf)
        found[self.owner, self.slot] = values
        return found.flatten(1)


def _continued(
    log_p: Tensor, heard: Tensor, score: Tensor, rows: _Rows, alpha: float, width: Width
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best continuations of every frame, in order [N, k]: score, row, token; and the log-weight of the candidates."""
    columns = max(width.near, width.most, _WEIGHED)
    if heard.shape[1] <= 2 * columns:
        return _chosen(*_all(log_p, rows.spread(heard), score, alpha, width), rows, width)
    near, tokens = heard.topk(columns + 1)  # [N, columns + 1], best first
    at = rows.spread(tokens[:, :-1])  # [rows, columns]
    values = torch.add(rows.spread(near[:, :-1]), log_p.gather(1, at), alpha=alpha).add_(score[:, None])
    found = _chosen(values, at, rows, width)
    # of tokens not looked at: ln P <= 0, and a frame's best hypothesis stands first
    unsure = near[:, -1] + score[rows.first] >= found[0][:, -1]
    if not bool(unsure.any()):
        return found
    own = unsure[rows.owner].nonzero()[:, 0]
    every, which = _all(log_p[own], heard[rows.owner[own]], score[own], alpha, width)
    values[own], at = -math.inf, at.clone()
    values[own, : every.shape[1]], at[own, : every.shape[1]] = every, which
    return _chosen(values, at, rows, width)


def _all(log_p: Tensor, heard: Tensor, score: Tensor, alpha: float, width: Width) -> tuple[Tensor, Tensor]:
    """Every row's best continuations among all tokens [rows, k]: values and tokens."""
    values = torch.add(heard, log_p, alpha=alpha).add_(score[:, None])
    return values.topk(min(max(width.most, _WEIGHED), values.shape[1]))


def _chosen(values: Tensor, tokens: Tensor, rows: _Rows, width: Width) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of candidates [rows, C] the best of every frame."""
    flat, columns = rows.table(values), values.shape[1]
    best, at = flat.topk(min(width.most, flat.shape[1]))
    row = rows.first[:, None] + at.div(columns, rounding_mode="floor")
    if rows.each is None:
        row = row.clamp(max=len(values) - 1)  # of places that no row fills: their score is -inf
    return best, row, tokens[row, at % columns], flat.logsumexp(1)


def greedy(heard: Heard, length: int, prior: Prior, contexts: Contexts, alpha: float) -> Found:
    """A beam of one, in few passes: the prior reads a whole draft at once, and what it would choose is the next draft.

    Places up to the first that changes are final, so it ends after `length` passes at most, with the sequential choice.
    """
    channel = torch.stack([heard(t) for t in range(length)], dim=1)  # [N, T, V]
    draft = channel.argmax(-1)
    score = channel.new_zeros(len(contexts))
    open_ = torch.arange(len(contexts), device=channel.device)
    rows = calls = 0
    while len(open_):
        log_p = prior.log_probs(draft[open_], [contexts[i] for i in open_.tolist()])
        best, choice = torch.add(channel[open_], log_p, alpha=alpha).max(-1)  # [n, T]
        same = choice == draft[open_]
        score[open_] = best.sum(1)
        draft[open_] = choice
        rows, calls = rows + len(open_), calls + 1
        open_ = open_[~same[:, : length - 1].all(1)]  # a change in the last place alone is final
    zeros = torch.zeros_like(score)
    return Found(draft[:, None], score[:, None], zeros, rows * length, calls)
