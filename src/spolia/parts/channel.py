"""Channel: symbols in, noisy symbols out, with what the receiver knows of the way.

    y = h x + n,    E|x|^2 = 1,  E|h|^2 = 1,  n circular complex of variance n0 = 1 / (Es/N0)

The one convention for noise, and its converters, stand in core/snr.

| fading | h |
|---|---|
| `none` | 1 |
| `rayleigh` | circular Gaussian |
| `rician` | sqrt(K / (K + 1)) + circular Gaussian of variance 1 / (K + 1), K = `k_factor` |

`block` symbols share a gain: 1 is fast fading, None one gain for the last axis, a frame.

| knowledge | the receiver has |
|---|---|
| `full` | g, an estimate of h: h = g + e, e independent of g with variance `csi_error`. The noise it sees is n0 + csi_error |
| `phase` | the phase of h and E|h|: the variance of |h| counts as noise |
| `none` | E h, which is 0 under Rayleigh: then no bit of a symbol by itself can be told, and every LLR is 0 |

Counting what is not known of h as noise is exact for symbols of equal energy (BPSK, QPSK) under `full` and `none` where
every symbol has its own gain; otherwise it is the usual approximation.

A burst multiplies n0 by `factor` for a while (Gilbert 1960, Elliott 1963): it begins at a symbol with probability `enter`
and ends with `leave`. A receiver that does not know of bursts reckons with n0 throughout. An erased symbol arrives with gain
0, and the receiver knows: LLR 0.

Random numbers come from numpy generators (core/seeds), drawn on the processor: the same noise on every device. `draw`
and `apply` part drawing from scaling, so that several noise levels, or methods, meet the same noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from spolia.core import modulation
from spolia.core.lazy import np, torch
from spolia.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.modulation import Constellation


@dataclass(frozen=True)
class Burst:
    """Stretches of heavier noise."""

    enter: float = 0.01
    """Probability that one begins, a symbol."""
    leave: float = 0.1
    """Probability that it ends, a symbol: its mean length is the inverse."""
    factor: float = 100.0
    """Of n0 within it; 100 is 20 dB."""
    known: bool = False
    """Whether the receiver knows where."""

    @property
    def share(self) -> float:
        """Of symbols that lie in one."""
        return self.enter / (self.enter + self.leave) if self.enter else 0.0


@dataclass(frozen=True, eq=False)
class Received:
    """What arrived: y [..., n], the variance n0 the receiver reckons with, and the gain it knows (None: 1)."""

    y: Tensor
    n0: float | Tensor
    gain: Tensor | None = None

    def llrs(self, c: Constellation, exact: bool = True) -> Tensor:
        """ln p(y | 0) / p(y | 1) of every bit [..., n m]."""
        return modulation.llrs(self.y, self.n0, c, self.gain, exact)

    def log_likelihoods(self, c: Constellation) -> Tensor:
        """ln p(y | s) of every point, up to a term of y alone [..., n, 2^m]."""
        return modulation.log_likelihoods(self.y, self.n0, c, self.gain)


@dataclass(frozen=True, eq=False)
class Draw:
    """What chance gives a frame, whatever the noise level: all [..., n]."""

    noise: Tensor
    """Circular, of variance 1."""
    gain: Tensor | None
    known: Tensor | None
    """Of the gain, by the receiver."""
    burst: Tensor | None
    """bool; in a burst."""
    erased: Tensor | None
    """bool."""

    def to(self, device: torch.device | str) -> Draw:
        def moved(part: Tensor | None) -> Tensor | None:
            return None if part is None else part.to(device)

        return Draw(self.noise.to(device), *map(moved, (self.gain, self.known, self.burst, self.erased)))


@dataclass(frozen=True)
class Channel:
    """A way for symbols; see above."""

    fading: Literal["none", "rayleigh", "rician"] = "none"
    block: int | None = 1
    k_factor: float = 4.0
    """K, power of the direct path over that of all others."""
    knowledge: Literal["full", "phase", "none"] = "full"
    csi_error: float = 0.0
    """Variance of h - g; at most that of h."""
    burst: Burst | None = None
    erasure: float = 0.0
    """Probability that a symbol is erased."""

    def __post_init__(self) -> None:
        problems = Problems()

        def must(holds: bool, name: str, mend: str) -> None:
            if not holds:
                problems.add(f"channel.{name}", f"is {getattr(self, name)}", mend)

        must(self.fading in ("none", "rayleigh", "rician"), "fading", "`none`, `rayleigh` or `rician`")
        must(self.knowledge in ("full", "phase", "none"), "knowledge", "`full`, `phase` or `none`")
        must(
            self.block is None or self.block >= 1, "block", "symbols that share a gain: 1 or more, or None for a frame"
        )
        must(0 <= self.k_factor < math.inf, "k_factor", "a ratio of powers, 0 or more, not in dB")
        must(0 <= self.erasure <= 1, "erasure", "a probability")
        if not problems.errors:
            most = self._spread
            must(0 <= self.csi_error <= most, "csi_error", f"0 to {most:g}, the variance of the gain")
            must(not self.csi_error or self.knowledge == "full", "csi_error", "it needs `knowledge: full`")
        if (b := self.burst) is not None:
            fair = 0 <= b.enter <= 1 and 0 < b.leave <= 1 and 0 < b.factor < math.inf
            must(fair, "burst", "probabilities enter and leave, leave above 0, and a positive factor")
        problems.raise_if_any()

    def transmit(self, symbols: Tensor, n0: float | Tensor, rng: np.random.Generator) -> Received:
        """Symbols [..., n] through the channel; n0 is a number, or broadcasts against them."""
        shape = symbols.shape
        if isinstance(n0, torch.Tensor):
            shape = torch.broadcast_shapes(shape, n0.shape)
        return self.apply(symbols, n0, self.draw(tuple(shape), rng).to(symbols.device))

    def draw(self, shape: tuple[int, ...], rng: np.random.Generator) -> Draw:
        """Noise of variance 1, gains, bursts and erasures for symbols of `shape`, complex128 on the processor.

        Each has a stream of its own (`rng.spawn`), drawn symbol by symbol: what differs in one shares the others, and
        longer frames of an equal batch begin as shorter ones do.
        """
        streams = rng.spawn(4)
        noise = _circular(shape, streams[0])
        gain = known = burst = erased = None
        if self.fading != "none":
            gain, known = self._gains(shape, streams[1])
        if self.burst is not None:
            burst = _stretches(shape, self.burst, streams[2])
        if self.erasure:
            erased = torch.from_numpy(_uniform(shape, streams[3]) < self.erasure)
        return Draw(noise, gain, known, burst, erased)

    def apply(self, symbols: Tensor, n0: float | Tensor, draw: Draw) -> Received:
        """Symbols [..., n] with what was drawn, at noise n0; of the symbols' type."""
        modulation.check_noise(n0)
        kind, real = symbols.dtype, symbols.real.dtype
        level = torch.as_tensor(n0, dtype=real, device=symbols.device)
        true, seen = level, level + self._unknown  # of the noise, and as the receiver reckons with it
        if draw.burst is not None:
            assert self.burst is not None
            true = torch.where(draw.burst, true * self.burst.factor, true)
            seen = true + self._unknown if self.burst.known else seen
        y = draw.noise.to(kind) * true.sqrt() + (symbols if draw.gain is None else draw.gain.to(kind) * symbols)
        gain = None if draw.known is None else draw.known.to(kind)
        if draw.erased is not None:
            gain = torch.ones_like(y) if gain is None else gain.expand(y.shape)
            y, gain = y.masked_fill(draw.erased, 0), gain.masked_fill(draw.erased, 0)
        return Received(y, seen, gain)

    @property
    def _spread(self) -> float:
        """Variance of h."""
        return {"none": 0.0, "rayleigh": 1.0}.get(self.fading, 1 / (self.k_factor + 1))

    @property
    def _mean_length(self) -> float:
        """E|h|: sqrt(pi spread) / 2 times the Laguerre polynomial of degree 1/2 at -K (Rice 1945)."""
        if self.fading == "rayleigh":
            return math.sqrt(math.pi) / 2
        half = torch.tensor(self.k_factor / 2, dtype=torch.float64)
        scaled = (1 + 2 * half) * torch.special.i0e(half) + 2 * half * torch.special.i1e(half)
        return math.sqrt(math.pi * self._spread) / 2 * float(scaled)

    @property
    def _unknown(self) -> float:
        """Noise that comes of not knowing h."""
        if self.fading == "none":
            return 0.0
        if self.knowledge == "phase":
            return 1 - self._mean_length**2
        return self.csi_error if self.knowledge == "full" else self._spread

    def _gains(self, shape: tuple[int, ...], rng: np.random.Generator) -> tuple[Tensor, Tensor]:
        """h and what the receiver knows of it, each [..., n]."""
        count = shape[-1]
        block = count if self.block is None else self.block
        own = (*shape[:-1], -(-count // max(block, 1)))
        one, two = rng.spawn(2)
        seen = _circular(own, one) * math.sqrt(self._spread - self.csi_error) + math.sqrt(1 - self._spread)
        gain = seen + _circular(own, two) * math.sqrt(self.csi_error) if self.csi_error else seen
        if self.knowledge == "phase":
            seen = torch.polar(torch.full_like(gain.real, self._mean_length), gain.angle())
        elif self.knowledge == "none":
            seen = torch.full_like(gain, math.sqrt(1 - self._spread))
        wide = gain.repeat_interleave(block, -1)[..., :count]
        return wide, wide if seen is gain else seen.repeat_interleave(block, -1)[..., :count]


def _circular(shape: tuple[int, ...], rng: np.random.Generator) -> Tensor:
    """Circular complex Gaussians of variance 1, complex128, drawn along the last axis."""
    parts = rng.standard_normal((*shape[-1:], *shape[:-1], 2))
    return torch.view_as_complex(torch.from_numpy(parts)).movedim(0, -1) * math.sqrt(0.5)


def _uniform(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Numbers from 0 to 1, drawn along the last axis."""
    return np.moveaxis(rng.random((*shape[-1:], *shape[:-1])), 0, -1)


def _stretches(shape: tuple[int, ...], burst: Burst, rng: np.random.Generator) -> Tensor:
    """Where bursts lie: a chain of two states along the last axis, from its stationary distribution; bool."""
    inside = rng.random(shape[:-1]) < burst.share
    found, chance = np.zeros(shape, bool), _uniform(shape, rng)
    for i in range(shape[-1]):
        found[..., i] = inside
        inside = np.where(inside, chance[..., i] >= burst.leave, chance[..., i] < burst.enter)
    return torch.from_numpy(found)
