"""A causal language model as a prior: its own ids behind dense tokens, keys and values kept.

What has no dense token is taken out before the softmax: special tokens, unused rows, an embedding filled up to a round
number. Log-softmax is fp32, whatever the model computes in.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from spolia.core.lazy import torch
from spolia.errors import SpoliaError
from spolia.parts.compiled_prior import CompiledReading, compiled_step
from spolia.parts.prior import Contexts, Reading, fingerprint_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.keyvalues import KeyValues


class CausalPrior:
    """A causal language model: one of transformers', this package's TinyLM, or any module of ids [rows, length] to logits.

    Keys and values are kept: by `model.cache` and `model(tokens, cache)` where the module has them, by transformers' own
    cache for its models; any other module reads its rows again at every step.

    `tokens`: the model's ids of the dense tokens (by default its whole vocabulary, in order). `start`: the model's ids that
    every row begins with (by default the config's bos token, or its eos token). `positions`: the longest sequence the model
    takes (by default the config's); of a context that is longer than fits, the latest tokens are read. `compiled`: steps of
    a model of transformers are compiled, 1.6 to 1.9 times as quick where rows are few; see parts/compiled_prior.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        tokens: Sequence[int] | None = None,
        start: Sequence[int] | None = None,
        positions: int | None = None,
        compiled: bool = False,
    ):
        if model.training:
            raise SpoliaError("is in training mode: dropout would count", where="prior", mend="call model.eval() first")
        self.model, self.device = model, next(model.parameters()).device
        config = getattr(model, "config", None)
        config = None if callable(config) else config
        self._asked = set(inspect.signature(model.forward).parameters)
        self.theirs = config is not None and "past_key_values" in self._asked
        count = getattr(model, "vocabulary", None) or getattr(config, "vocab_size", None)
        if tokens is None and count is None:
            raise SpoliaError("says no vocabulary", where="prior", mend="give `tokens`, its ids in order")
        self._ids = torch.tensor(range(count or 0) if tokens is None else tokens, dtype=torch.long, device=self.device)
        self._plain = bool((self._ids == torch.arange(len(self._ids), device=self.device)).all())
        said = [getattr(config, name, None) for name in ("bos_token_id", "eos_token_id")]
        first = next((x[0] if isinstance(x, list) else x for x in said if x is not None), None)
        self.begin = list(start) if start is not None else [] if first is None else [first]
        limit = positions or getattr(config, "max_position_embeddings", None) or getattr(model, "context", None)
        self.positions: int | None = limit
        if compiled and not self.theirs:
            what = f"a {type(model).__name__} has no cache of transformers"
            raise SpoliaError(what, where="compiled", mend="leave `compiled` out")
        self.compiled: Any = compiled_step(self) if compiled else None

    @property
    def vocabulary(self) -> int:
        return len(self._ids)

    @property
    def plain(self) -> CausalPrior:
        """The same without `compiled`, for what two ends must reckon alike to the last bit."""
        own = copy.copy(self)
        own.compiled = None
        return own

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self)

    def start(self, contexts: Contexts, ahead: int) -> Reading:
        rows = self._rows(contexts, ahead)
        if self.compiled:
            return CompiledReading(self, rows, ahead)
        if self.theirs:
            return _Theirs(self, rows)
        return _Ours(self, rows, ahead) if hasattr(self.model, "cache") else _Again(self, rows)

    def log_probs(self, tokens: Tensor, contexts: Contexts) -> Tensor:
        """One pass, filled up on the right, where a causal model does not look."""
        length = tokens.shape[1]
        known = self._ids[tokens.to(self.device)].tolist()
        before = self._rows(contexts, length)
        inputs, ends = filled([row + own[:-1] for row, own in zip(before, known, strict=True)], self.device)
        with torch.inference_mode():
            logits = self.logits(inputs)
        at = (ends - length)[:, None] + torch.arange(length, device=self.device)  # [N, T]
        return self.normalised(logits[torch.arange(len(at), device=self.device)[:, None], at])

    def logits(self, ids: Tensor, **asked: Any) -> Tensor:
        """The model's logits for its own ids."""
        found = self.model(ids, **asked) if not self.theirs else self.model(input_ids=ids, **asked)
        return found if isinstance(found, torch.Tensor) else found.logits

    def normalised(self, logits: Tensor) -> Tensor:
        """ln P over the dense tokens [..., V], fp32."""
        own = logits[..., : len(self._ids)] if self._plain else logits[..., self._ids]
        return torch.log_softmax(own, -1, dtype=torch.float32)

    def ids(self, tokens: Tensor) -> Tensor:
        """The model's ids of dense tokens."""
        return tokens if self._plain else self._ids[tokens]

    def takes(self, name: str) -> bool:
        return name in self._asked

    def _rows(self, contexts: Contexts, ahead: int) -> list[list[int]]:
        """What each row reads before its first token, by the model's ids."""
        room = None if self.positions is None else self.positions - len(self.begin) - (ahead - 1)
        if room is not None and (room < 0 or room + len(self.begin) < 1):
            what = f"{ahead} tokens do not fit the model's {self.positions} positions"
            raise SpoliaError(what, where="prior", mend="send shorter frames, each with the ones before it as context")
        rows = []
        for context in contexts:
            latest = list(context) if room is None else list(context)[max(0, len(context) - room) :]
            rows.append(self.begin + (latest if self._plain else self._ids[latest].tolist()))
        if not all(rows):
            mend = "give `start`, ids that every text begins with, or a context"
            raise SpoliaError("the model has no token to begin with", where="prior", mend=mend)
        return rows


