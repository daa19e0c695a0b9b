"""One measure of noise, Es/N0, and converters for the others.

Complex baseband: y = h x + n, E|x|^2 = Es = 1, E|h|^2 = 1, n circular with variance N0 (N0 / 2 in each real dimension).
So N0 = 1 / (Es/N0). A symbol carries m bits, of which the channel code's payload is a share r, which holds H/b bits of
source entropy a bit. All ratios are in dB and differ by a constant:

| convention | is | Es/N0 is |
|---|---|---|
| `esn0` | energy of a channel use over N0 | itself |
| `ebn0_coded` | of a bit on the air | + 10 log m |
| `ebn0` | of a payload bit of the channel code; sionna's `ebnodb2no` | + 10 log (m r) |
| `ebn0_info` | of a bit of the source's entropy | + 10 log (m r H/b) |
| `energy_per_char` | of a character of the text | - 10 log (channel uses a character) |
| `real_noise` | 1 / sigma^2 on real symbols of energy 1, as pyldpc has it | - 10 log 2 |
| `deepsc` | DeepSC's code: sigma = 1 / sqrt(2 SNR) on each real dimension, whose power is 1 | + 10 log 2 |

The last two label the same noise 6 dB apart: numbers of two papers compare only after conversion.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from spolia.errors import SpoliaError, did_you_mean

if TYPE_CHECKING:
    from torch import Tensor

Db = TypeVar("Db", "float", "Tensor")
CONVENTIONS = ("esn0", "ebn0_coded", "ebn0", "ebn0_info", "energy_per_char", "real_noise", "deepsc")


@dataclass(frozen=True)
class Rates:
    """What the conversions need to know of a link; all positive."""

    bits_per_symbol: float = 1.0
    """m; complex channel uses count, so BPSK has 1."""
    code_rate: float = 1.0
    """r, payload bits of the channel code a bit on the air; 1 uncoded."""
    entropy_per_bit: float = 1.0
    """H/b, source entropy of a payload bit, in bits."""
    symbols_per_char: float = 1.0
    """Channel uses a character of text."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not (value > 0 and math.isfinite(value)):
                raise SpoliaError(f"{name} is {value}", where="rates", mend="give a positive number")


def n0_of(esn0_db: Db) -> Db:
    """N0 at Es/N0 in dB, for symbols of mean energy 1."""
    return 10 ** (-esn0_db / 10)


def to_esn0(db: Db, convention: str, rates: Rates | None = None) -> Db:
    """Es/N0 in dB of `db` under `convention`."""
    return db + _offset(convention, rates or Rates())


def from_esn0(esn0_db: Db, convention: str, rates: Rates | None = None) -> Db:
    """What Es/N0 is called under `convention`, in dB."""
    return esn0_db - _offset(convention, rates or Rates())


def explain(esn0_db: float, rates: Rates) -> dict[str, float]:
    """The same noise under every convention, in dB."""
    return {convention: from_esn0(esn0_db, convention, rates) for convention in CONVENTIONS}


def _offset(convention: str, rates: Rates) -> float:
    """Es/N0 minus the convention's number, in dB."""
    coded = rates.bits_per_symbol
    payload = coded * rates.code_rate
    factors = {
        "esn0": 1.0,
        "ebn0_coded": coded,
        "ebn0": payload,
        "ebn0_info": payload * rates.entropy_per_bit,
        "energy_per_char": 1 / rates.symbols_per_char,
        "real_noise": 0.5,
        "deepsc": 2.0,
    }
    if convention not in factors:
        what = f"`{convention}` is no measure of noise"
        raise SpoliaError(what, where="convention", mend=did_you_mean(convention, CONVENTIONS))
    return 10 * math.log10(factors[convention])
