"""Bits to complex symbols and back to what is known of the bits: BPSK and Gray QAM.

Symbols have mean energy 1. The map of QAM is that of 3GPP TS 38.211, section 5.1: even bits choose the real part, odd
bits the imaginary part, each by

    (1 - 2 b0) (4 - (1 - 2 b2) (2 - (1 - 2 b4)))        (64-QAM; other sizes have more or fewer brackets)

so that neighbours differ in one bit. BPSK sends 0 as +1 and 1 as -1.

A log-likelihood ratio is L = ln p(y | bit 0) / p(y | bit 1), positive for 0; sionna's has the other sign. y = h s + n, n
circular of variance n0; h known is `gain`, None means 1:

    L_i = logsumexp_{s: b_i = 0} (-|y - h s|^2 / n0) - logsumexp_{s: b_i = 1} (-|y - h s|^2 / n0)

Its max-log form has max for logsumexp. Real and imaginary part are worked out by themselves, from h* y: sqrt(M) terms, not
M, and a gain of 0 gives L = 0. All leading axes are batch; bits are uint8.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.errors import SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

BITS = {"bpsk": 1, "qpsk": 2, "16qam": 4, "64qam": 6, "256qam": 8}


@dataclass(frozen=True, eq=False)
class Constellation:
    """The points of a modulation, in the order of their labels, the first bit being the highest."""

    name: str
    bits: int
    """m, bits a symbol."""
    levels: Tensor
    """Of one axis, by the label of its bits [2^(bits of an axis)]."""
    points: Tensor
    """[2^m], complex."""

    @property
    def axes(self) -> int:
        return 1 if self.bits == 1 else 2

    def to(self, device: torch.device | str) -> Constellation:
        return Constellation(self.name, self.bits, self.levels.to(device), self.points.to(device))


def constellation(
    name: str, dtype: torch.dtype | None = None, device: torch.device | str | None = None
) -> Constellation:
    """`bpsk`, `qpsk`, `16qam`, `64qam` or `256qam`; dtype complex64, or complex128."""
    if name not in BITS:
        raise SpoliaError(f"`{name}` is no modulation", where="modulation", mend=did_you_mean(name, BITS))
    m = BITS[name]
    levels = _levels(max(m // 2, 1))
    levels = levels / levels.square().mean().mul(1 if m == 1 else 2).sqrt()
    if m == 1:
        points = torch.complex(levels, torch.zeros_like(levels))
    else:
        own = to_bits(torch.arange(2**m), m)
        points = torch.complex(levels[from_bits(own[:, 0::2])], levels[from_bits(own[:, 1::2])])
    dtype = dtype or torch.complex64
    real = torch.float64 if dtype == torch.complex128 else torch.float32
    return Constellation(name, m, levels.to(device, real), points.to(device, dtype))


def modulate(bits: Tensor, c: Constellation) -> Tensor:
    """Bits [..., n] to symbols [..., n / m]; a last symbol that is not full has zeros for the bits it lacks."""
    if missing := -bits.shape[-1] % c.bits:
        bits = torch.nn.functional.pad(bits, (0, missing))
    return c.points[from_bits(bits.unflatten(-1, (-1, c.bits)))]


def llrs(y: Tensor, n0: float | Tensor, c: Constellation, gain: Tensor | None = None, exact: bool = True) -> Tensor:
    """L of every bit [..., n m] from what was received [..., n]; n0 is a number or broadcasts against y."""
    check_noise(n0)
    matched = y if gain is None else gain.conj() * y  # [..., n]
    power = torch.ones_like(y.real) if gain is None else gain.real.square() + gain.imag.square()
    parts = [matched.real, matched.imag][: c.axes]
    z = torch.stack(torch.broadcast_tensors(*parts, power)[: c.axes], dim=-1)  # [..., n, axes]
    noise = n0.unsqueeze(-1) if isinstance(n0, torch.Tensor) and n0.dim() else n0
    if c.levels.numel() == 2:
        found = 4 * c.levels[0] * z / noise
    else:
        found = _axis_llrs(z, power.unsqueeze(-1), noise, c.levels, exact)
    return found.flatten(-2)


def log_likelihoods(y: Tensor, n0: float | Tensor, c: Constellation, gain: Tensor | None = None) -> Tensor:
    """-|y - h s|^2 / n0 of every point s [..., n, 2^m]: ln p(y | s) but for a term that is the same for all s."""
    check_noise(n0)
    sent = c.points if gain is None else gain.unsqueeze(-1) * c.points
    off = y.unsqueeze(-1) - sent
    noise = n0.unsqueeze(-1) if isinstance(n0, torch.Tensor) and n0.dim() else n0
    return -(off.real.square() + off.imag.square()) / noise


def check_noise(n0: float | Tensor) -> None:
    """SpoliaError unless it is positive; of tensors the caller answers for that, looking would wait for the device."""
    if not isinstance(n0, torch.Tensor) and not n0 > 0:
        raise SpoliaError(f"n0 is {n0}", where="n0", mend="give a positive variance; n0_of(esn0_db) makes one")


def hard(llrs: Tensor) -> Tensor:
    """The likelier bit, uint8; 0 where nothing is known."""
    return (llrs < 0).to(torch.uint8)


def to_bits(values: Tensor, width: int) -> Tensor:
    """Integers [...] as bits [..., width], the highest first."""
    places = torch.arange(width - 1, -1, -1, device=values.device)
    return ((values.unsqueeze(-1) >> places) & 1).to(torch.uint8)


def from_bits(bits: Tensor) -> Tensor:
    """Bits [..., width] as integers [...], the first being the highest."""
    places = torch.arange(bits.shape[-1] - 1, -1, -1, device=bits.device)
    return (bits.long() << places).sum(-1)


def bit_error_rate(name: str, esn0: float, fading: str = "none") -> float:
    """Share of wrong bits when the nearest point is chosen, closed form; `esn0` as a ratio, not in dB.

    `fading` is `none`, or `rayleigh`: a known gain, its own for every symbol. A level at distance d from where a bit's
    decision turns costs Q(d sqrt(2 Es/N0)); its mean over Rayleigh gains is (1 - sqrt(x / (1 + x))) / 2, x = d^2 Es/N0.
    """
    if fading not in ("none", "rayleigh"):
        raise SpoliaError(f"no closed form for `{fading}`", where="fading", mend="`none` or `rayleigh`")
    total, terms = _turns(name)
    for factor, distance in terms:
        x = distance * distance * esn0
        rate = math.erfc(math.copysign(math.sqrt(x), distance)) / 2  # Q(d sqrt(2 x)) = erfc(sqrt(x)) / 2
        if fading == "rayleigh":
            rate = (1 - math.copysign(math.sqrt(x / (1 + x)), distance)) / 2
        total += factor * rate
    return total


def _turns(name: str) -> tuple[float, list[tuple[float, float]]]:
    """The bit error rate as a constant and a sum of Q functions: (factor, signed distance) of each."""
    c = constellation(name, torch.complex128)
    width = max(c.bits // 2, 1)
    levels, order = c.levels.sort()
    own = to_bits(order, width)  # [levels, bits], from left to right
    constant, terms = 0, []
    for level, bits in zip(levels.tolist(), own.tolist(), strict=True):
        for j in range(width):
            wrong = [row[j] != bits[j] for row in own.tolist()]
            for left in range(len(wrong) - 1):
                if wrong[left] != wrong[left + 1]:  # P(right of the turn) enters with + where wrong begins
                    turn = float(levels[left] + levels[left + 1]) / 2
                    terms.append(((1.0 if wrong[left + 1] else -1.0), turn - level))
            constant += wrong[0]
    scale = 1 / (len(levels) * width)
    return constant * scale, [(factor * scale, distance) for factor, distance in terms]


def _levels(width: int) -> Tensor:
    """The odd numbers of one axis by the label of its bits, not normalised, fp64."""
    signs = 1 - 2 * to_bits(torch.arange(2**width), width).double()
    level = signs[:, -1]
    for i in range(width - 2, -1, -1):
        level = signs[:, i] * (2 ** (width - 1 - i) - level)
    return level


def _axis_llrs(z: Tensor, power: Tensor, noise: float | Tensor, levels: Tensor, exact: bool) -> Tensor:
    """[..., n, axes] to [..., n, m]: the bits of both axes take turns."""
    width = levels.numel().bit_length() - 1
    score = (2 * levels * z.unsqueeze(-1) - power.unsqueeze(-1) * levels.square()) / (
        noise.unsqueeze(-1) if isinstance(noise, torch.Tensor) and noise.dim() else noise
    )  # [..., n, axes, levels]
    ones = to_bits(torch.arange(len(levels), device=levels.device), width).bool()
    found = []
    for j in range(width):
        sides = score[..., ~ones[:, j]], score[..., ones[:, j]]
        zero, one = (side.logsumexp(-1) if exact else side.amax(-1) for side in sides)
        found.append(zero - one)
    return torch.stack(found, dim=-2).flatten(-2)