def filled(rows: list[list[int]], device: torch.device, left: bool = False) -> tuple[Tensor, Tensor]:
    """Rows as one tensor [rows, longest], filled up with 0 on the right (or left), and their lengths [rows]."""
    longest = max(map(len, rows))
    table = [([0] * (longest - len(row)) + row) if left else (row + [0] * (longest - len(row))) for row in rows]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return torch.tensor(table, dtype=torch.long, device=device), lengths


class _Ours:
    """A module that keeps keys and values in a KeyValues."""

    def __init__(self, prior: CausalPrior, rows: list[list[int]], ahead: int):
        ids, lengths = filled(rows, prior.device, left=True)
        self._prior, model = prior, cast("Any", prior.model)
        self._cache: KeyValues = model.cache(len(rows), ids.shape[1] + ahead - 1)
        if int(lengths.min()) < ids.shape[1]:
            self._cache.fill = ids.shape[1] - lengths
        self.log_probs = self._read(ids)

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        self._cache.select(parents)
        self.log_probs = self._read(self._prior.ids(tokens)[:, None])
        return self.log_probs

    def _read(self, ids: Tensor) -> Tensor:
        with torch.inference_mode():
            logits = self._prior.model(ids, self._cache)
        return self._prior.normalised(logits[:, -1])


class _Theirs:
    """A model of transformers, under its own cache."""

    def __init__(self, prior: CausalPrior, rows: list[list[int]]):
        from transformers import DynamicCache

        ids, lengths = filled(rows, prior.device, left=True)
        self._prior, self._cache = prior, cast("Any", DynamicCache(config=cast("Any", prior.model.config)))
        longest = ids.shape[1]
        equal = int(lengths.min()) == longest
        at = torch.arange(longest, device=prior.device)
        self._seen = None if equal else (at >= longest - lengths[:, None]).long()  # [rows, length]; None: all
        self.log_probs = self._read(ids)

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        rows = self.log_probs.shape[0]
        if len(parents) != rows or not torch.equal(parents, torch.arange(rows, device=parents.device)):
            self._cache.reorder_cache(parents)
            if self._seen is not None:
                self._seen = self._seen[parents]
        if self._seen is not None:
            self._seen = torch.cat([self._seen, self._seen.new_ones(len(parents), 1)], dim=1)
        self.log_probs = self._read(self._prior.ids(tokens)[:, None])
        return self.log_probs

    def _read(self, ids: Tensor) -> Tensor:
        asked: dict[str, Any] = {"past_key_values": self._cache, "use_cache": True}
        if self._prior.takes("logits_to_keep"):
            asked["logits_to_keep"] = 1
        if self._seen is not None:
            asked["attention_mask"] = self._seen
            if self._prior.takes("position_ids"):
                asked["position_ids"] = (self._seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        with torch.inference_mode():
            logits = self._prior.logits(ids, **asked)
        return self._prior.normalised(logits[:, -1])


class _Again:
    """A module without a cache: every row is read again."""

    def __init__(self, prior: CausalPrior, rows: list[list[int]]):
        self._prior = prior
        self._ids, self._lengths = filled(rows, prior.device)
        self.log_probs = self._read()

    def step(self, parents: Tensor, tokens: Tensor) -> Tensor:
        ids, lengths = self._ids[parents], self._lengths[parents]
        ids = torch.cat([ids, ids.new_zeros(len(ids), 1)], dim=1)
        self._ids = ids.scatter(1, lengths[:, None], self._prior.ids(tokens)[:, None])
        self._lengths = lengths + 1
        self.log_probs = self._read()
        return self.log_probs

    def _read(self) -> Tensor:
        with torch.inference_mode():
            logits = self._prior.logits(self._ids)
        return self._prior.normalised(logits[torch.arange(len(logits), device=logits.device), self._lengths - 1])
