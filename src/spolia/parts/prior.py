"""Priors: how likely each next token is, read token by token over many rows at once.

    reading = prior.start(contexts, ahead)            reading.log_probs: ln P(next | what a row has read)  [rows, V]
    reading.step(parents, tokens) -> [rows', V]       row i now is row parents[i] and has read tokens[i] too

Rows are packed: any number of them may come of one parent, or none, so that a search of adaptive width pays for what lives.
A reading goes on in place. `prior.log_probs(tokens, contexts)` is one pass over tokens that are all known.

Tokens are dense, 0 … V - 1: special tokens and unused rows of a model are none. A context is the text before a row, and
may be empty. Language models stand in parts/causal_prior.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_HELD = 1 << 24  # log-probabilities of n-gram histories that are kept

Contexts = Sequence[Sequence[int]]
"""Tokens before each row."""


class Reading(Protocol):
    """Rows that have read what they have read."""

    log_probs: Tensor

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor: ...


class Prior(Protocol):
    """A distribution over texts of tokens 0 … vocabulary - 1."""

    @property
    def vocabulary(self) -> int: ...

    @property
    def fingerprint(self) -> str: ...

    def start(self, contexts: Contexts, ahead: int) -> Reading: ...

    def log_probs(self, tokens: Tensor, contexts: Contexts) -> Tensor: ...


def fingerprint_of(prior: Prior) -> str:
    """A hash of the exact log-probabilities of eight tokens: two ends of one model on one machine agree on it."""
    probe = (torch.arange(8) * 7919 % prior.vocabulary)[None]
    found = prior.log_probs(probe, [[0]]).cpu().contiguous()
    return hashlib.blake2b(found.numpy().tobytes(), digest_size=8).hexdigest()


def log_likelihood(prior: Prior, tokens: Tensor, contexts: Contexts | None = None) -> Tensor:
    """ln P of each token given those before it: tokens [N, T] to [N, T]."""
    contexts = contexts or [()] * len(tokens)
    return prior.log_probs(tokens, contexts).gather(2, tokens.unsqueeze(2)).squeeze(2)


# --- without memory, and with a short one ----------------------------------------------------------------------------


class UnigramPrior:
    """Every token by itself: ln P [V], normalised here. What has probability 0 is never decoded."""

    def __init__(self, log_probs: Tensor):
        self._row = log_probs.float().log_softmax(-1)

    @property
    def vocabulary(self) -> int:
        return len(self._row)

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self)

    def start(self, contexts: Contexts, ahead: int) -> Reading:
        return _Unmoved(self._row, len(contexts))

    def log_probs(self, tokens: Tensor, contexts: Contexts) -> Tensor:
        return self._row.expand(*tokens.shape, -1)


class UniformPrior(UnigramPrior):
    """All tokens alike: decoding by likelihood alone."""

    def __init__(self, vocabulary: int, device: torch.device | str | None = None):
        super().__init__(torch.zeros(vocabulary, device=device))


class _Unmoved:
    def __init__(self, row: Tensor, rows: int):
        self._row, self.log_probs = row, row.expand(rows, -1)

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        self.log_probs = self._row.expand(len(parents), -1)
        return self.log_probs


class NGrams(Protocol):
    """What an n-gram model must do: ln P after `history` [..., order - 1], oldest first, `vocab_size` where text begins."""

    order: int
    vocab_size: int

    def log_probs(self, history: Tensor) -> Tensor: ...


class NGramPrior:
    """An n-gram model (parts/ngram, or any other of that form) that reads. Rows are worked out once a history."""

    def __init__(self, ngram: NGrams, device: torch.device | str | None = None):
        self.ngram, self.device = ngram, device
        self._place: dict[int, int] = {}  # of a history's row in the table
        self._table = torch.empty(0, ngram.vocab_size, device=device)

    @property
    def vocabulary(self) -> int:
        return self.ngram.vocab_size

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self)

    def start(self, contexts: Contexts, ahead: int) -> Reading:
        return _History(self, self.history(contexts))

    def log_probs(self, tokens: Tensor, contexts: Contexts) -> Tensor:
        width, length = self.ngram.order - 1, tokens.shape[1]
        whole = torch.cat([self.history(contexts), tokens], dim=1)
        places = torch.arange(length, device=whole.device)[:, None] + torch.arange(width, device=whole.device)
        own = whole[:, places].flatten(0, 1)  # [N T, order - 1]
        parts = [self.after(some) for some in own.split(max(1, _HELD // self.vocabulary))]
        return torch.cat(parts).view(*tokens.shape, -1)

    def after(self, history: Tensor) -> Tensor:
        """ln P after histories [rows, order - 1]: [rows, V]."""
        base = self.vocabulary + 1
        keys = [0] * len(history)
        for column in history.T.tolist():
            keys = [key * base + token for key, token in zip(keys, column, strict=True)]
        new = {key: row for row, key in enumerate(keys) if key not in self._place}
        if new:
            if len(self._place) + len(new) > _HELD // self.vocabulary:  # begin anew, with all that is asked for now
                self._place, new = {}, {key: row for row, key in enumerate(keys)}
            start, stop = len(self._place), len(self._place) + len(new)
            if stop > len(self._table):
                room = self._table.new_empty(max(stop, 2 * len(self._table)), self.vocabulary)
                room[:start] = self._table[:start]
                self._table = room
            self._table[start:stop] = self.ngram.log_probs(history[list(new.values())])
            self._place |= {key: start + i for i, key in enumerate(new)}
        return self._table[torch.tensor([self._place[key] for key in keys], device=self.device)]

    def history(self, contexts: Contexts) -> Tensor:
        """The latest order - 1 tokens of each [rows, order - 1], `vocab_size` where a text has not begun."""
        width, start = self.ngram.order - 1, self.ngram.vocab_size
        rows = [[start] * max(0, width - len(c)) + list(c)[max(0, len(c) - width) :] for c in contexts]
        return torch.tensor(rows, dtype=torch.long, device=self.device).view(len(contexts), width)


class _History:
    def __init__(self, prior: NGramPrior, history: Tensor):
        self._prior, self._held = prior, history
        self.log_probs = prior.after(history)

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        longer = torch.cat([self._held[parents], tokens[:, None]], dim=1)
        self._held = longer[:, 1:]
        self.log_probs = self._prior.after(self._held)
        return self.log_probs
