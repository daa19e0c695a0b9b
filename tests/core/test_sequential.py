from __future__ import annotations

from itertools import permutations

import pytest
import torch

from spolia.core.alignment import mean, sequential

SIZE, RATE = 6, 1e-3


def quadratics(count: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Positive matrices and centres: L_i = (w - c)' A (w - c) / 2."""
    draws = torch.Generator().manual_seed(0)
    found = []
    for _ in range(count):
        root = torch.randn(SIZE, SIZE, generator=draws, dtype=torch.float64)
        found.append((root @ root.t() / SIZE, torch.randn(SIZE, generator=draws, dtype=torch.float64)))
    return found


def losses(parts):
    return [lambda weights, a=a, c=c: (weights["w"] - c) @ a @ (weights["w"] - c) / 2 for a, c in parts]


def test_over_all_orders_it_follows_gradients_that_agree():
    parts = quadratics()
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    orders = list(permutations(losses(parts)))
    seen = sum(sequential(order, {"w": start}, RATE).gradient["w"] for order in orders) / len(orders) / RATE

    def objective(w, inner):
        slopes = [a @ (w - c) for a, c in parts]
        total = sum((w - c) @ a @ (w - c) / 2 for a, c in parts)
        pairs = sum(g @ h for i, g in enumerate(slopes) for h in slopes[:i])
        return total - inner * RATE / 2 * pairs

    gap = {}
    for inner in (0.0, 1.0):
        w = start.clone().requires_grad_()
        (wanted,) = torch.autograd.grad(objective(w, inner), w)
        gap[inner] = float((seen - wanted).norm())
    assert gap[1.0] < 0.01 * gap[0.0]  # what is left is of order RATE^2, the term itself of order RATE


def test_one_task_is_one_step_and_no_rate_is_no_step():
    (loss, *_), start = losses(quadratics()), torch.ones(SIZE, dtype=torch.float64)
    step = sequential([loss], {"w": start}, 0.1).gradient["w"]
    assert torch.allclose(step, 0.1 * mean([loss], {"w": start}).gradient["w"], rtol=1e-14)  # a sum and a difference
    assert not sequential([loss, loss], {"w": start}, 0.0).gradient["w"].any()


def test_steps_of_adam_are_those_of_the_framework():
    parts = quadratics()
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    w = start.clone().requires_grad_()
    adam = torch.optim.Adam([w], lr=0.01)
    for loss in losses(parts):
        adam.zero_grad()
        loss({"w": w}).backward()
        adam.step()
    found = sequential(losses(parts), {"w": start}, 0.01, "adam")
    assert torch.allclose(start - w.detach(), found.gradient["w"], rtol=1e-10)  # fp64: a few roundings a step


def test_weights_stay_and_losses_are_told_as_met():
    parts, start = quadratics(), torch.ones(SIZE, dtype=torch.float64)
    before = start.clone()
    found = sequential(losses(parts), {"w": start}, 0.1)
    assert torch.equal(start, before) and not start.requires_grad
    first = float(losses(parts)[0]({"w": start}))
    assert found.losses[0] == pytest.approx(first) and found.losses[1] != pytest.approx(
        float(losses(parts)[1]({"w": start}))
    )


def test_the_mean_is_the_mean():
    parts, start = quadratics(), torch.ones(SIZE, dtype=torch.float64)
    found = mean(losses(parts), {"w": start}).gradient["w"]
    wanted = sum(a @ (start - c) for a, c in parts) / len(parts)
    assert torch.allclose(found, wanted, rtol=1e-12)
