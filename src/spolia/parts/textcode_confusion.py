"""Which tokens a language model takes for each other: C_uv = E_context sqrt(P(u | context) P(v | context)), diagonal 0.

Dense [V, V] up to some thousand tokens; sparse, from the likeliest tokens of sampled contexts, beyond. fp64.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


class Confusion(Protocol):
    """C as the assignment of labels looks at it."""

    @property
    def size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def row(self, token: int) -> Tensor:
        """C of a token with all [V]."""
        ...

    def times(self, x: Tensor) -> Tensor:
        """C x [V]."""
        ...

    def costs(self, codes: Tensor, power: Tensor) -> Tensor:
        """sum_v C_uv power[code u xor code v] of every token u [V]."""
        ...


@dataclass(frozen=True, eq=False)
class Dense:
    """C whole."""

    values: Tensor
    """[V, V], symmetric, diagonal 0, fp64."""

    @property
    def size(self) -> int:
        return len(self.values)

    @property
    def device(self) -> torch.device:
        return self.values.device

    def row(self, token: int) -> Tensor:
        return self.values[token]

    def times(self, x: Tensor) -> Tensor:
        return self.values @ x

    def costs(self, codes: Tensor, power: Tensor) -> Tensor:
        rows = zip(self.values.split(256), codes.split(256), strict=True)
        return torch.cat([(part * power[own[:, None] ^ codes]).sum(1) for part, own in rows])


@dataclass(frozen=True, eq=False)
class Sparse:
    """The entries of C that are not 0, in the order of rows."""

    size: int
    starts: Tensor
    """Where each row begins [V + 1]."""
    rows: Tensor
    columns: Tensor
    values: Tensor

    @property
    def device(self) -> torch.device:
        return self.values.device

    def row(self, token: int) -> Tensor:
        own = slice(int(self.starts[token]), int(self.starts[token + 1]))
        found = torch.zeros(self.size, dtype=self.values.dtype, device=self.device)
        found[self.columns[own]] = self.values[own]
        return found

    def times(self, x: Tensor) -> Tensor:
        return self._matrix @ x

    def costs(self, codes: Tensor, power: Tensor) -> Tensor:
        entries = self.values * power[codes[self.rows] ^ codes[self.columns]]
        return torch.zeros(self.size, dtype=entries.dtype, device=self.device).index_add_(0, self.rows, entries)

    @cached_property
    def _matrix(self) -> Tensor:
        """The same in torch's own format, whose product is several times as fast as gathering and adding."""
        shape = (self.size, self.size)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # "sparse CSR is in beta state"
            return torch.sparse_csr_tensor(self.starts, self.columns, self.values, shape, check_invariants=False)


def of_bigrams(shares: Tensor, following: Tensor) -> Dense:
    """C of a bigram model: shares [V] of the tokens that go before, following [V, V] the probabilities after each."""
    if following.shape != (len(shares), len(shares)):
        what = f"{list(following.shape)} probabilities for {len(shares)} tokens"
        raise SpoliaError(what, where="confusion", mend="give one row a token: [V, V]")
    root = shares.double().sqrt().unsqueeze(1) * following.double().sqrt()
    return Dense((root.t() @ root).fill_diagonal_(0))


def of_contexts(log_probs: Iterable[Tensor], top: int | None = None) -> Dense | Sparse:
    """C as the mean over contexts, from batches of log-probabilities [contexts, V]; sparse from the `top` of each."""
    count, gram, parts = 0, None, []
    for batch in log_probs:
        roots = (batch.double() / 2).exp().flatten(0, -2)  # sqrt(p) [contexts, V]
        size, count = roots.shape[-1], count + len(roots)
        if top is None:
            gram = roots.t() @ roots if gram is None else gram.addmm_(roots.t(), roots)
            continue
        largest, tokens = roots.topk(min(top, size), dim=-1)
        pairs = largest.unsqueeze(-1) * largest.unsqueeze(-2)  # [contexts, top, top]
        keys = tokens.unsqueeze(-1) * size + tokens.unsqueeze(-2)
        parts.append(_merged(keys.flatten(), pairs.flatten()))
    if not count:
        raise SpoliaError("no contexts", where="confusion", mend="give log-probabilities [contexts, V]")
    if gram is not None:
        return Dense((gram / count).fill_diagonal_(0))
    keys, values = _merged(torch.cat([key for key, _ in parts]), torch.cat([value for _, value in parts]))
    rows, columns = keys // size, keys % size
    kept = rows != columns
    rows, columns, values = rows[kept], columns[kept], values[kept] / count
    edges = torch.searchsorted(rows, torch.arange(size + 1, device=rows.device))
    return Sparse(size, edges, rows, columns, values)


def _merged(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Values of equal keys added up; keys sorted."""
    found, places = keys.unique(return_inverse=True)
    return found, torch.zeros(len(found), dtype=values.dtype, device=values.device).index_add_(0, places, values)
