"""NKD against its formula; it is a cross-entropy, so its least value is not 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from spolia.methods.distill.nkd import Nkd, nkd


def test_it_is_its_formula(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 5)
    parts = nkd(Nkd(temperature=2.0)).parts(s, t, y)
    for i, label in enumerate(y.tolist()):
        target = -t[i].softmax(-1)[label] * s[i].log_softmax(-1)[label]
        others = [c for c in range(5) if c != label]
        rest = -((t[i, others] / 2).softmax(-1) * (s[i, others] / 2).log_softmax(-1)).sum()
        torch.testing.assert_close(parts["target"][i], target)
        torch.testing.assert_close(parts["others"][i], 1.5 * 4 * rest)


def test_at_the_teacher_the_others_rest_but_not_at_zero(drawn: Callable[..., Any]) -> None:
    _, t, y = drawn(6, 5)
    x = t.clone().requires_grad_()
    others = nkd().parts(x, t, y)["others"]
    others.sum().backward()
    assert x.grad.abs().max() < 1e-14  # a stationary point
    p = t[torch.nn.functional.one_hot(y, 5) == 0].view(6, 4).softmax(-1)
    torch.testing.assert_close(others, -1.5 * (p * p.log()).sum(-1))


def test_a_sure_teacher_gives_no_nan() -> None:
    """Where log(softmax) is -inf in fp32."""
    t = torch.tensor([[500.0, 0.0, -500.0]])
    s = torch.tensor([[-500.0, 0.0, 500.0]], requires_grad=True)
    loss = nkd()(s, t, torch.tensor([0]))
    loss.sum().backward()
    assert loss.isfinite().all()
    assert s.grad.isfinite().all()
