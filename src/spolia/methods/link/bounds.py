"""What no scheme can beat, and what simple receivers do in closed form: the curves beside every measured one.

    C = E[i],  V = Var[i],  i the information density of a symbol;   error(n, k) ~ Q((n C - k + log2(n) / 2) / sqrt(n V))

C is capacity and V dispersion in bits per channel use at equal probabilities of the points; the normal approximation is that
of Polyanskiy, Poor and Verdu, Channel coding rate in the finite blocklength regime, 2010. Es/N0 is a ratio here unless a name
says dB. Square QAM is two amplitude modulations at half the energy each, so one Gauss-Hermite sum over the real line does.

A tokenizer of b bits whose tokens have H bits of entropy under the model is an outer code of rate H / b: no receiver of its
uncoded labels gets text through below the Es/N0 at which C = H / b.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache
from typing import TYPE_CHECKING

from spolia.core.lazy import np
from spolia.errors import SpoliaError
from spolia.parts.prior import log_likelihood

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.modulation import Constellation
    from spolia.parts.prior import Contexts, Prior

_NODES = 96  # of the Gauss-Hermite sum: BPSK at any Es/N0 and 256-QAM up to 30 dB to 1e-6


def q(x: float) -> float:
    """Q, the tail of the standard normal distribution."""
    return math.erfc(x / math.sqrt(2)) / 2


# --- capacity --------------------------------------------------------------------------------------------------------


def information(c: Constellation, esn0: float) -> tuple[float, float]:
    """Capacity and dispersion of a constellation, in bits and bits^2 per channel use, on the Gaussian channel."""
    if not esn0 > 0:
        raise SpoliaError(f"is {esn0}", where="esn0", mend="a positive ratio; 10 ** (dB / 10)")
    levels = c.levels.double().cpu().numpy()
    nodes, weights = _hermite()
    noise = nodes / math.sqrt(esn0)  # y - x at N0 / 2 a real dimension: density exp(-t^2) at t sqrt(N0)
    away = levels[:, None] - levels  # [sent, other]
    exponent = -esn0 * ((noise[:, None, None] + away) ** 2 - noise[:, None, None] ** 2)  # [nodes, sent, other]
    top = exponent.max(-1, keepdims=True)
    density = math.log2(len(levels)) - (top[..., 0] + np.log(np.exp(exponent - top).sum(-1))) / math.log(2)
    chance = weights[:, None] / math.sqrt(math.pi) / len(levels)
    mean = float((chance * density).sum())
    spread = float((chance * (density - mean) ** 2).sum())
    return c.axes * mean, c.axes * spread


@cache
def _hermite() -> tuple[np.ndarray, np.ndarray]:
    return np.polynomial.hermite.hermgauss(_NODES)


def capacity(c: Constellation, esn0: float) -> float:
    """Bits per channel use."""
    return information(c, esn0)[0]


def gaussian_capacity(esn0: float) -> float:
    """Bits per channel use when any symbols of that energy may be sent (Shannon 1948)."""
    return math.log2(1 + esn0)


def rayleigh_capacity(c: Constellation, esn0: float, nodes: int = 48) -> float:
    """Bits per channel use when every symbol has its own Rayleigh gain and the receiver knows it."""
    places, weights = np.polynomial.laguerre.laggauss(nodes)  # |h|^2 is exponential of mean 1
    return float(sum(w * capacity(c, esn0 * g) for g, w in zip(places, weights, strict=True) if w > 1e-14))


def limit_db(c: Constellation, bits: float) -> float:
    """Es/N0 in dB at which the constellation carries `bits` per channel use."""
    if not 0 < bits < c.bits:
        what = f"{bits:g} bits per use, of {c.bits}"
        raise SpoliaError(what, where="limit_db", mend="more than 0 and fewer than the bits of a symbol")
    low, high = -60.0, 60.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if capacity(c, 10 ** (middle / 10)) < bits else (low, middle)
    return (low + high) / 2


# --- frames of n uses ------------------------------------------------------------------------------------------------


def frame_error(c: Constellation, esn0: float, uses: int, bits: float) -> float:
    """Normal approximation to the lowest error rate of a code of `bits` in `uses` channel uses."""
    mean, spread = information(c, esn0)
    gap = uses * mean - bits + math.log2(uses) / 2
    return q(gap / math.sqrt(uses * spread)) if spread > 0 else float(gap < 0)


def separate_frame_error(c: Constellation, esn0: float, uses: int, bits: Iterable[float]) -> float:
    """The same for a source code whose messages have `bits` each: its mean over them."""
    mean, spread = information(c, esn0)
    gaps = [uses * mean - k + math.log2(uses) / 2 for k in bits]
    return sum(q(gap / math.sqrt(uses * spread)) if spread > 0 else float(gap < 0) for gap in gaps) / len(gaps)


# --- the source ------------------------------------------------------------------------------------------------------


def source_bits(prior: Prior, tokens: Tensor, contexts: Contexts | None = None) -> Tensor:
    """-log2 P of each text under the model: tokens [N, T] to [N], fp64. Its mean over T is the entropy that a code pays."""
    return -log_likelihood(prior, tokens, contexts).double().sum(1) / math.log(2)


def ideal_bits(bits: Sequence[float]) -> list[int]:
    """Lengths of arithmetic codes of texts that hold `bits`, at most two over."""
    return [math.ceil(b) + 2 for b in bits]


# --- closed forms of uncoded labels, BPSK ----------------------------------------------------------------------------


def token_error(bit_error: float, width: int) -> float:
    """Tokens wrong when each of `width` label bits is decided by itself; above the truth where labels are unused."""
    return -math.expm1(width * math.log1p(-bit_error))


def pairwise_error(distance: int, log_ratio: float, esn0: float) -> float:
    """P(v is preferred to u, which was sent): labels that differ in `distance` bits, log_ratio = ln P(u) / P(v)."""
    return q(math.sqrt(2 * distance * esn0) + log_ratio / math.sqrt(8 * distance * esn0))


def binary_map_error(p0: float, esn0: float) -> float:
    """Bits wrong of a binary source with P(0) = p0, decided by the posterior."""
    ratio = math.log(p0 / (1 - p0))
    return p0 * pairwise_error(1, ratio, esn0) + (1 - p0) * pairwise_error(1, -ratio, esn0)
