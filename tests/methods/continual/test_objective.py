"""The divergences are Bregman divergences of the functions they are said to be of."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from spolia.methods.continual.objective import (
    OutputTerm,
    Term,
    binary,
    gaussian,
    output_divergence,
    unified,
    weight_divergence,
)

EQUAL = {"rtol": 1e-10, "atol": 1e-12}  # fp64, logarithms of probabilities down to 1e-4


def bregman(phi: Callable[[Tensor], Tensor], p: Tensor, q: Tensor) -> Tensor:
    """Phi(p) - Phi(q) - <grad Phi(q), p - q> of each row, by autograd."""
    at = q.detach().requires_grad_()
    (slope,) = torch.autograd.grad(phi(at).sum(), at)
    return phi(p) - phi(q) - (slope * (p - q)).sum(-1)


def negative_entropy(p: Tensor) -> Tensor:
    return torch.special.xlogy(p, p).sum(-1)


def pair() -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(0)
    return tuple(2 * torch.randn(9, 5, generator=draws, dtype=torch.float64) for _ in range(2))


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_kl_and_its_reverse_are_of_the_negative_entropy(temperature: float) -> None:
    h, z = pair()
    p, q = (x.div(temperature).softmax(-1) for x in (z, h))
    term = OutputTerm(reference="old", temperature=temperature)
    torch.testing.assert_close(output_divergence(term, h, z), temperature**2 * bregman(negative_entropy, p, q), **EQUAL)
    back = OutputTerm(reference="old", divergence="reverse_kl", temperature=temperature)
    torch.testing.assert_close(output_divergence(back, h, z), temperature**2 * bregman(negative_entropy, q, p), **EQUAL)


def test_one_hot_kl_is_cross_entropy() -> None:
    h, _ = pair()
    y = torch.arange(9) % 5
    one_hot = nn.functional.one_hot(y, 5).double()
    wanted = bregman(negative_entropy, one_hot, h.softmax(-1))
    torch.testing.assert_close(output_divergence(OutputTerm(), h, y), wanted, **EQUAL)
    torch.testing.assert_close(wanted, nn.functional.cross_entropy(h, y, reduction="none"), **EQUAL)


def test_squared_is_of_the_squared_norm() -> None:
    h, z = pair()
    found = output_divergence(OutputTerm(divergence="squared", reference="stored"), h, z)
    torch.testing.assert_close(found, bregman(lambda u: u.square().sum(-1), h, z) / 5, **EQUAL)


def test_binary_is_of_binary_entropies_and_icarl_but_for_a_constant() -> None:
    h, z = pair()

    def phi(p: Tensor) -> Tensor:
        return (torch.special.xlogy(p, p) + torch.special.xlogy(1 - p, 1 - p)).sum(-1)

    torch.testing.assert_close(binary(h, z), bregman(phi, z.sigmoid(), h.sigmoid()), **EQUAL)
    bce = nn.functional.binary_cross_entropy_with_logits(h, z.sigmoid(), reduction="none").sum(-1)
    torch.testing.assert_close(binary(h, z), bce + phi(z.sigmoid()), **EQUAL)


def test_uniform_is_the_missing_entropy() -> None:
    h, _ = pair()
    term = OutputTerm(divergence="reverse_kl", reference="uniform", samples="current")
    p = h.softmax(-1)
    torch.testing.assert_close(output_divergence(term, h, None), torch.tensor(5.0).double().log() + negative_entropy(p))


@pytest.mark.parametrize("kind", ["kl", "reverse_kl", "squared", "binary"])
def test_they_are_zero_at_the_reference_and_nowhere_below(kind: str) -> None:
    h, z = pair()
    term = OutputTerm(divergence=kind, reference="old")
    assert output_divergence(term, h, h).abs().max() < 1e-14
    assert output_divergence(term, h, z).min() > 0


def test_weights_are_of_a_quadratic() -> None:
    draws = torch.Generator().manual_seed(1)
    theta, anchor, f = (torch.rand(1, 6, generator=draws, dtype=torch.float64) for _ in range(3))
    wanted = bregman(lambda t: (f * t.square()).sum(-1), theta, anchor).sum()
    torch.testing.assert_close(weight_divergence([theta], [anchor], [f]), wanted, **EQUAL)


def test_gaussians_are_of_the_log_partition_with_arguments_exchanged() -> None:
    draws = torch.Generator().manual_seed(2)
    m, m0 = (torch.randn(7, generator=draws, dtype=torch.float64) for _ in range(2))
    s, s0 = (torch.rand(7, generator=draws, dtype=torch.float64) + 0.2 for _ in range(2))

    def natural(mean: Tensor, deviation: Tensor) -> Tensor:
        return torch.stack([mean / deviation**2, -0.5 / deviation**2], -1)

    def log_partition(eta: Tensor) -> Tensor:
        return -(eta[..., 0] ** 2) / (4 * eta[..., 1]) - 0.5 * (-2 * eta[..., 1]).log()

    found = gaussian([m], [s], [m0], [s0])
    torch.testing.assert_close(found, bregman(log_partition, natural(m0, s0), natural(m, s)).sum(), **EQUAL)
    normal = torch.distributions.Normal
    torch.testing.assert_close(found, torch.distributions.kl_divergence(normal(m, s), normal(m0, s0)).sum(), **EQUAL)


def test_the_objective_is_the_weighted_sum() -> None:
    h, z = pair()
    one, two = OutputTerm(weight=0.3), OutputTerm(divergence="squared", reference="stored", weight=2.0)
    y = torch.arange(9) % 5
    found = unified(torch.tensor(1.5).double(), [Term(one, h, y), Term(two, h, z)])
    wanted = 1.5 + 0.3 * nn.functional.cross_entropy(h, y) + 2 * nn.functional.mse_loss(h, z)
    torch.testing.assert_close(found, wanted, **EQUAL)
