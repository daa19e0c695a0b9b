"""Divergences against scipy, closed forms and identities; in half precision, at infinite logits, in any shape."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.special import softmax
from scipy.stats import entropy as scipy_kl
from torch import Tensor

from spolia.core import divergence as d
from spolia.errors import SpoliaError

LABELLED = (d.target_kl, d.other_kl, d.other_cross_entropy, d.target_cross_entropy)
TEMPERED = (d.kl, d.reverse_kl, d.jensen_shannon, d.soft_cross_entropy)
PLAIN = (*TEMPERED, d.mse, d.l1)


def drawn(*shape: int, seed: int = 0, scale: float = 2.0) -> tuple[Tensor, Tensor, Tensor]:
    """Student and teacher logits in fp64, and labels."""
    source = torch.Generator().manual_seed(seed)
    s, t = (scale * torch.randn(*shape, generator=source, dtype=torch.float64) for _ in range(2))
    return s, t, torch.randint(shape[-1], shape[:-1], generator=source)


def every(s: Tensor, t: Tensor, y: Tensor) -> list[Tensor]:
    """All losses of this module."""
    return [*(f(s, t) for f in PLAIN), *(f(s, t, y) for f in LABELLED), d.cross_entropy(s, y)]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_is_scipys(temperature: float) -> None:
    s, t, _ = drawn(7, 10)
    p, q = (softmax(x.numpy() / temperature, axis=-1) for x in (t, s))
    squared = temperature**2
    # fp64 throughout: a sum of ten terms of order one
    np.testing.assert_allclose(d.kl(s, t, temperature), squared * scipy_kl(p, q, axis=-1), rtol=1e-11)
    np.testing.assert_allclose(d.reverse_kl(s, t, temperature), squared * scipy_kl(q, p, axis=-1), rtol=1e-11)
    m = (p + q) / 2
    mixed = (scipy_kl(p, m, axis=-1) + scipy_kl(q, m, axis=-1)) / 2
    np.testing.assert_allclose(d.jensen_shannon(s, t, temperature), squared * mixed, rtol=1e-11)
    crossed = scipy_kl(p, q, axis=-1) + scipy_kl(p, axis=-1)
    np.testing.assert_allclose(d.soft_cross_entropy(s, t, temperature), squared * crossed, rtol=1e-11)


def test_distances_of_logits() -> None:
    s, t, _ = drawn(3, 4, 5)
    np.testing.assert_allclose(d.mse(s, t), ((s - t).numpy() ** 2).mean(-1))
    np.testing.assert_allclose(d.l1(s, t), np.abs((s - t).numpy()).mean(-1))


def test_of_equal_logits_there_is_nothing_to_learn() -> None:
    s, _, _ = drawn(5, 8)
    for loss in (d.kl, d.reverse_kl, d.jensen_shannon):
        x = s.clone().requires_grad_()
        value = loss(x, s, 3.0)
        value.sum().backward()
        assert value.abs().max() < 1e-14  # rounding of log-softmax, twice
        assert x.grad.abs().max() < 1e-14


def test_a_hot_kl_is_a_distance_of_centred_logits() -> None:
    """T^2 KL -> |(s - mean s) - (t - mean t)|^2 / (2 C), with an error of order 1 / T."""
    s, t, _ = drawn(6, 10)
    apart = (s - s.mean(-1, keepdim=True)) - (t - t.mean(-1, keepdim=True))
    limit = apart.square().sum(-1) / 20
    # the next term of the expansion is cubic in the logits over T: 1e4 leaves 1e-3 at most
    torch.testing.assert_close(d.kl(s, t, 1e4), limit, rtol=1e-3, atol=0)


def test_the_gradient_of_kl() -> None:
    s, t, _ = drawn(6, 10)
    x = s.clone().requires_grad_()
    d.kl(x, t, 4.0).sum().backward()
    torch.testing.assert_close(x.grad, 4 * ((s / 4).softmax(-1) - (t / 4).softmax(-1)), rtol=1e-12, atol=1e-14)


@settings(max_examples=30, deadline=None)
@given(st.integers(2, 12), st.floats(0.3, 8.0), st.floats(0.1, 30.0), st.integers(0, 1000))
def test_kd_is_target_and_others(classes: int, temperature: float, scale: float, seed: int) -> None:
    """KD = TCKD + (1 - p of the label) NCKD, at any scale of the logits."""
    s, t, y = drawn(4, classes, seed=seed, scale=scale)
    rest = 1 - (t / temperature).softmax(-1).gather(-1, y[:, None]).squeeze(-1)
    both = d.target_kl(s, t, y, temperature) + rest * d.other_kl(s, t, y, temperature)
    whole = d.kl(s, t, temperature)
    # rounding relative to the largest log-probability, times T^2 as the losses are
    atol = 1e-14 * temperature * max(float(s.abs().max()), float(t.abs().max()), temperature) * 10
    torch.testing.assert_close(both, whole, rtol=1e-10, atol=atol)


def test_two_classes_have_no_others() -> None:
    s, t, y = drawn(5, 2)
    assert not d.other_kl(s, t, y, 4.0).any()
    assert not d.other_cross_entropy(s, t, y).any()
    torch.testing.assert_close(d.target_kl(s, t, y, 4.0), d.kl(s, t, 4.0))


def test_the_losses_of_nkd_are_least_at_the_teachers_rest_and_a_sure_label() -> None:
    _, t, y = drawn(4, 6)
    least = d.other_cross_entropy(t, t, y, 2.0)
    rest = torch.stack([row[torch.arange(6) != label] for row, label in zip(t, y, strict=True)]) / 2
    np.testing.assert_allclose(least, 4 * scipy_kl(softmax(rest.numpy(), axis=-1), axis=-1), rtol=1e-12)
    for seed in range(20):
        assert (d.other_cross_entropy(drawn(4, 6, seed=seed + 1)[0], t, y, 2.0) >= least).all()
    sure = torch.nn.functional.one_hot(y, 6) * 50.0
    assert d.target_cross_entropy(sure.double(), t, y).max() < 1e-18  # 5 e^-50 of the others


@pytest.mark.parametrize("loss", [*TEMPERED, *LABELLED[:3]])
def test_gradients(loss: Callable[..., Tensor]) -> None:
    s, t, y = drawn(3, 4)
    labels = (y,) if loss in LABELLED else ()
    temperature = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)
    leaves = (s.requires_grad_(), t.requires_grad_(), temperature)
    assert torch.autograd.gradcheck(lambda a, b, heat: loss(a, b, *labels, heat), leaves)


@pytest.mark.parametrize("loss", [d.mse, lambda s, t: d.kl(d.standardized(s), d.standardized(t), 2.0)])
def test_more_gradients(loss: Callable[..., Tensor]) -> None:
    s, t, _ = drawn(3, 4)
    assert torch.autograd.gradcheck(loss, (s.requires_grad_(), t.requires_grad_()))


def test_any_leading_shape_is_the_flattened_one() -> None:
    s, t, y = drawn(2, 3, 4, 5)
    flat = every(s.reshape(24, 5), t.reshape(24, 5), y.reshape(24))
    for shaped, rows in zip(every(s, t, y), flat, strict=True):
        assert shaped.shape == (2, 3, 4)
        assert torch.equal(shaped.reshape(24), rows)
    for alone, rows in zip(every(s[0, 0, 0], t[0, 0, 0], y[0, 0, 0]), flat, strict=True):
        assert alone.shape == ()
        # a vector of its own may be summed in another order
        torch.testing.assert_close(alone, rows[0])


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(half: torch.dtype) -> None:
    s, t, y = drawn(6, 50, scale=8.0)
    s, t = s.to(half), t.to(half)
    for ours, single in zip(every(s, t, y), every(s.float(), t.float(), y), strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, single)
    x = s.clone().requires_grad_()
    d.kl(x, t, 4.0).sum().backward()
    assert x.grad.dtype == half


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("size", [1e4, 6e4])
def test_huge_logits_are_finite(dtype: torch.dtype, size: float) -> None:
    s, t, y = drawn(6, 5, scale=1.0)
    s, t = (size * s.clamp(-1, 1)).to(dtype).requires_grad_(), (size * t.clamp(-1, 1)).to(dtype)
    for loss in every(s, t, y):
        (slope,) = torch.autograd.grad(loss.sum(), s)
        assert loss.isfinite().all()
        # a half's own range ends before the gradient of a squared distance does
        assert slope.isfinite().all() or dtype == torch.float16


def test_classes_that_are_ruled_out_count_as_nothing() -> None:
    """-inf in both, as in masked vocabularies: what the other classes give by themselves."""
    s, t, _ = drawn(4, 6)
    a, b = (torch.cat([x, torch.full((4, 2), -math.inf, dtype=torch.float64)], -1).requires_grad_() for x in (s, t))
    for loss in TEMPERED:
        value = loss(a, b, 2.0)
        torch.testing.assert_close(value, loss(s, t, 2.0))
        for slope in torch.autograd.grad(value.sum(), (a, b)):
            assert slope.isfinite().all()
            assert not slope[:, 6:].any()


def test_labels_below_zero_are_not_counted() -> None:
    s, t, y = drawn(2, 4, 5)
    y[0, 1] = y[1, 3] = -100
    for loss in (*(f(s, t, y) for f in LABELLED), d.cross_entropy(s, y)):
        assert not loss[y < 0].any()
        torch.testing.assert_close(d.mean(loss, y), loss[y >= 0].mean())
    whole = d.kl(s, t)
    torch.testing.assert_close(d.mean(whole, y), whole[y >= 0].mean())
    torch.testing.assert_close(d.mean(whole), whole.mean())
    assert d.mean(whole, torch.full_like(y, -100)) == 0
    assert d.mean(whole[:0]) == 0
    torch.testing.assert_close(d.mean(whole, y[0]), whole[:, y[0] >= 0].mean())  # the same labels for two views


@settings(max_examples=30, deadline=None)
@given(st.floats(0.01, 100.0), st.floats(-50.0, 50.0), st.integers(2, 40))
def test_z_scores_know_neither_scale_nor_shift(scale: float, shift: float, classes: int) -> None:
    x = drawn(3, classes)[0]
    z = d.standardized(x)
    # 1e-7 beside the deviation: of vectors a hundred times smaller it is 1e-5 at most
    torch.testing.assert_close(d.standardized(scale * x + shift), z, rtol=1e-3, atol=1e-5)
    assert z.max() <= (classes - 1) / math.sqrt(classes)
    torch.testing.assert_close(z.mean(-1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_the_z_score_of_a_constant_is_nothing() -> None:
    x = torch.full((2, 5), 3.0, requires_grad=True)
    z = d.standardized(x)
    assert not z.any()
    (z * torch.arange(5.0)).sum().backward()
    assert x.grad.abs().max() < 10
    assert not d.standardized(torch.ones(3, 1)).any()


def test_the_temperature_of_each_sample() -> None:
    s, t, _ = drawn(3, 4, 5)
    heat = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    each = d.kl(s, t, heat[:, None, None])
    for i, temperature in enumerate(heat.tolist()):
        torch.testing.assert_close(each[i], d.kl(s[i], t[i], temperature))


WRONG: list[tuple[Any, tuple[str, ...]]] = [
    (lambda s, t, y: d.kl(s, t[:, :4]), ("[3, 5]", "[3, 4]")),
    (lambda s, t, y: d.mse(s, t[:2]), ("[3, 5]", "[2, 5]")),
    (lambda s, t, y: d.kl(s, t.long()), ("teacher", "int64")),
    (lambda s, t, y: d.kl(s[:, :0], t[:, :0]), ("[3, 0]",)),
    (lambda s, t, y: d.cross_entropy(s, y[:2]), ("[2]", "[3, 5]")),
    (lambda s, t, y: d.target_kl(s, t, y.float()), ("float32",)),
    (lambda s, t, y: d.target_kl(s, t, y + 5), ("of 5 classes",)),
    (lambda s, t, y: d.other_kl(s[:, :1], t[:, :1], 0 * y), ("one class",)),
]


@pytest.mark.parametrize(("call", "words"), WRONG)
def test_what_is_wrong_is_named(call: Callable[..., Tensor], words: tuple[str, ...]) -> None:
    with pytest.raises(SpoliaError) as error:
        call(*drawn(3, 5))
    assert all(word in str(error.value) for word in words)
