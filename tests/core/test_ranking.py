"""The smooth tau: what it tends to, its gradient, what leaves it unchanged, and every exact way against the formula."""

from __future__ import annotations

import itertools
import math
from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from spolia.core import ranking_exact
from spolia.core.ranking import choose, sampled_tau_loss, tau_loss, top_pairs
from spolia.core.ranking_terms import Form, Phi, Tau, broadcast, hyperbolic, ranks
from spolia.errors import SpoliaError

pytestmark = pytest.mark.sampled(3)  # of many cases alike

FORMS, PHIS = get_args(Form), get_args(Phi)
EVERY = [Tau(form, phi, 0.7, normalize) for form in FORMS for phi in PHIS for normalize in (False, True)]


def logits(*shape: int, seed: int = 0, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slope(loss: torch.Tensor, s: torch.Tensor) -> torch.Tensor:
    return torch.autograd.grad(loss.sum(), s)[0]


def both(s: torch.Tensor, t: torch.Tensor, tau: Tau, weights: torch.Tensor | None = None) -> list:
    """(loss, gradient) as written down and by blocks."""
    found = []
    for way in ("broadcast", "chunked"):
        x = s.clone().requires_grad_()
        loss = tau_loss(x, t, tau, weights, way)
        found.append((loss.detach(), slope(loss, x)))
    return found


@pytest.mark.parametrize("tau", EVERY, ids=str)
@pytest.mark.parametrize("weighted", [False, True])
def test_blocks_are_the_formula(tau: Tau, weighted: bool) -> None:
    s, t = logits(3, 37), logits(3, 37, seed=1)
    t[0, 5] = t[0, 9]  # a tie
    weights = hyperbolic(t) if weighted else None
    (loss, gradient), (loss2, gradient2) = both(s, t, tau, weights)
    torch.testing.assert_close(loss2, loss, rtol=0, atol=1e-12)  # fp64 throughout
    torch.testing.assert_close(gradient2, gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
def test_block_size_and_fallbacks_change_nothing(form: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of 3 classes and one sample, tanh pair by pair instead of by division, ties across edges."""
    s, t = logits(4, 23), logits(4, 23, seed=1).mul(2).round()  # many ties
    tau = Tau(form, "tanh", 1.3)
    wanted = both(s, t, tau)[0]
    for name, value in (("_ROWS", 3), ("_ENTRIES", 40), ("_REACH", 0.0)):
        monkeypatch.setattr(ranking_exact, name, value)
        loss, gradient = both(s, t, tau)[1]
        torch.testing.assert_close(loss, wanted[0], rtol=0, atol=1e-12)
        torch.testing.assert_close(gradient, wanted[1], rtol=0, atol=1e-12)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("phi", PHIS)
def test_formula_is_what_finite_differences_see(form: Form, phi: Phi) -> None:
    s, t = logits(2, 6).requires_grad_(), logits(2, 6, seed=1)
    assert torch.autograd.gradcheck(lambda x: broadcast(x, t, Tau(form, phi, 0.7)), s)
    assert torch.autograd.gradcheck(lambda x: tau_loss(x, t, Tau(form, phi, 0.7), implementation="chunked"), s)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("phi", PHIS)
def test_steep_limit_is_kendalls_tau(form: Form, phi: Phi) -> None:
    """Logits are permutations of whole numbers: gaps of 1 at least. 2e9 leaves arctan 1e-9 away from 1."""
    draws = np.random.default_rng(0)
    s, t = (torch.tensor(np.stack([draws.permutation(12) + 0.0 for _ in range(5)])) for _ in range(2))
    found = tau_loss(s, t, Tau(form, phi, 2e9), implementation="chunked")
    wanted = [1 - stats.kendalltau(a, b).statistic for a, b in zip(s, t, strict=True)]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-8)


def test_steep_limit_with_weights_is_vignas_tau() -> None:
    s, t = logits(4, 15), logits(4, 15, seed=1)
    found = tau_loss(s, t, Tau("product", "tanh", 1e9), hyperbolic(t), "chunked")
    wanted = [
        1 - stats.weightedtau(a.numpy(), b.numpy(), rank=ranks(b).numpy()).statistic for a, b in zip(s, t, strict=True)
    ]
    torch.testing.assert_close(found, torch.tensor(wanted), rtol=0, atol=1e-12)


def test_ranks_are_shared_by_ties() -> None:
    assert ranks(torch.tensor([3.0, 7.0, 3.0, -1.0, 5.0])).tolist() == [2, 0, 2, 4, 1]


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(EVERY),
    st.integers(2, 9).flatmap(
        lambda n: st.tuples(*[st.lists(st.integers(-20, 20).map(lambda v: v / 4), min_size=n, max_size=n)] * 2)
    ),
    st.randoms(use_true_random=False),
)
def test_what_changes_nothing(tau: Tau, drawn: tuple[list[float], list[float]], rng) -> None:
    """Shifts of either side; an order of the classes; and -s gives 2 - loss. Quarters: shifts by 8 are exact."""
    s, t = (torch.tensor([side], dtype=torch.float64) for side in drawn)
    (formula, _), (loss, gradient) = both(s, t, tau)
    torch.testing.assert_close(loss, formula, rtol=0, atol=1e-12)
    order = list(range(s.shape[1]))
    rng.shuffle(order)
    for a, b, back in ((s + 8, t - 8, None), (s[:, order], t[:, order], order)):
        other, other_gradient = both(a, b, tau)[1]
        torch.testing.assert_close(other, loss, rtol=0, atol=1e-12)
        torch.testing.assert_close(other_gradient, gradient if back is None else gradient[:, back], rtol=0, atol=1e-12)
    if len(set(drawn[1])) > 1:
        torch.testing.assert_close(both(-s, t, tau)[1][0], 2 - loss, rtol=0, atol=1e-12)
    assert -1e-12 <= float(loss) <= 2 + 1e-12
    assert abs(float(gradient.sum())) < 1e-12


@pytest.mark.parametrize("form", ["product", "hard_teacher"])
def test_gradient_is_bounded(form: Form) -> None:
    """At most 2 k / C, and near it where all pairs of a class are steep and wrong."""
    count, k = 50, 0.5
    t = torch.arange(count, dtype=torch.float64).mul(100).unsqueeze(0)
    gradient = both(torch.zeros(1, count, dtype=torch.float64), t, Tau(form, "tanh", k))[1][1]
    assert 0.99 * 2 * k / count < float(gradient.abs().max()) <= 2 * k / count + 1e-15


@pytest.mark.parametrize("tau", EVERY, ids=str)
def test_two_classes(tau: Tau) -> None:
    """1 - phi(k D t) phi(k D s) and its like; normalised, the teacher's part is a sign."""
    s, t = torch.tensor([[0.3, 1.0]], dtype=torch.float64), torch.tensor([[2.0, -1.0]], dtype=torch.float64)
    phi = {
        "tanh": math.tanh,
        "sigmoid": lambda x: 2 / (1 + math.exp(-x)) - 1,
        "arctan": lambda x: 2 / math.pi * math.atan(x),
        "softsign": lambda x: x / (1 + abs(x)),
        "erf": math.erf,
    }[tau.phi]
    own = 1.0 if tau.form == "hard_teacher" or tau.normalize else phi(0.7 * 3)
    wanted = 1 - (phi(-0.7 * 0.7 * 3) if tau.form == "joint" else own * phi(-0.7 * 0.7))
    for loss, _ in both(s, t, tau):
        assert float(loss) == pytest.approx(wanted, abs=1e-14)


@pytest.mark.parametrize("way", ["broadcast", "chunked", "auto"])
def test_nothing_to_order(way) -> None:
    """One class, or a teacher that ties all (with `normalize`): loss and gradient 0; without it the loss is 1."""
    for count, tau in ((1, Tau()), (4, Tau(normalize=True)), (4, Tau("hard_teacher", normalize=True))):
        s = logits(3, count).requires_grad_()
        loss = tau_loss(s, torch.ones(3, count, dtype=torch.float64), tau, implementation=way)
        assert loss.tolist() == [0, 0, 0] and not slope(loss, s).any()
    assert tau_loss(logits(2, 4), torch.zeros(2, 4), Tau(), implementation=way).tolist() == [1, 1]


@pytest.mark.parametrize("tau", EVERY, ids=str)
def test_identical_students_and_large_logits_stay_finite(tau: Tau) -> None:
    """Constant logits, and +-1e4 in fp16: no nan, no inf, and a sound loss."""
    t = 1e4 * logits(3, 20, seed=1).sign().half()
    for s in (torch.zeros(3, 20, dtype=torch.float16), t.clone(), -t):
        s.requires_grad_()
        loss = tau_loss(s, t, tau)
        assert loss.dtype == torch.float32
        assert loss.isfinite().all() and (loss >= -1e-6).all() and (loss <= 2 + 1e-6).all()
        gradient = slope(loss, s)
        assert gradient.dtype == torch.float16 and gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_and_autocast_are_computed_in_fp32(dtype: torch.dtype) -> None:
    s, t = logits(2, 3, 300).to(dtype), logits(2, 3, 300, seed=1).to(dtype)
    for way in ("chunked", "sorted"):
        tau = Tau("hard_teacher", "tanh", 1.0)
        wanted = tau_loss(s.float(), t.float(), tau, implementation=way)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = tau_loss(s, t, tau, implementation=way)
        assert found.dtype == torch.float32 and torch.equal(found, wanted)
    assert found.shape == (2, 3)


def test_division_is_as_exact_as_tanh_in_fp32() -> None:
    """Against fp64: 1e-6 of the loss, of the gradient 1e-6 of its bound 2 k / C, near the largest reach too."""
    for scale in (0.01, 1.0, 5.0):
        s, t = logits(2, 500, scale=scale).float(), logits(2, 500, seed=1).float()
        for form in FORMS:
            tau = Tau(form, "tanh", 1.0)
            assert scale == 5.0 or float(s.amax() - s.amin()) < 40
            (loss, gradient), (exact, wanted) = both(s, t, tau)[1], both(s.double(), t.double(), tau)[0]
            assert float((loss - exact).abs().max()) < 2e-6
            assert float((gradient - wanted).abs().max()) < 2e-6 * 2 / 500 * (10 if form == "joint" else 1)


def test_gradients_flow_once_and_to_the_student_alone() -> None:
    s, t = logits(2, 5).requires_grad_(), logits(2, 5, seed=1).requires_grad_()
    (first,) = torch.autograd.grad(tau_loss(s, t, Tau(), implementation="chunked").sum(), s, create_graph=True)
    with pytest.raises(SpoliaError, match="broadcast"):
        first.sum().backward()
    (first,) = torch.autograd.grad(tau_loss(s, t, Tau(), implementation="broadcast").sum(), s, create_graph=True)
    first.square().sum().backward()
    assert s.grad is not None and s.grad.abs().max() > 0 and t.grad is None


def test_losses_of_samples_are_their_own() -> None:
    """Any leading shape; the gradient of a weighted sum is the weighted gradients."""
    s, t = logits(2, 3, 7).requires_grad_(), logits(2, 3, 7, seed=1)
    loss = tau_loss(s, t, Tau())
    assert loss.shape == (2, 3)
    single = tau_loss(s[1, 2], t[1, 2], Tau())
    assert single.shape == () and abs(single.item() - loss[1, 2].item()) < 1e-14
    upstream = logits(2, 3, seed=2)
    (gradient,) = torch.autograd.grad(loss, s, upstream)
    torch.testing.assert_close(gradient[1, 2], upstream[1, 2] * slope(single, s)[1, 2])
    assert tau_loss(torch.zeros(0, 7), torch.zeros(0, 7), Tau()).shape == (0,)
    with pytest.raises(SpoliaError, match="2, 3"):
        tau_loss(s, t[0], Tau())


def test_top_pairs_are_the_pairs_of_the_teachers_first_classes() -> None:
    s, t = logits(3, 12), logits(3, 12, seed=1)
    a, b, index = top_pairs(s, t, 4)
    first = t.argsort(dim=1, descending=True)[:, :4]
    assert torch.equal(index, first)
    wanted = tau_loss(s.gather(1, first), t.gather(1, first), Tau())
    torch.testing.assert_close(tau_loss(a, b, Tau()), wanted)
    assert top_pairs(s, t, 99)[0].shape == (3, 12)


@pytest.mark.parametrize("form", FORMS)
def test_sampled_pairs_are_unbiased(form: Form) -> None:
    """Over all 24 orders of four classes the mean loss and gradient are those of all pairs."""

    class Listed:
        def __init__(self) -> None:
            self.orders = iter(itertools.permutations(range(4)))

        def permutation(self, count: int) -> np.ndarray:
            assert count == 4
            return np.array(next(self.orders))

    s, t = logits(2, 4).requires_grad_(), logits(2, 4, seed=1)
    tau = Tau(form, "tanh", 0.7)
    loss = sampled_tau_loss(s, t, tau, 24, Listed())
    exact = tau_loss(s, t, tau, implementation="broadcast")
    torch.testing.assert_close(loss, exact, rtol=0, atol=1e-14)
    torch.testing.assert_close(slope(loss, s), slope(exact, s), rtol=0, atol=1e-14)


def test_sampling_is_repeated_by_its_seed() -> None:
    s, t = logits(2, 40), logits(2, 40, seed=1)
    one, two, other = (sampled_tau_loss(s, t, Tau(), 2, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert torch.equal(one, two) and not torch.equal(one, other)


def test_auto_says_why() -> None:
    assert "10000 pairs" in choose(logits(1, 100), logits(1, 100), Tau()).why
    s, t = logits(32, 100).float(), logits(32, 100, seed=1).float()
    for form, wanted in (("joint", "does not separate"), ("product", "100 classes")):
        choice = choose(s, t, Tau(form))
        assert choice.implementation == "chunked" and wanted in choice.why
    assert "tolerance 0" in choose(s, t, Tau(), tolerance=0).why
    wide = logits(1, 20_000).float()
    assert choose(wide, wide, Tau("hard_teacher")).implementation == "sorted"
    assert choose(wide, wide, Tau("product")).implementation == "expansion"
    assert "no series" in choose(1e4 * wide, wide, Tau("product")).why
    for way, form in (("sorted", "product"), ("expansion", "joint")):
        with pytest.raises(SpoliaError, match="computes the form"):
            tau_loss(s, t, Tau(form), implementation=way)
    with pytest.raises(SpoliaError, match="no series"):
        tau_loss(1e4 * s, t, Tau(), implementation="expansion")
