"""lwf: its equation, its limits, and extreme logits."""

from __future__ import annotations

import math

import torch
from torch import nn

from spolia.methods.continual.finetune import Finetune, FinetuneLearner
from spolia.methods.continual.lwf import Lwf, LwfLearner, among


def test_a_step_is_its_equation(stream, network) -> None:
    learner = LwfLearner(network(), Lwf(lr=0.2, alpha=1.5, temperature=2.0, weight_decay=0.0))
    first, second = stream.experiences[:2]
    learner.begin(first)
    learner.end(first)
    learner.begin(second)
    batch, old, other = second.draw(8, 0, 0), network(), network()
    for p in (*learner.parameters, *other.parameters()):
        p.data += 0.1  # away from the old network
    learner.observe(batch)
    logits = other(batch.x)
    log_q, log_p = (x[:, :2].div(2).log_softmax(-1) for x in (logits, old(batch.x).detach()))
    kl = 4 * (log_p.exp() * (log_p - log_q)).sum(-1).mean()
    (nn.functional.cross_entropy(logits[:, :4], batch.y) + 1.5 * kl).backward()
    for p, q in zip(learner.parameters, other.parameters(), strict=True):
        torch.testing.assert_close(p.detach(), (q - 0.2 * q.grad).detach(), rtol=0, atol=1e-13)  # fp64


def test_on_a_domain_stream_without_alpha_it_is_fine_tuning(stream, network, led, apart) -> None:
    from spolia.parts.stream import domain_incremental

    x, y = (torch.cat([getattr(e.batch(slice(None)), part) for e in stream.experiences]) for part in "xy")
    domains = domain_incremental((x, y), (x, y), [None, lambda x: -x])
    trail = led(LwfLearner(network(), Lwf(lr=0.1, alpha=0.0, weight_decay=0.0)), domains)
    assert apart(trail, led(FinetuneLearner(network(), Finetune(lr=0.1)), domains)) < 1e-12


def test_classes_left_out_get_nothing_and_extremes_stay_finite() -> None:
    logits = torch.tensor([[1e4, -1e4, 3.0]], requires_grad=True)
    loss = nn.functional.cross_entropy(among(logits, [0, 1]), torch.tensor([0]))
    (slope,) = torch.autograd.grad(loss, logits)
    assert math.isfinite(float(loss.detach())) and slope[0, 2] == 0
