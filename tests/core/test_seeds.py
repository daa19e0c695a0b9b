"""Randomness by name: equal for equal names however the range is cut, different for different ones, and fair."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.seeds import TILE, bernoulli, entropy, generator, words16

ROOT = entropy(0, "layer.0.weight", 1)


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(0, 3 * TILE + 5), min_size=2, max_size=5))
def test_words_and_coins_do_not_depend_on_the_cuts(edges: list[int]) -> None:
    edges.sort()
    for draw in (words16, lambda root, a, b: bernoulli(root, a, b, 0.3)):
        whole = draw(ROOT, edges[0], edges[-1])
        parts = [draw(ROOT, a, b) for a, b in itertools.pairwise(edges)]
        assert len(whole) == edges[-1] - edges[0]
        assert np.array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("at", [0, 1, 7, TILE - 1, TILE, TILE + 1, 5 * TILE])
def test_single_words_are_those_of_the_range(at: int) -> None:
    assert words16(ROOT, at, at).size == 0 and words16(ROOT, at, at).dtype == np.uint16
    assert words16(ROOT, at, at + 1) == words16(ROOT, 0, at + 3)[at]


@pytest.mark.parametrize("probability", [1e-5, 2**-16, 0.1, 0.3, 0.5, 0.9, 1 - 2**-16, 1 - 1e-7])
def test_coins_are_fair(probability: float) -> None:
    n = 2_000_000
    heads = int(bernoulli(ROOT, 0, n, probability).sum())
    # Five standard deviations of a binomial: a fair coin fails once in two million; the seed is fixed anyway.
    assert abs(heads - n * probability) <= 5 * (n * probability * (1 - probability)) ** 0.5 + 1


def test_density_zero_and_one_are_exact() -> None:
    assert not bernoulli(ROOT, 0, 300_000, 0.0).any()
    assert bernoulli(ROOT, 0, 300_000, 1.0).all()


def test_more_probability_only_adds_heads() -> None:
    """The coin compares one hidden number with the probability, so heads at p are heads at every larger p."""
    levels = [0.25, 0.25 + 2**-18, 0.25 + 2**-12, 0.25 + 2**-8, 0.26]  # in one 256th, at its end, in the next
    draws = [bernoulli(ROOT, 0, 1_000_000, p) for p in levels]
    assert all((b >= a).all() for a, b in itertools.pairwise(draws))
    gained = [int(b.sum()) - int(a.sum()) for a, b in itertools.pairwise(draws)]
    expected = [1e6 * (b - a) for a, b in itertools.pairwise(levels)]
    # Five standard deviations of a binomial, as above.
    assert all(abs(g - e) <= 5 * e**0.5 + 1 for g, e in zip(gained, expected, strict=True))


def test_words_are_uniform_and_unlike_their_neighbours() -> None:
    words = words16(ROOT, 0, 4 * TILE).astype(np.int64)
    counts = np.bincount(words >> 8, minlength=256)
    expected = words.size / 256
    # Chi-square with 255 degrees of freedom: mean 255, deviation about 22.6; five deviations.
    assert ((counts - expected) ** 2 / expected).sum() < 255 + 5 * 22.6
    tiles = words.reshape(4, TILE) - 32767.5
    correlation = np.corrcoef(tiles)
    assert np.abs(correlation - np.eye(4)).max() < 5 / TILE**0.5  # five deviations of independent tiles


@pytest.mark.parametrize("other", [(1, "w", 0), (0, "w", 1), (0, "v", 0), (0, "w0"), (0, "w", 0, ""), (-1, "w", 0)])
def test_other_names_other_numbers(other: tuple[int, ...]) -> None:
    assert entropy(*other) != entropy(0, "w", 0)
    same = (words16(entropy(*other), 0, 10_000) == words16(entropy(0, "w", 0), 0, 10_000)).sum()
    assert same < 10  # 10,000 / 65,536 on average
    assert generator(*other).integers(1 << 60) != generator(0, "w", 0).integers(1 << 60)


def test_known_numbers() -> None:
    """A changed stream changes every random merge ever made: it must be meant."""
    digest = hashlib.sha256(words16(12345, TILE - 100, TILE + 100).tobytes()).hexdigest()
    assert digest == "ff86567b4183b33a20045e0a4c9064bb6545c68e1365ea20283ca93a18734065"


def test_equal_in_every_process() -> None:
    code = (
        "import hashlib; from spolia.core.seeds import *; r = entropy(3, 'x', 2);"
        "print(r, hashlib.sha256(words16(r, 9, 99).tobytes() + bernoulli(r, 0, 999, .2).tobytes()).hexdigest())"
    )
    told = [
        subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True
        ).stdout
        for seed in ("0", "1", "4242")
    ]
    assert told[0] == told[1] == told[2] and len(told[0]) > 64
