"""RKKD: a base with the rank term on top, its options, and what it does to a student."""

from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from spolia.core.divergence import mean, standardized
from spolia.core.ranking import tau_loss
from spolia.core.ranking_terms import Tau, hyperbolic
from spolia.methods.distill.kd import Kd, kd
from spolia.methods.distill.rkkd import Ranking, Rkkd, rank_loss, rkkd


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_it_is_the_base_and_the_weighted_term() -> None:
    s, t, labels = logits(4, 9), logits(4, 9, seed=1), torch.tensor([1, 0, 8, 3])
    parts = rkkd(Rkkd(base=Kd(temperature=2.0), gamma=3.0)).parts(s, t, labels)
    plain = kd(Kd(temperature=2.0)).parts(s, t, labels)
    assert list(parts) == ["ce", "kd", "rank"]
    assert torch.equal(parts["ce"], plain["ce"]) and torch.equal(parts["kd"], plain["kd"])
    wanted = 3 * tau_loss(standardized(s), standardized(t), Tau("product", "tanh", 2.0))
    torch.testing.assert_close(parts["rank"], wanted)
    assert list(rkkd(base=kd()).parts(s, t)) == ["kd", "rank"]


def test_standardised_logits_have_no_scale() -> None:
    """z-scores make it blind to a positive scale and shift of either side; raw logits to the shift alone."""
    s, t = logits(3, 40).double(), logits(3, 40, seed=1).double()
    loss = rank_loss(s, t)
    torch.testing.assert_close(
        rank_loss(5 * s + 2, 0.1 * t - 7), loss, rtol=0, atol=1e-6
    )  # epsilon 1e-7 of the z-score
    raw = Ranking(standardize="none")
    assert raw.tau.steepness == 1 and Ranking().tau.steepness == 2
    assert (rank_loss(5 * s, t, raw) - rank_loss(s, t, raw)).abs().min() > 1e-3


def test_pairs_and_weights() -> None:
    s, t = logits(2, 5, 30), logits(2, 5, 30, seed=1)
    first = t.topk(4).indices
    raw = {"standardize": "none"}
    top = rank_loss(s, t, Ranking(pairs="top", top=4, rank_weights="hyperbolic", **raw))
    weights = hyperbolic(t).gather(-1, first)
    torch.testing.assert_close(top, tau_loss(s.gather(-1, first), t.gather(-1, first), Tau(), weights))
    sampled = Ranking(pairs="sampled", orders=3, **raw)
    assert torch.equal(rank_loss(s, t, sampled, 0.25), rank_loss(s, t, sampled, 0.25))
    assert not torch.equal(rank_loss(s, t, sampled, 0.25), rank_loss(s, t, sampled, 0.5))
    assert top.shape == (2, 5)


def test_ignored_places_are_left_out() -> None:
    """Padding costs nothing and has no gradient."""
    s, t = logits(2, 3, 8).requires_grad_(), logits(2, 3, 8, seed=1)
    labels = torch.tensor([[1, 2, -100], [-100, -100, 0]])
    rank = rkkd(Rkkd(base=Kd(alpha=0.0, ce=1.0))).parts(s.detach(), t, labels)["rank"]
    assert rank[labels < 0].tolist() == [0, 0, 0] and (rank[labels >= 0] > 0).all()
    loss = rank_loss(s[labels >= 0], t[labels >= 0])
    torch.testing.assert_close(rank[labels >= 0], loss.detach())
    mean(rkkd()(s, t, labels), labels).backward()
    assert s.grad is not None and not s.grad[labels < 0].any() and s.grad[labels >= 0].any()


@pytest.mark.parametrize(("schedule", "wanted"), [("constant", [2, 2, 2]), ("rise", [0, 1, 2]), ("fall", [2, 1, 0])])
def test_gamma_goes_by_progress(schedule, wanted: list[float]) -> None:
    s, t = logits(2, 6), logits(2, 6, seed=1)
    objective = rkkd(Rkkd(gamma=2.0, schedule=schedule, until=0.5))
    term = rank_loss(s, t)
    for progress, weight in zip((0.0, 0.25, 0.8), wanted, strict=True):
        torch.testing.assert_close(objective.parts(s, t, progress=progress)["rank"], weight * term)


