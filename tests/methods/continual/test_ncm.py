"""ncm: class means of a frozen encoder's features, and the cosine to them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.bench.continual import Protocol, run
from spolia.methods.continual.ncm import Ncm, NcmLearner
from spolia.parts.encoder import Encoder
from spolia.parts.stream import class_incremental
from spolia.zoo.vit import ViT


@pytest.fixture(scope="module")
def encoder():
    return Encoder(ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0)))


@pytest.fixture(scope="module")
def stream():
    draws = torch.Generator().manual_seed(1)
    y = torch.arange(4).repeat(6)
    x = torch.randn(24, 3, 8, 8, generator=draws) + y.view(-1, 1, 1, 1)
    return class_incremental((x, y), (x[:12], y[:12]), tasks=[2, 1, 1], shots=3)


def test_the_answer_is_the_nearest_exact_mean(encoder, stream) -> None:
    own = NcmLearner(encoder, Ncm(lot=5), classes=4)  # lots that do not divide the examples
    outcome = run(own, stream, Protocol(batch=4))
    means = []
    for c in range(4):
        batch = stream.experiences[max(0, c - 1)].batch(slice(None))
        means.append(encoder.module(batch.x[batch.y == c]).mean(0))
    x = stream.tests[0].examples.batch(slice(None)).x
    features = nn.functional.normalize(encoder.module(x), dim=1)
    by_hand = features @ nn.functional.normalize(torch.stack(means), dim=1).T
    torch.testing.assert_close(own.predict(x), by_hand, rtol=1e-4, atol=1e-5)  # sums in lots
    assert outcome.fewshot()["first"] >= 0 and own.held == 4 * 16 * 4 + 4 * 8


def test_steps_change_nothing_and_order_does_not_matter(encoder, stream) -> None:
    one, other = (NcmLearner(encoder, Ncm(), classes=4) for _ in range(2))
    run(one, stream, Protocol(batch=4, epochs=3))
    for experience in stream.experiences:
        other.begin(experience)
        other.end(experience)
    assert torch.equal(one.prototypes.means, other.prototypes.means)


def test_new_means_may_lean_on_old_ones(encoder, stream) -> None:
    plain, leaning = (NcmLearner(encoder, Ncm(share=share), classes=4) for share in (0.0, 0.3))
    for own in (plain, leaning):
        for experience in stream.experiences[:2]:
            own.begin(experience)
            own.end(experience)
    assert torch.equal(plain.prototypes.means[:2], leaning.prototypes.means[:2])
    gaps = [torch.cdist(own.prototypes.means[2:3], own.prototypes.means[:2]).min() for own in (plain, leaning)]
    assert gaps[1] < gaps[0]
