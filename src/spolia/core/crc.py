"""Cyclic redundancy checks of bits, batched.

The remainder of the bits times x^c by a polynomial of degree c over GF(2), from a register of zeros: linear, so that it is
one product with a matrix [n, c] modulo 2. Widths 6, 11, 16 and 24 have the polynomials of 3GPP TS 38.212, section 5.1
(24: CRC24A), 8 that of TS 36.212, 32 that of IEEE 802.3. An error of which the polynomial is no divisor is seen: every
burst not longer than c, and others but for a share of about 2^-c.
"""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

POLYNOMIALS = {6: 0x21, 8: 0x9B, 11: 0x621, 16: 0x1021, 24: 0x864CFB, 32: 0x04C11DB7}
"""By width, without the highest term."""


def crc(bits: Tensor, width: int) -> Tensor:
    """Bits [..., n] to check bits [..., width], uint8; width 0 gives none."""
    if width == 0:
        return bits.new_zeros((*bits.shape[:-1], 0), dtype=torch.uint8)
    if width not in POLYNOMIALS:
        what, known = f"no polynomial of {width} bits", ", ".join(map(str, POLYNOMIALS))
        raise SpoliaError(what, where="check_bits", mend=f"0 for none, or {known}")
    exact = torch.float32 if bits.shape[-1] < 1 << 24 else torch.float64  # counts of ones stay whole numbers
    matrix = torch.from_numpy(_matrix(bits.shape[-1], width)).to(bits.device, exact)
    return (bits.to(exact) @ matrix).remainder_(2).to(torch.uint8)


@lru_cache(maxsize=64)
def _matrix(count: int, width: int) -> np.ndarray:
    """The check bits of each single one [count, width], uint8."""
    polynomial, top = POLYNOMIALS[width], 1 << width
    rows, register = np.zeros((count, width), np.uint8), polynomial  # x^width, of the last bit
    for i in range(count - 1, -1, -1):
        rows[i] = [register >> (width - 1 - j) & 1 for j in range(width)]
        register <<= 1
        if register & top:
            register ^= top | polynomial
    return rows
