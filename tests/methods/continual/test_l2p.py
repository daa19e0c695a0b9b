"""l2p: each input takes its nearest prompts; gradients reach those and their keys alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.errors import SpoliaError
from spolia.methods.continual.l2p import L2p, L2pLearner
from spolia.parts.encoder import Encoder, Prompts
from spolia.parts.stream import Batch
from spolia.zoo.vit import ViT


@pytest.fixture(scope="module")
def encoder():
    return Encoder(ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0)))


def test_the_chosen_are_the_nearest_by_cosine_of_each_input(encoder) -> None:
    own = L2pLearner(encoder, L2p(pool=5, chosen=2, length=3), classes=3)
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    near = nn.functional.cosine_similarity(encoder.plain(x).unsqueeze(1), own.network["key"].unsqueeze(0), dim=2)
    features, distance = own.chosen(x)
    for i in range(4):
        best = near[i].argsort(descending=True)[:2]
        prompts = own.network["prompts"][best].flatten(0, 1)
        alone = encoder.features(x[i : i + 1], Prompts(start=prompts))
        torch.testing.assert_close(features[i : i + 1], alone, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(distance[i], (1 - near[i][best]).sum())


def test_the_loss_by_hand_and_whom_it_reaches(encoder) -> None:
    own = L2pLearner(encoder, L2p(pool=5, chosen=1, length=2, pull=0.7), classes=4)
    own.now[:] = [1, 3]
    x, y = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(2)), torch.tensor([3, 1])
    loss, scores = own.loss(Batch(x, y))
    _, distance = own.chosen(x)
    by_hand = nn.functional.cross_entropy(scores[:, [1, 3]], torch.tensor([1, 0])) + 0.7 * distance.mean()
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    taken = own.network["prompts"].grad.abs().sum((1, 2)) > 0
    keyed = own.network["key"].grad.abs().sum(1) > 0
    assert torch.equal(taken, keyed) and 1 <= int(taken.sum()) <= 2
    assert (own.network["head_weight"].grad.abs().sum(1) > 0).tolist() == [False, True, False, True]


def test_no_more_than_there_are(encoder) -> None:
    with pytest.raises(SpoliaError, match="6 prompts of a pool of 5"):
        L2pLearner(encoder, L2p(pool=5, chosen=6), classes=3)
