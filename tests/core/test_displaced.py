from __future__ import annotations

import pytest
import torch

from spolia.core.alignment import displaced, mean, mean_cosine, penalised
from spolia.core.seeds import generator


def quadratics(tasks: int, size: int = 4, seed: int = 0):
    """L_i = (theta - c_i)' A_i (theta - c_i) / 2 in fp64, with A_i and c_i, over two named tensors."""
    draws = generator(seed, "quadratics")
    matrices, centres = [], []
    for _ in range(tasks):
        root = torch.from_numpy(draws.standard_normal((size, size)))
        matrices.append(root @ root.T + torch.eye(size, dtype=torch.float64))
        centres.append(torch.from_numpy(draws.standard_normal(size)))

    def loss(i):
        def value(weights):
            gap = torch.cat([weights["a"].flatten(), weights["b"].flatten()]) - centres[i]
            return gap @ matrices[i] @ gap / 2

        return value

    at = torch.from_numpy(draws.standard_normal(size))
    return [loss(i) for i in range(tasks)], {"a": at[:2].clone(), "b": at[2:].clone()}, matrices, centres


def flat(weights) -> torch.Tensor:
    return torch.cat([weights["a"].flatten(), weights["b"].flatten()])


def closed_form(weights, matrices, centres, factor: float) -> torch.Tensor:
    """grad of mean L_i + factor * mean |g_i - g|^2, by hand: g_i = A_i (theta - c_i)."""
    at = flat(weights)
    own = torch.stack([a @ (at - c) for a, c in zip(matrices, centres, strict=True)])
    middle, curve = own.mean(0), torch.stack(matrices).mean(0)
    gaps = [(a - curve) @ (g - middle) for a, g in zip(matrices, own, strict=True)]
    return middle + factor * 2 * torch.stack(gaps).mean(0)


def test_on_quadratics_it_is_the_gradient_of_the_penalised_mean():
    losses, weights, matrices, centres = quadratics(4)
    for eta in (1e-3, 0.1):
        found = displaced(losses, weights, eta)
        wanted = closed_form(weights, matrices, centres, eta / 2)
        assert (flat(found.gradient) - wanted).abs().max() < 1e-12 * wanted.abs().max().clamp(min=1)
        explicit = penalised(losses, weights, eta)
        assert (flat(explicit.gradient) - wanted).abs().max() < 1e-11
        assert found.losses == pytest.approx([float(loss(weights)) for loss in losses])


def test_differentiated_through_the_factor_is_twice_as_large():
    """The released code: the residual against eta is O(eta^2), against eta / 2 it is O(eta)."""
    losses, weights, matrices, centres = quadratics(4)
    eta = 1e-4
    found = flat(displaced(losses, weights, eta, detached=False).gradient)
    twice, once = (closed_form(weights, matrices, centres, factor) for factor in (eta, eta / 2))
    assert (found - twice).abs().max() < 0.05 * (found - once).abs().max()


def test_on_other_losses_the_difference_falls_with_the_square():
    def loss(i):
        return lambda w: (torch.sin(flat(w) * (i + 1)) * torch.arange(1.0, 5.0, dtype=torch.float64)).sum().square()

    losses = [loss(i) for i in range(3)]
    _, weights, _, _ = quadratics(1)
    gaps = []
    for eta in (1e-4, 5e-5):
        both = (way(losses, weights, eta).gradient for way in (displaced, penalised))
        gaps.append(float((flat(next(both)) - flat(next(both))).norm()))
    assert gaps[0] / gaps[1] == pytest.approx(4, rel=0.2)


def test_the_limits_are_the_mean_gradient():
    losses, weights, _, _ = quadratics(3)
    plain = flat(mean(losses, weights).gradient)
    torch.testing.assert_close(flat(displaced(losses, weights, 0.0).gradient), plain, rtol=1e-12, atol=1e-12)
    one = displaced(losses[:1], weights, 0.3)
    torch.testing.assert_close(flat(one.gradient), flat(mean(losses[:1], weights).gradient), rtol=1e-12, atol=1e-12)
    same = displaced([losses[0]] * 3, weights, 0.3)
    torch.testing.assert_close(flat(same.gradient), flat(mean(losses[:1], weights).gradient), rtol=1e-12, atol=1e-12)
    assert one.cosine == 1.0 and same.cosine == pytest.approx(1.0)


def test_weights_stay_and_the_cost_is_two_passes_a_task():
    losses, weights, _, _ = quadratics(4)
    before, calls = {name: w.clone() for name, w in weights.items()}, []

    def counted(loss):
        def value(w):
            calls.append(1)
            return loss(w)

        return value

    found = displaced([counted(loss) for loss in losses], weights, 0.1)
    assert len(calls) == 8
    assert all(torch.equal(weights[name], w) and weights[name].grad is None for name, w in before.items())
    assert not any(g.requires_grad for g in found.gradient.values())


def test_a_parameter_that_a_loss_does_not_see_has_no_part_in_it():
    weights = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, dtype=torch.float64)}
    losses = [lambda w: w["a"].square().sum(), lambda w: 3 * w["a"].square().sum()]
    for way in (displaced, penalised):
        found = way(losses, weights, 0.1).gradient
        assert not found["b"].any() and found["a"].abs().min() > 0
    linear = penalised([lambda w: w["a"].sum(), lambda w: -w["a"].sum()], weights, 0.1)
    assert not linear.gradient["a"].any()


def test_the_mean_cosine_is_over_pairs():
    x, y = [torch.tensor([1.0, 0.0])], [torch.tensor([0.0, 1.0])]
    assert mean_cosine([x, x, y]) == pytest.approx(1 / 3)
    assert mean_cosine([x]) == 1.0


@pytest.mark.parametrize("seed", range(3))
def test_the_penalty_makes_gradients_agree(seed):
    """Tasks with minima apart, descended with and without the penalty: gradients agree more, the loss pays for it."""
    losses, start, _, _ = quadratics(4, seed=seed)
    ends = {}
    for eta in (0.0, 0.05):
        weights = {name: w.clone() for name, w in start.items()}
        for _ in range(300):
            found = displaced(losses, weights, eta)
            weights = {name: w - 0.02 * found.gradient[name] for name, w in weights.items()}
        own = torch.stack([flat(mean([loss], weights).gradient) for loss in losses])
        ends[eta] = float((own - own.mean(0)).square().sum(1).mean()), sum(displaced(losses, weights, 0.0).losses)
    assert ends[0.05][0] < ends[0.0][0]  # the variance of the gradients
    assert ends[0.05][1] > ends[0.0][1] - 1e-9  # the mean loss, which the first minimises alone