def test_three_lines_in_a_plain_loop() -> None:
    """The loss as it is documented, in fp16 too; and any base by its name."""
    s, t, labels = logits(6, 10).half().requires_grad_(), logits(6, 10, seed=1).half(), torch.arange(6)
    for base in ("kd", "dkd", {"name": "nkd", "gamma": 1.0}):
        objective = rkkd(Rkkd(base=base, gamma=4.0))
        loss = mean(objective(s, t, labels), labels)
        loss.backward()
        assert s.grad is not None and s.grad.isfinite().all()
    with pytest.raises(ValidationError, match="none of its losses"):
        Rkkd(base="kdd")
    assert Rkkd.model_validate(Rkkd(base="dkd").model_dump(mode="json")) == Rkkd(base="dkd")


def test_the_gradient_is_spread_over_all_classes() -> None:
    """Share of |gradient| on the teacher's lower half, one class dominant: the term half of it, KL far less.

    Means over 64 samples: the deviation is below 0.01. The specification measured 0.045, 0.33 and 0.50.
    """
    draws = torch.Generator().manual_seed(0)
    t = torch.randn(64, 100, generator=draws)
    t[:, 0] = 8.0
    s = (t + 0.8 * torch.randn(64, 100, generator=draws)).requires_grad_()
    low = t.argsort(1)[:, :50]

    def share(loss: torch.Tensor) -> float:
        slope = torch.autograd.grad(loss.sum(), s)[0].abs()
        return float((slope.gather(1, low).sum(1) / slope.sum(1)).mean())

    cold, warm = (share(kd(Kd(temperature=heat))(s, t)) for heat in (1.0, 4.0))
    for form in ("product", "joint"):
        rank = share(rank_loss(s, t, Ranking(form=form, standardize="none")))
        assert 0.45 < rank < 0.55 and rank > warm > cold


@pytest.mark.slow
def test_students_of_the_digits_order_like_their_teacher() -> None:
    """Cross-entropy with and without the term, over three paired seeds: tau rises by far more than the seeds differ.

    The specification saw 14 points of tau over four seeds, deviations of 1 to 2; asked for here are 5.
    """
    from sklearn.datasets import load_digits

    images, classes = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16.0, dtype=torch.float32), torch.tensor(classes)
    fit, test = slice(0, 1000), slice(1000, None)

    def trained(net: torch.nn.Module, loss, steps: int, seed: int, count: int) -> torch.nn.Module:
        optimiser = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        draws = torch.Generator().manual_seed(seed)
        for _ in range(steps):
            at = torch.randint(count, (32,), generator=draws)
            optimiser.zero_grad()
            loss(net(x[at]), x[at], y[at]).mean().backward()
            optimiser.step()
        return net

    def made(hidden: int, seed: int) -> torch.nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return torch.nn.Sequential(torch.nn.Linear(64, hidden), torch.nn.ReLU(), torch.nn.Linear(hidden, 10))

    plain = torch.nn.functional.cross_entropy
    teacher = trained(made(128, 100), lambda s, _, labels: plain(s, labels), 300, 100, fit.stop)
    objective = rkkd(Rkkd(base=Kd(alpha=0.0, ce=1.0), gamma=3.0))
    gains = []
    for seed in range(3):
        taus = []
        for loss in (
            lambda s, _, labels: plain(s, labels),
            lambda s, seen, labels: objective(s, teacher(seen).detach(), labels),
        ):
            student = trained(made(12, seed), loss, 200, seed, 150)
            with torch.no_grad():
                taus.append(1 - float(tau_loss(student(x[test]), teacher(x[test]), Tau(steepness=1e6)).mean()))
        gains.append(taus[1] - taus[0])
    assert sum(gains) / 3 > 0.05 and min(gains) > 0, gains
