"""coda: weighted sums of components, old ones still, starts at right angles."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from spolia.errors import SpoliaError
from spolia.methods.continual.coda import PARTS, Coda, CodaLearner, leaning, rows_apart
from spolia.parts.encoder import Encoder
from spolia.parts.stream import Batch
from spolia.zoo.vit import ViT

SMALL = Coda(components=6, length=2, blocks=(0, 2), sessions=3)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(ViT(8, 4, 16, 3, 2, generator=torch.Generator().manual_seed(0)))


def test_prompts_by_hand(encoder) -> None:
    own = CodaLearner(encoder, SMALL, classes=3)
    q = torch.randn(2, 16, generator=torch.Generator().manual_seed(1))
    parts = {name: own.network[name].detach() for name in PARTS}
    found = own.prompts(q, parts)
    assert set(found.prefixes) == {0, 2}
    for i, block in enumerate((0, 2)):
        for n in range(2):
            made = torch.zeros(4, 16)
            for m in range(6):
                seen, key = q[n] * parts["attention"][i, m], parts["key"][i, m]
                made += (seen @ key / seen.norm() / key.norm()) * parts["prompts"][i, m]
            keys, values = found.prefixes[block]
            torch.testing.assert_close(torch.cat([keys[n], values[n]]), made)


def test_a_session_adds_its_components_and_trains_no_others(encoder) -> None:
    own = CodaLearner(encoder, SMALL, classes=4)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2))
    own.count["place"], own.now[:] = 1, [2, 3]
    loss, _ = own.loss(Batch(x, torch.tensor([2, 3, 2, 3])))
    loss.backward()
    for name in PARTS:
        grown = own.network[name].grad.flatten(2).abs().sum((0, 2)) > 0
        assert grown.tolist() == [False, False, True, True, False, False]
    assert own.until("key", 0).shape[1] == 2 and own.until("key", 2).shape[1] == 6


def test_starts_are_at_right_angles(encoder) -> None:
    own = CodaLearner(encoder, SMALL, classes=3)
    for name in PARTS:  # fp32 rows of length 1
        assert leaning(own.network[name].detach().flatten(2)) < 1e-12
    many = rows_apart(10, (4,), np.random.default_rng(0))  # more rows than columns: groups of four, four and two
    for group in many.split(4):
        torch.testing.assert_close(group @ group.T, torch.eye(len(group)), atol=1e-6, rtol=0)
    assert leaning(many.unsqueeze(0)) > 0.01


def test_the_penalty_is_in_the_loss(encoder) -> None:
    x, y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([0, 1, 0, 1])
    losses = []
    for apart in (0.0, 2.0):
        own = CodaLearner(encoder, SMALL.model_copy(update={"apart": apart}), classes=2)
        own.count["place"], own.now[:] = 0, [0, 1]
        with torch.no_grad():
            own.network["key"].mul_(2)
        losses.append(own.loss(Batch(x, y))[0].item())
        gap = leaning(own.until("key", 0)).item()  # of length 2: (4 - 1)^2 on half the elements
    assert gap == pytest.approx(4.5, rel=1e-5) and losses[1] - losses[0] == pytest.approx(2 * 4.5, rel=1e-4)


def test_fewer_components_than_sessions(encoder) -> None:
    with pytest.raises(SpoliaError, match="2 components for 3 sessions"):
        CodaLearner(encoder, SMALL.model_copy(update={"components": 2}), classes=3)
