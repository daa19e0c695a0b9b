"""N-gram language model with interpolated Kneser-Ney smoothing, batched; `NGramPrior` (parts/prior) reads with it.

Kneser and Ney, Improved backing-off for m-gram language modeling, 1995, interpolated as in Chen and Goodman, 1998:

    P(w | h) = max(c(h w) - D, 0) / c(h) + D N(h) / c(h) P(w | h without its oldest token)

c(h) = sum_w c(h w), N(h) the number of different tokens after h. At the highest order c counts occurrences; below, c(h w)
is the number of different tokens seen before h w, but for h that begins with the start of text, before which nothing stands:
there it counts occurrences. Below the unigram is 1 / V, so no token is impossible. D = n1 / (n1 + 2 n2) at each order, n1
and n2 counts that are 1 and 2; 0.5 where either is missing.

Tokens are 0 … V-1; V itself stands for the start of a text. What is summed is fp64, log-probabilities are fp32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, eq=False)
class _Level:
    """One order: for every context seen, in the order of its key, the share left to lower orders and the tokens after it."""

    keys: Tensor
    """int64 [contexts], the digits of its tokens in base V + 1."""
    left: Tensor
    """D N(h) / c(h) [contexts]."""
    starts: Tensor
    """Where a context's tokens begin [contexts + 1]."""
    tokens: Tensor
    shares: Tensor
    """max(c - D, 0) / c(h) of each."""

    def to(self, device: torch.device | str) -> _Level:
        return _Level(*(part.to(device) for part in vars(self).values()))


class NGram:
    """Probabilities of the next token given the `order` - 1 before it."""

    def __init__(self, vocabulary: int, levels: Sequence[_Level]):
        self.vocab_size, self.order, self._levels = vocabulary, len(levels), tuple(levels)
        one = levels[0]
        self._unigram = one.shares.new_full((vocabulary,), 1 / vocabulary) * one.left
        self._unigram[one.tokens] += one.shares

    @classmethod
    def fit(cls, sequences: Iterable[Sequence[int] | Tensor], vocabulary: int, order: int = 3) -> NGram:
        """From token sequences, each a text of its own."""
        if order < 1 or (vocabulary + 1) ** max(order - 1, 1) >= 1 << 63:
            mend = "1 or more, and (V + 1)^(order - 1) below 2^63"
            raise SpoliaError(f"order {order} over {vocabulary} tokens", where="ngram.order", mend=mend)
        windows = _windows(sequences, vocabulary, order)
        base, last = vocabulary + 1, windows[:, -1]
        keys = [np.zeros(len(windows), np.int64)]  # of the k - 1 tokens before, for k = 1 … order
        for k in range(1, order):
            keys.append(keys[-1] + windows[:, -1 - k] * base ** (k - 1))
        levels = []
        for k, key in enumerate(keys, start=1):
            context, token, count = _distinct(key, last)
            if k < order:
                longer, after, _ = _distinct(keys[k], last)
                _, _, different = _distinct(longer % base ** (k - 1), after)
                begins = context // base ** max(k - 2, 0) == vocabulary if k > 1 else np.zeros(len(count), bool)
                count = np.where(begins, count, different)
            levels.append(_level(context, token, count))
        return cls(vocabulary, levels)

    def to(self, device: torch.device | str) -> NGram:
        return NGram(self.vocab_size, [level.to(device) for level in self._levels])

    @property
    def fingerprint(self) -> str:
        digest = hashlib.blake2b(f"{self.vocab_size} {self.order}".encode(), digest_size=16)
        for level in self._levels:
            for part in vars(level).values():
                digest.update(part.cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def log_probs(self, history: Tensor) -> Tensor:
        """ln P of every token [..., V], after the tokens [..., order - 1], the oldest first, V for the start of text."""
        rows = history.reshape(history.shape[:-1].numel(), self.order - 1)
        p = self._unigram.repeat(len(rows), 1)
        key = torch.zeros(len(rows), dtype=torch.int64, device=rows.device)
        for k, level in enumerate(self._levels[1:], start=1):
            key = key + rows[:, -k] * (self.vocab_size + 1) ** (k - 1)
            place = torch.searchsorted(level.keys, key).clamp_(max=len(level.keys) - 1)
            hit = (level.keys[place] == key).nonzero().flatten()
            place = place[hit]
            p[hit] *= level.left[place].unsqueeze(1)
            starts, counts = level.starts[place], level.starts[place + 1] - level.starts[place]
            first = counts.cumsum(0) - counts  # where each row's entries begin among all
            entries = (starts - first).repeat_interleave(counts) + torch.arange(int(counts.sum()), device=rows.device)
            p[hit.repeat_interleave(counts), level.tokens[entries]] += level.shares[entries]
        return p.log_().float().view(*history.shape[:-1], self.vocab_size)


def _windows(sequences: Iterable[Sequence[int] | Tensor], vocabulary: int, order: int) -> np.ndarray:
    """Every token with the order - 1 before it, V where a text has not begun: int64 [tokens, order]."""
    found = []
    for sequence in sequences:
        own = np.asarray(sequence, dtype=np.int64)
        if own.size and (own.min() < 0 or own.max() >= vocabulary):
            what = f"token {own.max() if own.max() >= vocabulary else own.min()} of {vocabulary}"
            raise SpoliaError(what, where="ngram", mend="tokens are 0 to V - 1")
        padded = np.concatenate([np.full(order - 1, vocabulary), own])
        if own.size:
            found.append(np.lib.stride_tricks.sliding_window_view(padded, order))
    if not found:
        raise SpoliaError("there is no text to learn from", where="ngram", mend="give sequences that hold tokens")
    return np.concatenate(found)


def _distinct(key: np.ndarray, token: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The different pairs, sorted, and how often each occurs."""
    order = np.lexsort((token, key))
    key, token = key[order], token[order]
    new = np.flatnonzero(np.concatenate([[True], (key[1:] != key[:-1]) | (token[1:] != token[:-1])]))
    return key[new], token[new], np.diff(np.concatenate([new, [len(key)]]))


def _level(context: np.ndarray, token: np.ndarray, count: np.ndarray) -> _Level:
    once, twice = int((count == 1).sum()), int((count == 2).sum())
    discount = once / (once + 2 * twice) if once and twice else 0.5
    starts = np.flatnonzero(np.concatenate([[True], context[1:] != context[:-1]]))
    edges = np.concatenate([starts, [len(context)]])
    total = np.add.reduceat(count, starts)
    kinds = np.diff(edges)
    shares = (count - discount) / np.repeat(total, kinds)
    parts = context[starts], discount * kinds / total, edges, token, shares
    return _Level(*map(torch.from_numpy, parts))
