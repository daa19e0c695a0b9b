"""Attention transfer: several sites of two widths and sizes; what is not seen; gradients reach the student alone."""

from __future__ import annotations

import pytest
import torch

from spolia.core.features import attention_distance
from spolia.errors import SpoliaError
from spolia.methods.distill.attention import Attention, attention
from spolia.methods.distill.objective import Outputs

SITES = Attention(student_sites=("a", "b"), teacher_sites=("c", "d"))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_sites_add_up_and_the_teacher_has_no_gradient() -> None:
    logits = drawn(3, 4)
    ours = (drawn(3, 2, 8, 8).requires_grad_(), drawn(3, 4, 4, 4, seed=1).requires_grad_())
    theirs = (drawn(3, 5, 8, 8, seed=2).requires_grad_(), drawn(3, 6, 2, 2, seed=3).requires_grad_())
    objective = attention(SITES)
    assert objective.taps == (("a", "c"), ("b", "d"))
    losses = objective(Outputs(logits, ours), Outputs(logits, theirs))
    expected = 1000 * sum(attention_distance(a, b) for a, b in zip(ours, theirs, strict=True))
    torch.testing.assert_close(losses, expected)
    losses.sum().backward()
    assert all(f.grad.any() for f in ours)
    assert all(f.grad is None for f in theirs)


def test_channels_and_their_scale_are_not_seen() -> None:
    logits, feature = drawn(3, 4), drawn(3, 5, 4, 4)
    mixed = 3 * feature[:, torch.randperm(5, generator=torch.Generator().manual_seed(0))] * -1
    objective = attention(Attention(student_sites=("a",), teacher_sites=("a",)))
    assert objective(Outputs(logits, (mixed,)), Outputs(logits, (feature,))).max() < 1e-20  # rounding, squared


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SpoliaError, match="no modules are named"):
        attention(Attention())
