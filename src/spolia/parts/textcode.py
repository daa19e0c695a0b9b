"""Text code: text to bits for a noisy channel, without a language model, and from soft bits to scores of tokens.

Each token is sent as its label, bits of one length; then check bits of all labels together:

    bits = label(x_1) … label(x_T), crc(label(x_1) … label(x_T))

A receiver that knows a language model adds to its log-probabilities, with L = ln p(y | 0) / p(y | 1) and S = 1 - 2 bits,

    ln p(y_t | v) = sum_j S_vj L_tj / 2 + what does not depend on v                    (`labels.scores`)
    ln p(y_crc | x) = sum_j (1 - 2 crc_j(x)) L_j / 2 + what does not depend on x       (`check_scores`)

The first holds where the bits of a symbol do not depend on each other given y: BPSK, Gray QPSK, or by interleaving as an
approximation. `symbol_scores` is exact for all; it needs labels that fill whole symbols (`align` = bits a symbol). The check
bits are as noisy as the rest, which is why hypotheses are weighed by them, not sieved.

Wang et al., Large Language Model Enabled Semantic Communication Systems, arXiv 2407.14112, send labels alone. Check bits,
unequal protection (`repeats`: how often each bit of a label is sent) and the interleaver are ours.

All leading axes are batch: frames of one batch have the same number of tokens T. Bits are uint8, tokens int64.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from spolia.core.crc import POLYNOMIALS, crc
from spolia.core.lazy import np, torch
from spolia.core.modulation import from_bits, hard, to_bits
from spolia.core.seeds import generator
from spolia.errors import Problems, SpoliaError, SpoliaWarning

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.modulation import Constellation
    from spolia.parts.textcode_labels import Labels
    from spolia.parts.textcode_tokens import Tokenizer


@dataclass(frozen=True, eq=False)
class Heard:
    """LLRs by what they are about."""

    labels: Tensor
    """[..., T, b]"""
    checks: Tensor
    """[..., check bits]"""


@dataclass(frozen=True, eq=False)
class TextCode:
    """Both ends must have the same one: compare `config`, or fingerprints."""

    tokenizer: Tokenizer
    labels: Labels
    check_bits: int = 8
    repeats: tuple[int, ...] | None = None
    """How often each bit of a label is sent [b]; once by default."""
    interleave: int | None = None
    """Seed of the order in which a frame's bits are sent; None sends them as they come."""
    align: int = 1
    """Labels are filled with zeros up to a multiple of it."""

    def __post_init__(self) -> None:
        problems, width = Problems(), self.labels.width
        if len(self.labels) != self.tokenizer.size:
            what = f"{len(self.labels)} labels for {self.tokenizer.size} tokens"
            problems.add("text code", what, "make them for tokenizer.size tokens")
        if self.check_bits not in (0, *POLYNOMIALS):
            known = ", ".join(map(str, POLYNOMIALS))
            problems.add("check_bits", f"no polynomial of {self.check_bits} bits", f"0 for none, or {known}")
        if self.repeats is not None and (len(self.repeats) != width or min(self.repeats) < 1):
            problems.add("repeats", f"{self.repeats} for labels of {width} bits", "one number a bit, each 1 or more")
        if self.align < 1:
            problems.add("align", f"is {self.align}", "bits a symbol")
        if self.align > 1 and (self.repeats is not None or self.interleave is not None):
            problems.add("align", "labels that fill symbols are neither repeated nor interleaved", "leave those out")
        problems.raise_if_any()

    # --- text and tokens

    def tokens(self, text: str) -> Tensor:
        """int64 [T]; a SpoliaWarning where they do not give the text back."""
        found = self.tokenizer.encode(text)
        if self.tokenizer.decode(found) != text:
            warnings.warn("the tokens of the text decode to another text", SpoliaWarning, stacklevel=2)
        return torch.tensor(found, dtype=torch.int64)

    def text(self, tokens: Tensor) -> str:
        """The text of tokens [T]."""
        return self.tokenizer.decode(tokens.tolist())

    def lossless(self, text: str) -> bool:
        """Whether the tokens of the text give it back."""
        return self.tokenizer.decode(self.tokenizer.encode(text)) == text

    # --- tokens and bits

    def sent(self, count: int) -> int:
        """Bits on the air for `count` tokens."""
        return count * self._token_bits + self.check_bits

    def bits(self, tokens: Tensor) -> Tensor:
        """Tokens [..., T] to bits [..., sent(T)]."""
        own = self._label_bits(tokens)
        wide = own[..., self._copies.to(own.device)]
        wide = torch.nn.functional.pad(wide, (0, self._token_bits - wide.shape[-1])).flatten(-2)
        found = torch.cat([wide, crc(own.flatten(-2), self.check_bits)], dim=-1)
        return found if self.interleave is None else found[..., self._order(found.shape[-1]).to(found.device)]

    def heard(self, llrs: Tensor, count: int) -> Heard:
        """LLRs [..., sent(T) or more] of a frame of T = `count` tokens, by label and check; copies added up."""
        length = self.sent(count)
        if llrs.shape[-1] < length:
            what = f"{llrs.shape[-1]} values for a frame of {count} tokens, which has {length} bits"
            raise SpoliaError(what, where="text code", mend="give all of them")
        llrs = llrs[..., :length]
        if self.interleave is not None:
            llrs = llrs[..., self._order(length).argsort().to(llrs.device)]
        wide = llrs[..., : length - self.check_bits].unflatten(-1, (count, self._token_bits))
        copies = self._copies.to(llrs.device)
        labels = wide.new_zeros((*wide.shape[:-1], self.labels.width))
        labels = labels.index_add(-1, copies, wide[..., : len(copies)])
        return Heard(labels, llrs[..., length - self.check_bits :])

    # --- checks

    def check_scores(self, tokens: Tensor, checks: Tensor) -> Tensor:
        """ln p(y of the check bits | tokens) up to a constant [..., B], of hypotheses [..., B, T] and LLRs [..., c]."""
        return ((1 - 2 * self._checks(tokens).to(checks.dtype)) * checks.unsqueeze(-2)).sum(-1) / 2

    def passes(self, tokens: Tensor, checks: Tensor) -> Tensor:
        """Whether tokens [..., T] have just the check bits that were likelier [..., c]: bool [...]; True without any.

        A wrong one passes in about 2^-c of cases, the best by check bits of B hypotheses in B times as many.
        """
        return (self._checks(tokens) == hard(checks)).all(-1)

    # --- whole symbols

    def symbol_table(self, c: Constellation) -> Tensor:
        """Which points each token is sent as [V, s]; needs `align` = c.bits."""
        if self.align != c.bits:
            mend = f"TextCode(…, align={c.bits})"
            raise SpoliaError(f"labels are not aligned to symbols of {c.bits} bits", where="text code", mend=mend)
        wide = torch.nn.functional.pad(self.labels.bits, (0, self._token_bits - self.labels.width))
        return from_bits(wide.unflatten(-1, (-1, c.bits)))

    def symbol_scores(self, log_likelihoods: Tensor, c: Constellation) -> Tensor:
        """ln p(y | token) up to a constant [..., V], from those of the points of its s symbols [..., s, 2^m]."""
        table = self.symbol_table(c).to(log_likelihoods.device)
        return torch.stack([log_likelihoods[..., i, own] for i, own in enumerate(table.unbind(-1))]).sum(0)

    # --- agreement of both ends

    @property
    def config(self) -> dict[str, Any]:
        """What both ends must have in common; goes into JSON."""
        return {
            "tokenizer": self.tokenizer.fingerprint,
            "vocabulary": self.tokenizer.size,
            "width": self.labels.width,
            "labels": self.labels.fingerprint,
            "check_bits": self.check_bits,
            "repeats": None if self.repeats is None else list(self.repeats),
            "interleave": self.interleave,
            "align": self.align,
        }

    @property
    def fingerprint(self) -> str:
        return hashlib.blake2b(json.dumps(self.config, sort_keys=True).encode(), digest_size=16).hexdigest()

    def check(self, config: dict[str, Any]) -> None:
        """SpoliaError, naming every difference, unless `config` is this code's."""
        problems = Problems()
        for name, own in self.config.items():
            if config.get(name) != own:
                problems.add(f"text code.{name}", f"{config.get(name)} there, {own} here", "make both ends from one")
        problems.raise_if_any()

    # --- helpers

    @property
    def _token_bits(self) -> int:
        """On the air, of a token."""
        return -(-len(self._copies) // self.align) * self.align

    @cached_property
    def _copies(self) -> Tensor:
        """The label's bit that each bit on the air is."""
        width = self.labels.width
        return torch.arange(width).repeat_interleave(torch.tensor(self.repeats or [1] * width))

    def _label_bits(self, tokens: Tensor) -> Tensor:
        return self.labels.bits.to(tokens.device)[tokens]

    def _checks(self, tokens: Tensor) -> Tensor:
        return crc(self._label_bits(tokens).flatten(-2), self.check_bits)

    def _order(self, length: int) -> Tensor:
        assert self.interleave is not None
        return interleaver(length, generator(self.interleave, "interleaver", length))


def interleaver(length: int, rng: np.random.Generator) -> Tensor:
    """A random order of `length` places: x[..., order] sends, y[..., order.argsort()] brings back."""
    return torch.from_numpy(rng.permutation(length))


def length_bits(count: int, width: int = 10, repeats: int = 5) -> Tensor:
    """The number of tokens of a frame as a header [width repeats], the whole number said `repeats` times; uint8."""
    if not 0 <= count < 1 << width:
        mend = f"at most {(1 << width) - 1} tokens a frame, or a wider header"
        raise SpoliaError(f"{count} tokens do not go into {width} bits", where="header", mend=mend)
    return to_bits(torch.tensor(count), width).repeat(repeats)


def read_length(llrs: Tensor, width: int = 10, repeats: int = 5) -> Tensor:
    """The most likely number of tokens, from LLRs of a header [..., width repeats]: int64 [...]."""
    return from_bits(hard(llrs[..., : width * repeats].unflatten(-1, (repeats, width)).sum(-2)))
