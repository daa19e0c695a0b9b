"""Channel codes: bits in, more bits out; log-likelihood ratios in, bits out. All leading axes are batch.

`Ldpc` is the code of 5G as sionna has it (extra `comms`: sionna-no-rt); the rest need nothing.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from spolia.core.lazy import torch
from spolia.core.modulation import hard
from spolia.core.viterbi import Convolutional
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


class ChannelCode(Protocol):
    """k bits in n."""

    @property
    def k(self) -> int: ...

    @property
    def n(self) -> int: ...

    def encode(self, bits: Tensor) -> Tensor:
        """[..., k] to [..., n], uint8."""
        ...

    def decode(self, llrs: Tensor) -> Tensor:
        """ln p(y | 0) / p(y | 1) [..., n] to bits [..., k], uint8."""
        ...


@dataclass(frozen=True)
class Uncoded:
    """Bits as they are."""

    k: int

    @property
    def n(self) -> int:
        return self.k

    def encode(self, bits: Tensor) -> Tensor:
        return bits

    def decode(self, llrs: Tensor) -> Tensor:
        return hard(llrs)


@dataclass(frozen=True)
class Repetition:
    """The whole message `times` times over; LLRs add up."""

    k: int
    times: int = 5

    @property
    def n(self) -> int:
        return self.k * self.times

    def encode(self, bits: Tensor) -> Tensor:
        return torch.cat([bits] * self.times, dim=-1)

    def decode(self, llrs: Tensor) -> Tensor:
        return hard(llrs.unflatten(-1, (self.times, self.k)).sum(-2))


@dataclass(frozen=True)
class Convoluted:
    """A convolutional code with its zero tail, decoded by Viterbi's algorithm."""

    k: int
    code: Convolutional = field(default_factory=Convolutional)

    @property
    def n(self) -> int:
        return self.code.length(self.k)

    def encode(self, bits: Tensor) -> Tensor:
        return self.code.encode(bits)

    def decode(self, llrs: Tensor) -> Tensor:
        return self.code.decode(llrs)


class Ldpc:
    """LDPC code of 5G, 3GPP TS 38.212, through sionna 2: 12 <= k <= 8448, 1/5 <= k / n <= 0.95.

    `iterations` of belief propagation, all of them always. Computed on `device`; what comes back lies where the input did.
    """

    def __init__(self, k: int, n: int, iterations: int = 20, device: str = "cpu"):
        if not (12 <= k <= 8448 and 0.2 <= k / n <= 0.95):
            mend = "12 to 8448 bits at a rate from 1/5 to 0.95; below it, repeat what is sent"
            raise SpoliaError(f"no code of {k} bits in {n}", where="ldpc", mend=mend)
        self.k, self.n, self.iterations, self.device = k, n, iterations, device
        ldpc = _sionna()
        self._encoder = ldpc.LDPC5GEncoder(k, n, device=device)
        self._decoder = ldpc.LDPC5GDecoder(
            self._encoder, num_iter=iterations, hard_out=True, return_infobits=True, device=device
        )

    def encode(self, bits: Tensor) -> Tensor:
        return self._through(self._encoder, bits.float())

    def decode(self, llrs: Tensor) -> Tensor:
        return self._through(self._decoder, -llrs.float())  # sionna's sign is ln p1 / p0

    def _through(self, block: Any, x: Tensor) -> Tensor:
        """[..., a] to bits [..., b], with one batch axis inside."""
        found = block(x.reshape(-1, x.shape[-1]).to(self.device))
        return found.reshape(*x.shape[:-1], -1).to(x.device, torch.uint8)


def _sionna() -> Any:
    """sionna's LDPC module; the one place that imports it."""
    try:
        from sionna.phy.fec import ldpc  # type: ignore[import-not-found]
    except ImportError as error:
        mend = "pip install 'spolia[comms]', or take the convolutional code"
        raise SpoliaError(f"sionna cannot be imported: {error}", where="ldpc", mend=mend) from None
    return ldpc
