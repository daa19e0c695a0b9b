"""DKD: the identity with KD, logits at which the published form breaks down, the warm-up."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from spolia.methods.distill.dkd import Dkd, dkd
from spolia.methods.distill.kd import Kd, kd


def test_weighted_as_kd_weighs_it_it_is_kd(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 10)
    for i in range(6):
        rest = 1 - float((t[i] / 4).softmax(-1)[y[i]])
        ours = dkd(Dkd(beta=rest, ce=0.1))(s[i], t[i], y[i])
        torch.testing.assert_close(ours, kd(Kd(alpha=1.0))(s[i], t[i], y[i]))


def test_against_the_published_form(drawn: Callable[..., Any]) -> None:
    """Softmax, sums and a label pushed down by 1000, where nothing underflows."""
    s, t, y = drawn(6, 10)
    hit = torch.nn.functional.one_hot(y, 10).bool()
    p, q = (t / 4).softmax(-1), (s / 4).softmax(-1)
    pair_p, pair_q = (torch.stack([x[hit], x.masked_fill(hit, 0).sum(-1)], -1) for x in (p, q))
    target = (pair_p * (pair_p / pair_q).log()).sum(-1)
    rest_p, rest_q = ((x / 4 - 1000.0 * hit).log_softmax(-1) for x in (t, s))
    others = (rest_p.exp() * (rest_p - rest_q)).sum(-1)
    parts = dkd().parts(s, t, y)
    torch.testing.assert_close(parts["target"], 16 * target)
    # 1000 is a hundred times the logits: two digits fewer than fp64 has
    torch.testing.assert_close(parts["others"], 8 * 16 * others, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("sure", [100.0, 1e4])
def test_a_label_that_leaves_nothing_to_the_rest(sure: float) -> None:
    """In fp32 1 - p of the label is 0 here; the others are compared all the same."""
    t = torch.tensor([[sure, 0.0, 1.0, 2.0]])
    s = torch.tensor([[sure, 2.0, 0.0, 0.0]], requires_grad=True)
    parts = dkd(Dkd(temperature=1.0)).parts(s, t, torch.tensor([0]))
    p, q = (x[:, 1:].softmax(-1) for x in (t, s.detach()))
    torch.testing.assert_close(parts["others"], 8 * (p * (p / q).log()).sum(-1))
    sum(parts.values()).sum().backward()
    assert s.grad.isfinite().all()
    assert s.grad[0, 1:].abs().min() > 0.01


def test_the_warm_up(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(3, 5)
    full = dkd().parts(s, t, y)
    for progress, share in ((0.0, 0.0), (1 / 24, 0.5), (1 / 12, 1.0), (0.6, 1.0)):
        parts = dkd().parts(s, t, y, progress)
        torch.testing.assert_close(parts["others"], share * full["others"])
        torch.testing.assert_close(parts["target"], share * full["target"])
        assert torch.equal(parts["ce"], full["ce"])
    at_once = dkd(Dkd(warmup=0.0))
    assert torch.equal(at_once(s, t, y, 0.0), at_once(s, t, y, 1.0))
