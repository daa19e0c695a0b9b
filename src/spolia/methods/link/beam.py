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
    owner = torch.arange(frames, device=device)  # the frame of each row; rows of a frame stand together, best first
    score = torch.zeros(frames, device=device)
    tokens = torch.empty(frames, 0, dtype=torch.long, device=device)
    log_kept, rows = torch.zeros(frames, device=device), frames
    best, live = score[:, None], torch.ones(frames, 1, dtype=torch.bool, device=device)
    for t in range(length):
        best, parents, chosen, weight = _continued(log_p, heard(t).to(device), score, owner, frames, alpha, width)
        live = (best >= best[:, :1] - width.threshold) & (best > -math.inf)  # [N, k]
        if not bool(live[:, 0].all()):
            raise SpoliaError(f"no token is possible at place {t}", where="prior", mend="one that is nowhere zero")
        log_kept += best.masked_fill(~live, -math.inf).logsumexp(1) - weight
        owner = owner[parents[live]]
        score, tokens = best[live], torch.cat([tokens[parents[live]], chosen[live][:, None]], dim=1)
        if t + 1 < length:
            log_p = reading.step(parents[live], chosen[live])
            rows += len(owner)
    kept = torch.where(live, best, -math.inf)
    table = tokens.new_zeros(*kept.shape, length)
    table[live] = tokens
    table = torch.where(live[:, :, None], table, table[:, :1])
    return Found(table, kept, log_kept.clamp(max=0.0), rows, length)


def _continued(
    log_p: Tensor, heard: Tensor, score: Tensor, owner: Tensor, frames: int, alpha: float, width: Width
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The best continuations of every frame, in order [N, k]: score, row, token; and the log-weight of the candidates."""
    count = heard.shape[1]
    first = torch.searchsorted(owner, torch.arange(frames, device=owner.device))  # row at which a frame begins
    slot = torch.arange(len(owner), device=owner.device) - first[owner]
    if count <= 2 * max(width.near, width.most):
        return _chosen(*_all(log_p, heard[owner], score, alpha, width), owner, slot, first, width)
    columns = max(width.near, width.most, _WEIGHED)
    near, tokens = heard.topk(columns + 1)  # [N, columns + 1], best first
    at = tokens[:, :-1][owner]  # [rows, columns]
    values = alpha * log_p.gather(1, at) + near[:, :-1][owner] + score[:, None]
    found = _chosen(values, at, owner, slot, first, width)
    # of tokens not looked at: ln P <= 0, and a frame's best hypothesis stands first
    unsure = near[:, -1] + score[first] >= found[0][:, -1]
    if not bool(unsure.any()):
        return found
    own = unsure[owner].nonzero()[:, 0]
    every, which = _all(log_p[own], heard[owner[own]], score[own], alpha, width)
    values[own] = -math.inf
    values[own, : every.shape[1]], at[own, : every.shape[1]] = every, which
    return _chosen(values, at, owner, slot, first, width)


def _all(log_p: Tensor, heard: Tensor, score: Tensor, alpha: float, width: Width) -> tuple[Tensor, Tensor]:
    """Every row's best continuations among all tokens [rows, k]: values and tokens."""
    values = torch.add(heard, log_p, alpha=alpha).add_(score[:, None])
    return values.topk(min(max(width.most, _WEIGHED), values.shape[1]))


def _chosen(
    values: Tensor, tokens: Tensor, owner: Tensor, slot: Tensor, first: Tensor, width: Width
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of candidates [rows, C] the best of every frame."""
    frames, columns = len(first), values.shape[1]
    table = values.new_full((frames, int(slot.max()) + 1, columns), -math.inf)
    table[owner, slot] = values
    flat = table.flatten(1)
    best, at = flat.topk(min(width.most, flat.shape[1]))
    row = first[:, None] + at.div(columns, rounding_mode="floor")
    row = row.clamp(max=len(owner) - 1)  # of places that no row fills: their score is -inf
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
