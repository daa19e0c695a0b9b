"""Link: tokens to symbols for a channel, and from what arrives back to tokens.

    symbols = link.send(tokens, contexts)                tokens [N, T], symbols [N, n] of mean energy 1
    decoded = link.receive(received, T, contexts)        received.y [N, n]; contexts: tokens before each frame

All frames of a call have one length T: who sends texts of several lengths groups them. T is told, or comes from a header
that the sender counts among its channel uses.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.channel import Received


@dataclass(frozen=True, eq=False)
class Decoded:
    """What a receiver reads of N frames: B texts each, the best first."""

    tokens: Tensor
    """int64 [N, B, T]"""
    scores: Tensor
    """ln of prior and likelihood up to a constant of the frame [N, B]; -inf where there is no such text."""
    log_posterior: Tensor | None = None
    """ln P(text | received), estimated [N, B]."""
    passes: Tensor | None = None
    """Whether the check agrees with the best text, bool [N]; None where nothing checks."""
    texts: list[str] | None = None
    """Where the receiver reads characters, not tokens: what it reads; `tokens` then mean nothing."""
    cost: dict[str, float] = field(default_factory=dict)
    """`passes of the prior`, `rows read` a token of a frame, and the like."""

    @property
    def best(self) -> Tensor:
        """[N, T]"""
        return self.tokens[:, 0]

    @property
    def confidence(self) -> Tensor:
        """Estimate of P(the best text is right) [N]."""
        assert self.log_posterior is not None, "this receiver gives no posterior"
        return self.log_posterior[:, 0].exp()

    @property
    def token_confidence(self) -> Tensor:
        """Share of the list's posterior that has the best text's token at each place [N, T]."""
        assert self.log_posterior is not None, "this receiver gives no posterior"
        agree = self.tokens == self.tokens[:, :1]
        return (self.log_posterior.exp().unsqueeze(2) * agree).sum(1)


class Link(Protocol):
    """Encoder and decoder of one system."""

    def send(self, tokens: Tensor, contexts: Sequence[Sequence[int]] | None = None) -> Tensor: ...

    def receive(self, received: Received, length: int, contexts: Sequence[Sequence[int]] | None = None) -> Decoded: ...
