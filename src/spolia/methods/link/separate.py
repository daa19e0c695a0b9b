"""Separate source and channel coding: the same language model compresses, a channel code protects, at equal channel uses.

For comparing with: it is what a link can do whose transmitter has the model too. Huang et al. argue for it, Separate source
channel coding is still what you need: an LLM-based rethinking, arXiv 2501.04285 (ZTE Communications 23(1), 2025).

    frame = header(k) | channel code(crc(tokens) | arithmetic code(tokens) | zeros),      n uses, whatever k

| part | here |
|---|---|
| k | steps of so many bits that 31 fill the frame; 5 bits, sent as 16 of the first-order Reed-Muller code |
| channel code | convolutional, 64 states, or LDPC of 5G (sionna); cut or repeated evenly to what the frame has left |
| crc | of the tokens' numbers: arithmetic codes turn into other text without a word when a bit, or a model, is wrong |

A source code of characters takes the arithmetic code's place by `TextCompressor`: Huffman, UTF-8 and so on at the same uses,
with a constellation of more bits where fewer do not hold them.

Both ends work the model's tables out token by token, one frame at a time, in the same shapes: only equal bits decode.
`receiver` is the compressor at the other end where it is not the same: the round trip is real, a mismatch shows.
A text that does not fit its frame is not sent: it counts as lost. Data touched: none.

Departures: header, CRC and tail are counted, and a frame has as many uses as LLM-SC's; that paper's code is a learned one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal, Protocol

from spolia.core.arithmetic_coder import Decoder, Encoder, frequencies
from spolia.core.crc import crc
from spolia.core.lazy import np, torch
from spolia.core.modulation import modulate, to_bits
from spolia.core.settings import Settings, setting
from spolia.core.viterbi import Convolutional
from spolia.errors import SpoliaError
from spolia.parts.codes import Convoluted, Ldpc
from spolia.parts.link import Decoded

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.modulation import Constellation
    from spolia.methods.link.source import SourceCode
    from spolia.parts.channel import Received
    from spolia.parts.codes import ChannelCode
    from spolia.parts.prior import Contexts, Prior, Reading
    from spolia.parts.textcode_tokens import Tokenizer

_OURS = "our choice"
HEADER = 16  # bits on the air; says one of 32 lengths
_HIGHEST = 0.95  # rate of a channel code


class Separate(Settings):
    """Settings of `separate`."""

    code: Literal["convolutional", "ldpc"] = setting(
        "convolutional", "channel code; ldpc needs sionna-no-rt", source=_OURS
    )
    check_bits: Literal[6, 8, 11, 16, 24] = setting(
        16, "check bits of the tokens; wrong text passes in 2^-c of cases", source=_OURS, unit="bits"
    )
    iterations: int = setting(20, "of belief propagation, for ldpc", source="sionna's default", ge=1)


class Compressor(Protocol):
    """What a frame holds, as few bits, and back: tokens, or text where that is all the code gives back."""

    def compress(self, tokens: Sequence[int], context: Sequence[int]) -> list[int]: ...

    def expand(self, bits: Sequence[int], length: int, context: Sequence[int]) -> list[int] | str: ...

    def checked(self, content: Sequence[int] | str) -> Tensor:
        """The bits that the check is taken of [n]; `content` as `expand` gives it, or the tokens that are sent."""
        ...


@dataclass(frozen=True, eq=False)
class LMCompressor:
    """Arithmetic coding under a prior: -log2 P bits, and at most two more."""

    prior: Prior

    def compress(self, tokens: Sequence[int], context: Sequence[int] = ()) -> list[int]:
        coder = Encoder()
        reading = self._start(context, len(tokens))
        for i, token in enumerate(tokens):
            if i:
                _read(reading, tokens[i - 1])
            coder.push(token, _table(reading))
        return coder.finish()

    def expand(self, bits: Sequence[int], length: int, context: Sequence[int] = ()) -> list[int]:
        coder, found = Decoder(bits), list[int]()
        reading = self._start(context, length)
        for i in range(length):
            if i:
                _read(reading, found[-1])
            found.append(coder.pull(_table(reading)))
        return found

    def _start(self, context: Sequence[int], length: int) -> Reading:
        return getattr(self.prior, "plain", self.prior).start([context], length)

    def checked(self, content: Sequence[int] | str) -> Tensor:
        assert not isinstance(content, str)
        return to_bits(torch.tensor(content), max(1, (self.prior.vocabulary - 1).bit_length())).flatten()


@dataclass(frozen=True, eq=False)
class TextCompressor:
    """A source code of characters (methods/link/source): UTF-8, 5 or 6 bits, Huffman; a 1 ends it, zeros may follow."""

    source: SourceCode
    tokenizer: Tokenizer

    def compress(self, tokens: Sequence[int], context: Sequence[int] = ()) -> list[int]:
        return [*self.source.encode(self.tokenizer.decode(tokens)), 1]

    def expand(self, bits: Sequence[int], length: int, context: Sequence[int] = ()) -> str:
        end = max((i for i, bit in enumerate(bits) if bit), default=0)
        return self.source.decode(bits[:end])

    def checked(self, content: Sequence[int] | str) -> Tensor:
        text = content if isinstance(content, str) else self.source.decode(self.compress(content)[:-1])
        return to_bits(torch.tensor(list(text.encode("utf-8", "replace")), dtype=torch.long), 8).flatten()


@dataclass(frozen=True, eq=False)
class SeparateLink:
    """Transmitter and receiver, each with its compressor; they are the same unless a mismatch is studied."""

    sender: Compressor
    receiver: Compressor
    constellation: Constellation
    uses: Callable[[int], int]
    settings: Separate

    def send(self, tokens: Tensor, contexts: Contexts | None = None) -> Tensor:
        """Tokens [N, T] to symbols [N, n]."""
        contexts = [()] * len(tokens) if contexts is None else contexts
        total, width = self._on_air(tokens.shape[1]), self.settings.check_bits
        room, step = _room(total)
        frames = torch.zeros(len(tokens), total, dtype=torch.uint8)
        payloads: dict[int, list[tuple[int, Tensor]]] = {}
        for i, own in enumerate(tokens.tolist()):
            coded = torch.tensor(self.sender.compress(own, contexts[i]), dtype=torch.uint8)
            payload = torch.cat([crc(self.sender.checked(own), width), coded])
            steps = -(-len(payload) // step)
            if steps < len(_words()) and steps * step <= self._most(room):  # else the text is not sent: length 0
                padded = torch.nn.functional.pad(payload, (0, steps * step - len(payload)))
                payloads.setdefault(steps, []).append((i, padded))
        for steps, group in payloads.items():
            at = [i for i, _ in group]
            frames[at, :HEADER] = _words()[steps]
            coded = self._code(steps * step, room).encode(torch.stack([bits for _, bits in group]))
            frames[at, HEADER:] = coded[:, _matched(coded.shape[1], room)]
        return modulate(frames.to(tokens.device), self.constellation)

    def receive(self, received: Received, length: int, contexts: Contexts | None = None) -> Decoded:
        """The text of frames received.y [N, n]. One that was not sent, or says so, is empty and does not pass."""
        total = self._on_air(length)
        llrs = received.llrs(self.constellation).float().cpu()[:, :total]
        contexts = [()] * len(llrs) if contexts is None else contexts
        room, step = _room(total)
        lengths = (llrs[:, :HEADER] @ (1 - 2 * _words().float()).t()).argmax(1)
        found: list[list[int] | str | None] = [None] * len(llrs)
        passes = torch.zeros(len(llrs), dtype=torch.bool)
        for steps in lengths.unique().tolist():
            if not self.settings.check_bits < steps * step <= self._most(room):
                continue
            at = (lengths == steps).nonzero()[:, 0]
            code = self._code(steps * step, room)
            heard = torch.zeros(len(at), code.n)
            heard.index_add_(1, _matched(code.n, room), llrs[at, HEADER:])
            for i, bits in zip(at.tolist(), code.decode(heard), strict=True):
                found[i], passes[i] = self._opened(bits, length, contexts[i])
        tokens = torch.zeros(len(llrs), 1, length, dtype=torch.long)
        texts = None
        if any(isinstance(content, str) for content in found) or isinstance(self.receiver, TextCompressor):
            texts = [content if isinstance(content, str) else "" for content in found]
        else:
            for i, content in enumerate(found):
                tokens[i, 0] = torch.tensor(content or [0] * length)
        device = received.y.device
        scores = torch.zeros(len(llrs), 1, device=device)
        cost = {"rows read a token": 1.0} if isinstance(self.receiver, LMCompressor) else {}  # and the sender's as many
        return Decoded(tokens.to(device), scores, None, passes.to(device), texts=texts, cost=cost)

    def _opened(self, bits: Tensor, length: int, context: Sequence[int]) -> tuple[list[int] | str, bool]:
        """What a payload holds, and whether the check agrees."""
        width = self.settings.check_bits
        content = self.receiver.expand(bits[width:].tolist(), length, context)
        own = crc(self.receiver.checked(content), width)
        return content, bool((own == bits[:width]).all())

    def _on_air(self, length: int) -> int:
        return self.uses(length) * self.constellation.bits

    def _most(self, room: int) -> int:
        """Bits that a code may carry in `room`."""
        tail = Convolutional().memory if self.settings.code == "convolutional" else 0
        return int(room * _HIGHEST) - tail

    def _code(self, k: int, room: int) -> ChannelCode:
        return _code(self.settings.code, k, room, self.settings.iterations)


def separate(
    sender: Compressor,
    constellation: Constellation,
    uses: Callable[[int], int],
    settings: Separate | None = None,
    receiver: Compressor | None = None,
) -> SeparateLink:
    """A link whose frames of T tokens take `uses(T)` channel uses, as those of the link it is compared with."""
    return SeparateLink(sender, receiver or sender, constellation, uses, settings or Separate())


def _read(reading: Reading, token: int) -> None:
    device = reading.log_probs.device
    reading.step(torch.zeros(1, dtype=torch.long, device=device), torch.tensor([token], device=device))


def _table(reading: Reading) -> np.ndarray:
    return frequencies(reading.log_probs[0].double().exp().cpu())


# --- frames ----------------------------------------------------------------------------------------------------------


def _room(total: int) -> tuple[int, int]:
    """Bits on the air that the header leaves, and the step of lengths, so that 31 of them fill what is left."""
    if total < 2 * HEADER:
        mend = f"at least {2 * HEADER}; longer frames, or more bits a token"
        raise SpoliaError(f"a frame has {total} bits on the air", where="separate", mend=mend)
    room = total - HEADER
    return room, -(-room // (len(_words()) - 1))


@lru_cache(maxsize=1)
def _words() -> Tensor:
    """The 32 words of the first-order Reed-Muller code of 16 bits, 8 apart [32, 16], uint8."""
    rows = torch.cat([torch.ones(1, 16, dtype=torch.long), to_bits(torch.arange(16), 4).long().t()])
    return (to_bits(torch.arange(32), 5).long() @ rows).remainder(2).to(torch.uint8)


@lru_cache(maxsize=256)
def _code(name: str, k: int, room: int, iterations: int) -> ChannelCode:
    """Of k bits, near `room` bits long; `_matched` does the rest."""
    if name == "ldpc":
        return Ldpc(k, min(room, 5 * k), iterations)
    strong = room >= 3 * (k + Convolutional().memory)
    return Convoluted(k, Convolutional((0o133, 0o145, 0o175)) if strong else Convolutional())


def _matched(coded: int, room: int) -> Tensor:
    """Which coded bit each of `room` places carries: left out evenly, or sent again from the beginning."""
    places = torch.arange(room)
    return places * coded // room if coded > room else places % coded
