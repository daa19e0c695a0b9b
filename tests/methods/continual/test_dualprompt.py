"""dualprompt: shared prefixes for all, a session's own for inputs that its key is nearest to."""

from __future__ import annotations

import pytest
import torch

from spolia.errors import SpoliaError
from spolia.methods.continual.dualprompt import DualPrompt, DualPromptLearner
from spolia.parts.encoder import Encoder, Prompts
from spolia.parts.stream import Batch
from spolia.zoo.vit import ViT

SMALL = DualPrompt(shared_blocks=(0,), own_blocks=(1, 2), length=2, sessions=3)


@pytest.fixture(scope="module")
def encoder():
    return Encoder(ViT(8, 4, 16, 3, 2, generator=torch.Generator().manual_seed(0)))


def images(n: int = 4) -> torch.Tensor:
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_each_input_gets_the_prompts_of_its_nearest_session(encoder) -> None:
    own, x = DualPromptLearner(encoder, SMALL, classes=3), images()
    own.count["place"] = 2
    plain = encoder.plain(x)
    with torch.no_grad():
        own.network["key"].copy_(torch.stack([plain[0], plain[2], -plain[0]]))
    features = own.prompted(x)
    for i, session in ((0, 0), (2, 1)):
        shared, mine = own.network["shared"], own.network["own"][session]
        prefixes = {0: (shared[0, 0], shared[0, 1]), 1: (mine[0, 0], mine[0, 1]), 2: (mine[1, 0], mine[1, 1])}
        alone = encoder.features(x[i : i + 1], Prompts(prefixes=prefixes))
        torch.testing.assert_close(features[i : i + 1], alone, rtol=1e-4, atol=1e-5)


def test_sessions_that_are_not_learned_are_not_chosen(encoder) -> None:
    own, x = DualPromptLearner(encoder, SMALL, classes=3), images(1)
    with torch.no_grad():
        own.network["key"].copy_(torch.stack([-encoder.plain(x)[0], encoder.plain(x)[0], encoder.plain(x)[0]]))
    own.count["place"] = 0
    first = own.prompted(x)
    own.count["place"] = 1
    assert not torch.allclose(own.prompted(x), first)
    own.count["place"] = 9  # sessions that only got prototypes
    assert own.prompted(x).isfinite().all()


def test_training_reaches_the_sessions_own_alone(encoder) -> None:
    own = DualPromptLearner(encoder, SMALL, classes=4)
    own.count["place"], own.now[:] = 1, [2, 3]
    loss, _ = own.loss(Batch(images(), torch.tensor([2, 3, 3, 2])))
    loss.backward()
    for name in ("own", "key"):
        assert (own.network[name].grad.flatten(1).abs().sum(1) > 0).tolist() == [False, True, False]
    assert own.network["shared"].grad.abs().sum() > 0


def test_blocks_that_are_not_there(encoder) -> None:
    with pytest.raises(SpoliaError, match="block 4 of an encoder of 3"):
        DualPromptLearner(encoder, DualPrompt(), classes=3)
    with pytest.raises(SpoliaError, match="block 1 is in both"):
        DualPromptLearner(encoder, DualPrompt(shared_blocks=(0, 1), own_blocks=(1,)), classes=3)
