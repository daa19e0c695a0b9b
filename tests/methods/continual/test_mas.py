"""mas: importance of a linear model by hand, and its running mean."""

from __future__ import annotations

import torch
from torch import nn

from spolia.methods.continual.anchored import sensitivity
from spolia.methods.continual.mas import Mas, MasLearner


def test_a_linear_model_by_hand(stream) -> None:
    """d |W x|^2 / dW_ij = 2 (W x)_i x_j, its absolute value averaged over examples."""
    network = nn.Linear(5, 6, bias=False).double()
    network.weight.data = torch.randn(6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    learner, x = MasLearner(network, Mas()), stream.experiences[0].batch(slice(None)).x
    (found,) = sensitivity(learner, stream.experiences[0], None)
    wanted = (2 * (x @ network.weight.T).unsqueeze(2) * x.unsqueeze(1)).abs().mean(0)
    torch.testing.assert_close(found, wanted.detach(), rtol=1e-12, atol=1e-13)


def test_the_first_is_taken_whole_then_means_run(stream, network) -> None:
    learner, found = MasLearner(network(), Mas(blend=0.25)), []
    for experience in stream.experiences[:2]:
        learner.begin(experience)
        learner.observe(experience.draw(8, 0, 0))
        found.append(sensitivity(learner, experience, None))
        learner.end(experience)
        if experience.place == 0:
            for f, first in zip(learner.importance, found[0], strict=True):
                torch.testing.assert_close(f, first)
    for f, first, second in zip(learner.importance, *found, strict=True):
        torch.testing.assert_close(f, 0.25 * first + 0.75 * second)
