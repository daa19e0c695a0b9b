from __future__ import annotations

from itertools import permutations

import pytest
import torch

from spolia.core.plackett_luce import draw, log_probability
from spolia.core.seeds import generator
from spolia.errors import SpoliaError


def scores(n: int, seed: int = 0) -> torch.Tensor:
    return torch.from_numpy(generator(seed, "scores").standard_normal(n))


def orders(n: int, k: int) -> torch.Tensor:
    return torch.tensor(list(permutations(range(n), k)))


@pytest.mark.parametrize(("n", "k"), [(1, 1), (5, 1), (5, 2), (5, 5), (6, 3)])
def test_probabilities_of_all_orders_sum_to_one(n, k):
    found = log_probability(scores(n), orders(n, k)).exp()
    assert found.sum() == pytest.approx(1.0, abs=1e-12)  # fp64 sums of at most 120 numbers
    assert (found > 0).all()


def test_the_first_draw_is_softmax_and_the_rest_softmax_of_what_is_left():
    s = scores(4)
    p = s.softmax(0)
    found = log_probability(s, torch.tensor([2, 0, 3])).exp()
    assert found == pytest.approx(float(p[2] * p[0] / (1 - p[2]) * p[3] / (1 - p[2] - p[0])), rel=1e-12)


def test_a_shift_of_all_scores_changes_nothing_and_twice_the_same_place_cannot_be():
    s = scores(5)
    every = orders(5, 2)
    torch.testing.assert_close(log_probability(s, every), log_probability(s + 7, every), rtol=0, atol=1e-12)
    assert log_probability(s, torch.tensor([1, 1])) == -torch.inf


def test_the_gradient_of_an_expected_reward_is_that_of_enumeration():
    """N = 5, K = 2. The expectation over all orders is a function of the scores; its gradient comes from one side by
    differentiating the sum, from the other by the score function, and from finite differences."""
    s, every = scores(5, 1).requires_grad_(), orders(5, 2)
    rewards = torch.from_numpy(generator(2, "rewards").standard_normal(len(every)))
    (whole,) = torch.autograd.grad((log_probability(s, every).exp() * rewards).sum(), s)
    p = log_probability(s, every).exp().detach()
    by_score = torch.stack([torch.autograd.grad(log_probability(s, order), s)[0] for order in every])
    torch.testing.assert_close((p * rewards) @ by_score, whole, rtol=0, atol=1e-12)
    step = 1e-5
    for i in range(5):
        ends = []
        for sign in (1, -1):
            moved = s.detach().clone()
            moved[i] += sign * step
            ends.append(float((log_probability(moved, every).exp() * rewards).sum()))
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(float(whole[i]), abs=1e-8)  # O(step^2) and rounding


def test_summed_single_draws_have_another_gradient():
    s, every = scores(5, 1).requires_grad_(), orders(5, 2)
    p = log_probability(s, every).exp().detach()
    rewards = torch.from_numpy(generator(2, "rewards").standard_normal(len(every)))
    single = torch.stack([torch.autograd.grad(s.log_softmax(0)[order].sum(), s)[0] for order in every])
    exact = torch.stack([torch.autograd.grad(log_probability(s, order), s)[0] for order in every])
    assert ((p * rewards) @ (single - exact)).abs().max() > 1e-3
    assert (p @ exact).abs().max() < 1e-12  # a constant reward has no gradient
    assert (p @ single).abs().max() > 1e-3  # which of the summed ones is not so


def test_draws_have_the_law():
    s, draws = scores(4), generator(0, "law")
    every = orders(4, 2)
    wanted = log_probability(s, every).exp()
    place = {tuple(order): i for i, order in enumerate(every.tolist())}
    counts, n = torch.zeros(len(every), dtype=torch.float64), 20000
    for _ in range(n):
        counts[place[tuple(draw(s, 2, draws).tolist())]] += 1
    deviation = (wanted * (1 - wanted) / n).sqrt()
    assert ((counts / n - wanted).abs() < 4.5 * deviation).all()  # 12 counts: one in 10,000 seeds would be further off


def test_what_cannot_be_drawn_is_told():
    s = scores(3)
    s[1] = -torch.inf
    assert 1 not in draw(s, 2, generator(0, "x")).tolist()
    with pytest.raises(SpoliaError, match="3 of 2 items"):
        draw(s, 3, generator(0, "x"))
