"""Sizes in words."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia.runs.sizes import parse_size, show_size, write_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("5GB", 5 * 10**9), ("512MB", 512 * 10**6), ("1GiB", 2**30), ("1 gib", 2**30), ("1.5GB", 1_500_000_000),
        ("5B", 5 * 10**9), ("5M", 5 * 10**6), ("7k", 7000), ("100", 100), (100, 100), (5e9, 5 * 10**9), ("0.1KB", 100),
    ],
)  # fmt: skip
def test_sizes_in_words(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "GB", "5X", "-5GB", "5 5GB", "0", "0.1", "nan", "1e3GB", None, True])
def test_what_is_no_size_is_refused(text):
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


@given(st.integers(1, 2**70))
def test_a_written_size_is_read_back_exactly(size):
    assert parse_size(write_size(size)) == size


@given(st.integers(1, 10**9), st.sampled_from(["KB", "MB", "GB", "TB", "KiB", "MiB", "GiB", "TiB"]))
def test_a_written_size_is_no_longer_than_its_bytes(count, unit):
    size = parse_size(f"{count}{unit}")
    assert len(str(write_size(size))) <= len(str(size)) + 1


@given(st.floats(1, 1e15))
def test_sizes_for_people_are_short_and_near(size):
    number, unit = show_size(size).split()
    scale = {"bytes": 1, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}[unit]
    assert abs(float(number) * scale - size) <= max(0.5, 0.005 * size)  # whole bytes, then three figures
    assert "e" not in number
