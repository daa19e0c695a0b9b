"""KD against PyTorch's own losses, its mix with cross-entropy, its other divergences."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn import functional

from spolia.core.divergence import mean
from spolia.methods.distill.kd import Kd, kd


def test_it_is_the_sum_that_pytorch_gives(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(8, 10)
    soft = functional.kl_div(s.div(4).log_softmax(-1), t.div(4).log_softmax(-1), log_target=True, reduction="batchmean")
    expected = 0.9 * 16 * soft + 0.1 * functional.cross_entropy(s, y)
    torch.testing.assert_close(mean(kd()(s, t, y), y), expected)


def test_tokens_of_a_language_model(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 6, 11)
    y[1, 3:] = -100
    hard = functional.cross_entropy(s.flatten(0, 1), y.flatten())  # its own -100
    torch.testing.assert_close(mean(kd(Kd(alpha=0.0, ce=1.0))(s, t, y), y), hard)


@pytest.mark.parametrize("divergence", ["kl", "reverse_kl", "jensen_shannon"])
def test_the_teacher_is_the_least(divergence: Any, drawn: Callable[..., Any]) -> None:
    s, t, _ = drawn(8, 10)
    objective = kd(Kd(divergence=divergence))
    assert objective(t, t).abs().max() < 1e-13  # rounding, times T^2
    assert (objective(s, t) > 0).all()


def test_labels_are_only_looked_at_where_they_count(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(8, 10)
    assert list(kd(Kd(ce=0.0)).parts(s, t, y)) == ["kd"]
