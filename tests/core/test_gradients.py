"""Gradients as vectors, the diagonal Fisher against a Jacobian, and steps towards earlier weights in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from spolia.core import gradients
from spolia.core.functional import call
from spolia.errors import SpoliaError


def small() -> tuple[nn.Module, dict[str, Tensor], Tensor, Tensor]:
    """A network in fp64, its weights, inputs and labels."""
    draws = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for p in network.parameters():
        p.data = torch.randn(p.shape, generator=draws, dtype=torch.float64)
    x = torch.randn(7, 4, generator=draws, dtype=torch.float64)
    return network, dict(network.named_parameters()), x, torch.randint(3, (7,), generator=draws)


def logits_of(network: nn.Module):
    return lambda weights, x: call(network, weights, lambda module, x: module(x), x)


def slopes(network: nn.Module, x: Tensor, label: int) -> list[Tensor]:
    """d log p_label of one example."""
    return gradients.gradients(network(x[None]).log_softmax(-1)[0, label], list(network.parameters()))


@pytest.mark.parametrize("kind", ["true", "empirical", "weighted", "batch"])
def test_fisher_is_its_definition(kind: str) -> None:
    network, weights, x, y = small()
    found = gradients.fisher(logits_of(network), weights, x, kind=kind, labels=y)
    wanted = [torch.zeros_like(p) for p in network.parameters()]
    if kind == "batch":
        loss = nn.functional.cross_entropy(network(x), y)
        wanted = [len(x) * g**2 for g in gradients.gradients(loss, list(network.parameters()))]
    for one, label in zip(x, y.tolist(), strict=True):
        p = network(one[None]).softmax(-1)[0].detach()
        if kind == "true":
            parts = [(p[c], slopes(network, one, c)) for c in range(3)]
        elif kind in ("empirical", "weighted"):
            parts = [(p[label] if kind == "weighted" else 1.0, slopes(network, one, label))]
        else:
            parts = []
        for share, part in parts:
            wanted = [w + share * g**2 for w, g in zip(wanted, part, strict=True)]
    for f, w in zip(found.values(), wanted, strict=True):
        torch.testing.assert_close(f, w, rtol=1e-12, atol=1e-14)  # fp64, sums of 21 products


def test_sampled_fisher_is_right_on_average() -> None:
    """Strata of the unit interval in the place of random numbers: the mean over them is the integral, to 1 / strata."""
    network, weights, x, _ = small()
    one, strata = x[:1], 2000
    chances = (torch.arange(strata, dtype=torch.float64) + 0.5) / strata
    many = one.expand(strata, -1)
    found = gradients.fisher(logits_of(network), weights, many, kind="sampled", draws=chances)
    wanted = gradients.fisher(logits_of(network), weights, one, kind="true")
    top = max(float(w.max()) for w in wanted.values())
    for name, f in found.items():
        assert (f / strata - wanted[name]).abs().max() < 3 * top / strata * 10


class Stubborn(nn.Module):
    """What vmap refuses: a number read out of a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 3).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * (1.0 if float(x.sum()) < 1e9 else 2.0)


def test_modules_that_vmap_refuses_are_gone_through_one_by_one() -> None:
    network, _, x, y = Stubborn(), None, *small()[2:]
    found = gradients.fisher(logits_of(network), dict(network.named_parameters()), x, kind="empirical", labels=y)
    wanted = sum(slopes(network, one, label)[0] ** 2 for one, label in zip(x, y.tolist(), strict=True))
    torch.testing.assert_close(found["inner.weight"], wanted, rtol=1e-12, atol=1e-14)


def test_sensitivity_does_not_cancel() -> None:
    network, weights, x, _ = small()
    found = gradients.sensitivity(logits_of(network), weights, x)
    parts = [gradients.gradients(network(one[None]).square().sum(), list(network.parameters())) for one in x]
    for f, own in zip(found.values(), zip(*parts, strict=True), strict=True):
        torch.testing.assert_close(f, torch.stack(own).abs().sum(0), rtol=1e-12, atol=1e-14)


def test_labels_are_asked_for() -> None:
    network, weights, x, _ = small()
    with pytest.raises(SpoliaError, match="takes labels"):
        gradients.fisher(logits_of(network), weights, x, kind="empirical")


def test_project_leaves_what_does_not_disagree_and_removes_what_does() -> None:
    draws = torch.Generator().manual_seed(1)
    g, r = ([torch.randn(3, 2, generator=draws), torch.randn(4, generator=draws)] for _ in range(2))
    r = [-torch.sign(gradients.dot(g, r)) * part for part in r]  # now they disagree
    found = gradients.project(g, r)
    assert abs(float(gradients.dot(found, r))) < 1e-5 * float(gradients.norm(r)) * float(gradients.norm(g))  # fp32
    rest = [a - b for a, b in zip(g, found, strict=True)]
    share = gradients.dot(g, r) / gradients.dot(r, r)
    torch.testing.assert_close(rest, [share * part for part in r])
    agreeing = [-part for part in r]
    assert all(torch.equal(a, b) for a, b in zip(gradients.project(g, agreeing), g, strict=True))
    nothing = [torch.zeros_like(part) for part in r]
    assert all(torch.equal(a, b) for a, b in zip(gradients.project(g, nothing), g, strict=True))


def test_the_implicit_pull_is_the_minimiser() -> None:
    """argmin |theta - v|^2 / 2 + c sum F (theta - theta*)^2, by its normal equation; and its limits."""
    v, anchor, f = torch.tensor([1.0, 2.0, -3.0]), torch.tensor([0.5, -1.0, 3.0]), torch.tensor([0.0, 0.3, 1e9])
    theta = nn.Parameter(v.clone())
    gradients.pull_implicitly([theta], [anchor], [f], 0.7)
    assert theta[0] == v[0]
    residual = (theta[1] - v[1]) + 2 * 0.7 * f[1] * (theta[1] - anchor[1])
    assert abs(float(residual.detach())) < 1e-6
    assert float(theta[2].detach()) == pytest.approx(3.0, abs=1e-6)


def test_the_explicit_pull_is_the_gradient_of_the_distance() -> None:
    draws = torch.Generator().manual_seed(2)
    theta = nn.Parameter(torch.randn(5, generator=draws, dtype=torch.float64))
    anchor, f = (torch.rand(5, generator=draws, dtype=torch.float64) for _ in range(2))
    (wanted,) = torch.autograd.grad(1.3 * gradients.distance([theta], [anchor], [f]), [theta])
    gradients.pull([theta], [anchor], [f], 1.3)
    torch.testing.assert_close(theta.grad, wanted, rtol=1e-13, atol=0)
