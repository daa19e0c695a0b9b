"""A link as a function: a language model goes in; text leaves as symbols, and is read from what arrives."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spolia.catalog import find
from spolia.core.lazy import torch
from spolia.core.modulation import constellation
from spolia.core.seeds import generator
from spolia.core.settings import Settings
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.causal_prior import CausalPrior
from spolia.parts.channel import Received
from spolia.parts.textcode import TextCode
from spolia.parts.textcode_labels import Labels, index_labels, permuted_labels
from spolia.parts.textcode_tokens import HfTokenizer
from spolia.runs.asked import check_settings
from spolia.runs.link_ends import opened

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.modulation import Constellation
    from spolia.parts.link import Decoded, Link
    from spolia.parts.prior import Prior
    from spolia.parts.textcode_tokens import Tokenizer

_METHODS = ("llm_sc", "separate")


@dataclass(frozen=True, eq=False)
class Sent:
    """Symbols [n] of one text, and its length in tokens, which the receiver is told."""

    symbols: Tensor
    length: int


@dataclass(frozen=True, eq=False)
class Read:
    """What was read. `confidence`: the receiver's own; `passes`: whether the check agrees; None where there is none."""

    text: str
    confidence: float | None
    passes: bool | None
    decoded: Decoded
    """The list of texts, with posteriors and cost."""


@dataclass(frozen=True, eq=False)
class TextLink:
    """Both ends. `code` must be the same at each: compare fingerprints."""

    link: Link
    code: TextCode
    constellation: Constellation

    def send(self, text: str, context: str = "") -> Sent:
        """Symbols of `text`; `context` stands before it, and both ends know it."""
        tokens = self.code.tokens(text)
        if not len(tokens):
            raise SpoliaError("there is no text", where="send", mend="send a character at least")
        return Sent(self.link.send(tokens[None].to(self._device), self._before(context))[0], len(tokens))

    def read(self, received: Received, length: int, context: str = "") -> Read:
        """The likeliest text of `length` tokens, of one frame: received.y [n]."""
        level = received.n0[None] if isinstance(received.n0, torch.Tensor) and received.n0.dim() else received.n0
        gain = None if received.gain is None else received.gain[None]
        found = self.link.receive(Received(received.y[None], level, gain), length, self._before(context))
        text = self.code.text(found.best[0]) if found.texts is None else found.texts[0]
        sure = None if found.log_posterior is None else float(found.confidence[0])
        return Read(text, sure, None if found.passes is None else bool(found.passes[0]), found)

    @property
    def _device(self) -> torch.device:
        return self.constellation.points.device

    def _before(self, context: str) -> list[list[int]]:
        return [self.code.tokenizer.encode(context) if context else []]


def link(
    lm: Prior | str | os.PathLike[str] | Any,
    *,
    tokenizer: Tokenizer | Any = None,
    method: str = "llm_sc",
    settings: Mapping[str, Any] | Settings | None = None,
    labels: Literal["index", "permuted"] | Labels = "permuted",
    check_bits: int = 8,
    modulation: str = "bpsk",
    seed: int = 0,
) -> TextLink:
    """A link whose receiver knows `lm`: a folder of a causal model, a model of transformers, or any prior of parts/prior.

    `tokenizer`: this package's or that of transformers; a folder brings its own. `labels`: in the tokens' order, at random
    by `seed`, or made with `aware_labels`. Raises SpoliaError with what does not fit, before anything is sent.
    """
    chosen = find(method, "method")
    if chosen.name not in _METHODS:
        raise SpoliaError(f"{method} is no receiver of a language model", where="method", mend="llm_sc or separate")
    prior, own = _model(lm, tokenizer)
    if isinstance(labels, str) and labels not in ("index", "permuted"):
        raise SpoliaError(
            f"no labels are called `{labels}`", where="labels", mend=did_you_mean(labels, ("index", "permuted"))
        )
    if isinstance(labels, str):
        labels = index_labels(own.size) if labels == "index" else permuted_labels(own.size, generator(seed, "labels"))
    device = getattr(prior, "device", None) or "cpu"
    c = constellation(modulation, device=device)
    checked = check_settings(chosen, settings, 1)
    align = c.bits if getattr(checked, "metric", "") == "symbol" else 1
    code = TextCode(own, labels.to(device), check_bits, align=align)
    if chosen.name == "llm_sc":
        return TextLink(chosen.function()(prior, code, c, checked), code, c)
    from spolia.methods.link.separate import LMCompressor

    made = chosen.function()(LMCompressor(prior), c, lambda length: -(-code.sent(length) // c.bits), checked)
    return TextLink(made, code, c)


def _model(lm: Any, tokenizer: Any) -> tuple[Prior, Tokenizer]:
    if isinstance(lm, str | os.PathLike):
        if not (Path(lm) / "config.json").is_file():
            mend = "a folder of a causal model with its tokenizer, as transformers saves it"
            raise SpoliaError("is no folder of a model", where=f"lm {lm}", mend=mend)
        own, prior = opened(Path(lm), "cpu", "lm")
        return prior, own
    if tokenizer is None:
        raise SpoliaError(
            "a model alone reads no text", where="tokenizer", mend="give the tokenizer that belongs to it"
        )
    own = HfTokenizer(tokenizer) if hasattr(tokenizer, "get_vocab") else tokenizer
    if isinstance(lm, torch.nn.Module):
        return CausalPrior(lm, tokens=getattr(own, "model_ids", range(own.size))), own
    if not hasattr(lm, "start") or getattr(lm, "vocabulary", None) != own.size:
        what = f"a {type(lm).__name__} is no prior over {own.size} tokens"
        raise SpoliaError(
            what, where="lm", mend="give a folder, a model of transformers, or a prior over the tokenizer's"
        )
    return lm, own
