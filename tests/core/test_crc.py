"""Check bits against binascii and long division; errors that must be seen."""

from __future__ import annotations

import binascii

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.crc import POLYNOMIALS, crc
from spolia.core.modulation import from_bits
from spolia.core.seeds import generator
from spolia.errors import SpoliaError


def bits_of(data: bytes, order: str = "big") -> torch.Tensor:
    raw = np.unpackbits(np.frombuffer(data, np.uint8), bitorder=order)  # type: ignore[call-overload]
    return torch.from_numpy(raw)


def divided(bits: list[int], width: int) -> int:
    """The remainder of the bits times x^width, on whole numbers."""
    value = int("".join(map(str, bits)) or "0", 2) << width
    polynomial = 1 << width | POLYNOMIALS[width]
    while value.bit_length() > width:
        value ^= polynomial << value.bit_length() - width - 1
    return value


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=40))
def test_16_bits_are_binasciis(data: bytes) -> None:
    assert int(from_bits(crc(bits_of(data), 16))) == binascii.crc_hqx(data, 0)


@settings(max_examples=25, deadline=None)
@given(st.binary(max_size=40))
def test_32_bits_are_binasciis(data: bytes) -> None:
    """crc32 reads bytes from their lowest bit, and starts and ends with all ones: what is left is linear, as ours is."""
    found = crc(bits_of(data, "little"), 32).tolist()
    reflected = sum(bit << place for place, bit in enumerate(found))
    assert reflected == binascii.crc32(data) ^ binascii.crc32(bytes(len(data)))


@pytest.mark.parametrize("width", POLYNOMIALS)
def test_is_long_division_and_sees_bursts(width: int) -> None:
    rng = generator(0, width)
    bits = torch.from_numpy(rng.integers(0, 2, (4, 3, 70)).astype(np.uint8))
    found = crc(bits, width)
    assert found.shape == (4, 3, width)
    for i, j in np.ndindex(4, 3):
        assert int(from_bits(found[i, j])) == divided(bits[i, j].tolist(), width)
    for start in range(60):
        for length in range(1, min(width, 10) + 1):
            wrong = bits[0, 0].clone()
            wrong[start : start + length] ^= 1
            assert not torch.equal(crc(wrong, width), found[0, 0])


def test_a_message_with_its_remainder_has_none() -> None:
    bits = torch.from_numpy(generator(1).integers(0, 2, 33).astype(np.uint8))
    assert not crc(torch.cat([bits, crc(bits, 11)]), 11).any()


def test_none_and_unknown() -> None:
    assert crc(torch.ones(2, 5, dtype=torch.uint8), 0).shape == (2, 0)
    with pytest.raises(SpoliaError, match="6, 8, 11"):
        crc(torch.ones(5), 7)
