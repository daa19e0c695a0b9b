"""Distances of features: by hand, of two sizes, and what does not fit."""

from __future__ import annotations

import pytest
import torch

from spolia.core import features as f
from spolia.errors import SpoliaError


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_an_attention_map_by_hand() -> None:
    feature = torch.tensor([[[[1.0, 2.0]], [[-3.0, 0.0]]]])  # one input, two channels, places (1, -3), (2, 0)
    expected = torch.tensor([[(1 + 9) / 2, (4 + 0) / 2]])
    torch.testing.assert_close(f.attention_map(feature), expected / expected.norm())
    torch.testing.assert_close(f.attention_map(5 * feature), f.attention_map(feature))
    tokens = feature.flatten(2).mT  # [1, places, channels]
    torch.testing.assert_close(f.attention_map(tokens), f.attention_map(feature))
    ones = f.attention_map(feature, power=1.0)
    torch.testing.assert_close(ones, torch.nn.functional.normalize(torch.tensor([[2.0, 1.0]])))


def test_attention_of_two_widths_and_sizes() -> None:
    student, teacher = drawn(3, 4, 8, 8), drawn(3, 6, 4, 4, seed=1)
    shrunk = torch.nn.functional.avg_pool2d(student, 2)
    expected = (f.attention_map(shrunk) - f.attention_map(teacher)).square().mean(1)
    torch.testing.assert_close(f.attention_distance(student, teacher), expected)
    assert not f.attention_distance(teacher, 2 * teacher).gt(1e-30).any()  # a length of 1, rounded


def test_hints() -> None:
    a, b = drawn(3, 4, 8, 8), drawn(3, 4, 8, 8, seed=1)
    torch.testing.assert_close(f.hint(a, b), torch.stack([(x - y).square().mean() for x, y in zip(a, b, strict=True)]))
    tokens = f.hint(drawn(2, 5, 4), drawn(2, 5, 4, seed=1))
    assert tokens.shape == (2, 5)


def test_a_projection_is_a_linear_map_of_the_channels() -> None:
    matrix, shift, maps = drawn(5, 3), drawn(5, seed=1), drawn(2, 3, 4, 6, seed=2)
    by_place = (maps.movedim(1, -1) @ matrix.T + shift).movedim(-1, 1)
    torch.testing.assert_close(f.projected(maps, matrix, shift), by_place)
    tokens = drawn(2, 7, 3)
    torch.testing.assert_close(f.projected(tokens, matrix, shift), tokens @ matrix.T + shift)


def test_gradients() -> None:
    pair = (drawn(2, 3, 4, 4).requires_grad_(), drawn(2, 5, 2, 2, seed=1))
    assert torch.autograd.gradcheck(f.attention_distance, pair)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: f.hint(drawn(2, 3), drawn(2, 4)), "[2, 3]"),
        (lambda: f.hint(drawn(2, 3), drawn(3, 3)), "[3, 3]"),
        (lambda: f.hint(drawn(2, 3, 4), drawn(2, 5, 4)), "[2, 5, 4]"),
        (lambda: f.alike(drawn(2, 3, 4, 4), drawn(2, 16, 3)), "[2, 16, 3]"),
        (lambda: f.attention_map(drawn(2, 3)), "no places"),
    ],
)
def test_what_does_not_fit_is_named(call, words: str) -> None:
    with pytest.raises(SpoliaError) as error:
        call()
    assert words in str(error.value)


def test_half_precision_is_computed_in_single() -> None:
    a, b = (200 * drawn(2, 3, 4, 4, seed=i) for i in range(2))
    half = f.hint(a.half(), b.half())  # squares beyond the range of a half
    torch.testing.assert_close(half, f.hint(a.half().float(), b.half().float()))
    assert half.isfinite().all()
