"""The best path and all paths through a source whose next symbol depends on the k before it, exactly (Viterbi 1967).

    maximise or sum over x_1 … x_T:   sum_t ln P(x_t | x_{t-k} … x_{t-1}) + l_t(x_t)

A history is k symbols of an alphabet of A = V + 1, V being the start of text; histories are numbered with the oldest symbol
highest. `table` [A^k, V] holds ln P after each. One step costs A^k V sums a text.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

MOST = 1 << 26  # entries of a table


def histories(vocabulary: int, memory: int) -> Tensor:
    """Every history [A^k, k], the oldest symbol first. SpoliaError where the table would not fit."""
    base = vocabulary + 1
    if base**memory * vocabulary > MOST:
        what = f"{memory} tokens of history over a vocabulary of {vocabulary}"
        raise SpoliaError(what, where="viterbi", mend="search with beams, or take an n-gram model of lower order")
    number = torch.arange(base**memory)
    places = [base**i for i in range(memory - 1, -1, -1)]
    return (number[:, None] // torch.tensor(places, dtype=torch.long)) % base


def best_path(table: Tensor, first: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """The best symbols [T] and their sum, for one text: `first` [k] its history at the start, scores l [T, V]."""
    length, count = scores.shape
    if len(table) == 1:
        best, at = (table + scores).max(1)
        return at.cpu(), best.sum()
    value, came = _begin(table, first), []
    for t in range(length):
        paths = _paths(value, table, count)  # [A, A^(k-1), V], the symbol that leaves the history first
        best, oldest = paths.max(0)
        came.append(oldest)
        value = _shifted(best + scores[t])
    state = int(value.argmax())
    total, found = value[state], []
    for t in range(length - 1, -1, -1):
        rest, symbol = divmod(state, count + 1)
        found.append(symbol)
        state = int(came[t][rest, symbol]) * (len(table) // (count + 1)) + rest
    return torch.tensor(found[::-1]), total


def marginals(table: Tensor, first: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    """ln P(x_t = v | all that was heard) [T, V], and ln of the sum over all paths; by forward and backward sums."""
    length, count = scores.shape
    if len(table) == 1:
        weight = table + scores
        return weight.log_softmax(1), weight.logsumexp(1).sum()
    forward = [_begin(table, first)]
    for t in range(length):
        summed = _paths(forward[-1], table, count).logsumexp(0) + scores[t]
        forward.append(_shifted(summed))
    after = torch.zeros_like(forward[0])  # of what follows a history
    found = scores.new_empty(length, count)
    for t in range(length - 1, -1, -1):
        onward = table + scores[t] + _onward(after, count)  # [A^k, V]
        found[t] = (forward[t][:, None] + onward).logsumexp(0)
        after = onward.logsumexp(1)
    whole = forward[-1].logsumexp(0)
    return found - whole, whole


def _begin(table: Tensor, first: Tensor) -> Tensor:
    base, value = table.shape[1] + 1, table.new_full((len(table),), -math.inf)
    number = 0
    for symbol in first.tolist():
        number = number * base + symbol
    value[number] = 0.0
    return value


def _paths(value: Tensor, table: Tensor, count: int) -> Tensor:
    """Sums of every history and next symbol [A, A^(k-1), V]."""
    return (value[:, None] + table).view(count + 1, -1, count)


def _shifted(summed: Tensor) -> Tensor:
    """[A^(k-1), V] to histories [A^k] that end with the new symbol, which is never the start."""
    return torch.nn.functional.pad(summed, (0, 1), value=-math.inf).flatten()


def _onward(after: Tensor, count: int) -> Tensor:
    """`after` of the history that each history and symbol lead to [A^k, V]."""
    return after.view(-1, count + 1)[:, :count].repeat(count + 1, 1)
