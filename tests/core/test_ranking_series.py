"""Series of sines keep within the error they state, and so do the losses and gradients made of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core import ranking_series
from spolia.core.ranking import tau_loss
from spolia.core.ranking_series import Series, fit, fitted, separated, series_for, sorted_sums
from spolia.core.ranking_terms import Tau, hyperbolic, phi_of

pytestmark = pytest.mark.sampled(3)  # of many cases alike

WAYS = [("hard_teacher", "sorted"), ("product", "expansion")]


def found(s: torch.Tensor, t: torch.Tensor, tau: Tau, way: str, weights=None, tolerance: float = 1e-4):
    x = s.clone().requires_grad_()
    loss = tau_loss(x, t, tau, weights, way, tolerance)
    return loss.detach(), torch.autograd.grad(loss.sum(), x)[0]


@pytest.mark.parametrize("phi", ["tanh", "arctan", "erf", "softsign"])
@pytest.mark.parametrize("reach", [1.0, 8.0, 30.0])
def test_a_fit_keeps_its_bound(phi, reach: float) -> None:
    """At random places, not those it was fitted on: both phi and its derivative."""
    series = fit(phi, reach, 40)
    y = torch.from_numpy(np.random.default_rng(0).uniform(-reach, reach, 20_000)).requires_grad_()
    exact = phi_of(y, phi)
    (slope,) = torch.autograd.grad(exact.sum(), y)
    w, b = (torch.tensor(part, dtype=torch.float64) for part in (series.frequencies, series.factors))
    angles = y.detach().unsqueeze(1) * w
    assert float((angles.sin() @ b - exact.detach()).abs().max()) <= series.error
    assert float((angles.cos() @ (b * w) - slope).abs().max()) <= series.error


def test_more_terms_are_closer_and_the_fewest_are_taken() -> None:
    errors = [fit("tanh", 10.0, terms).error for terms in (8, 16, 32)]
    assert errors == sorted(errors, reverse=True)
    loose, tight = fitted("tanh", 10.0, 1e-2), fitted("tanh", 10.0, 1e-4)
    assert loose is not None and tight is not None
    assert len(loose.frequencies) < len(tight.frequencies) < 40
    assert loose.error <= 1e-2 and tight.error <= 1e-4


def test_out_of_reach_is_said() -> None:
    assert series_for("tanh", 1e5, 1e-4) is None and series_for("tanh", float("inf"), 1e-4) is None
    short = fit("tanh", 2.0, 16)
    s = 4 * torch.randn(2, 30, generator=torch.Generator().manual_seed(0))
    with pytest.raises(AssertionError, match="reach"):
        sorted_sums(s, s, Tau("hard_teacher"), None, True, short)
    with pytest.raises(AssertionError, match="reach"):
        separated(s, s, Tau(), None, True, (short, short))


@st.composite
def sides(draw: st.DrawFn) -> tuple[torch.Tensor, torch.Tensor]:
    """Random, tied, clustered and far-off logits of two samples."""
    count = draw(st.integers(2, 30))
    value = st.one_of(
        st.floats(-6, 6, width=32), st.integers(-3, 3).map(float), st.sampled_from([-6.0, 6.0, 1e-7, -1e-7, 0.0])
    )
    sides = [
        torch.tensor([draw(st.lists(value, min_size=count, max_size=count)) for _ in range(2)], dtype=torch.float64)
        for _ in range(2)
    ]
    return sides[0], sides[1]


@settings(max_examples=40, deadline=None)
@given(
    sides(),
    st.sampled_from(WAYS),
    st.sampled_from(["tanh", "sigmoid", "arctan", "erf"]),
    st.sampled_from([1e-2, 1e-3]),
    st.booleans(),
)
def test_losses_and_gradients_keep_the_stated_bound(drawn, form_way, phi, tolerance: float, weighted: bool) -> None:
    """hard_teacher: tolerance; product: 2 tolerance + tolerance^2; of a gradient as much times 2 k / C.

    erf is steeper than 1 at 0, by 1.13. Weights move the bound of class i from 2 / C to sum_j w_ij / sum w. The arithmetic
    is fp64: rounding is 1e-10.
    """
    (s, t), (form, way), count = drawn, form_way, drawn[0].shape[1]
    tau = Tau(form, phi, 1.0)
    weights = hyperbolic(t) if weighted else None
    loss, gradient = found(s, t, tau, way, weights, tolerance)
    exact, wanted = found(s, t, tau, "broadcast", weights)
    bound = tolerance if form == "hard_teacher" else 2 * tolerance + tolerance**2
    own = torch.full_like(t, 0.5) if weights is None else weights
    share = (own * (count - 2) + own.sum(1, keepdim=True)) / ((count - 1) * own.sum(1, keepdim=True))
    steepest = tau.plain[1] * (1.13 if phi == "erf" else 1.0)
    assert ((loss - exact).abs() <= bound + 1e-10).all()
    assert ((gradient - wanted).abs() <= bound * share * steepest + 1e-10).all()
    assert (gradient.sum(1).abs() < 1e-10).all()


@pytest.mark.parametrize(("form", "way"), WAYS)
@pytest.mark.parametrize("normalize", [False, True])
def test_half_a_thousand_classes_in_fp32(form, way, normalize: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in chunks of a few classes, samples and frequencies; bf16 teachers tie hundreds of pairs."""
    draws = torch.Generator().manual_seed(0)
    s, t = torch.randn(5, 600, generator=draws), torch.randn(5, 600, generator=draws).bfloat16().float()
    tau = Tau(form, "tanh", 2.0, normalize)
    exact, wanted = found(s.double(), t.double(), tau, "broadcast")
    for elements in (ranking_series._ELEMENTS, 5000):
        monkeypatch.setattr(ranking_series, "_ELEMENTS", elements)
        loss, gradient = found(s, t, tau, way)
        share = 1.0 if not normalize or form == "hard_teacher" else 2.0  # of all pairs in what is divided by
        assert float((loss - exact).abs().max()) < share * 4e-4
        assert float((gradient - wanted).abs().max()) < share * 4e-4 * 2 * 2 / 600


def test_a_series_is_a_value() -> None:
    """Fits are shared between batches of like range."""
    one, two = series_for("tanh", 9.1, 1e-4), series_for("tanh", 9.2, 1e-4)
    assert isinstance(one, Series) and one is two and one.reach >= 9.2


@pytest.mark.slow
def test_vocabulary_of_a_language_model() -> None:
    """32,000 classes: both ways against the exact blocks of one sample."""
    draws = torch.Generator().manual_seed(0)
    s, t = torch.randn(1, 32_000, generator=draws), torch.randn(1, 32_000, generator=draws)
    for form, way in WAYS:
        tau = Tau(form, "tanh", 2.0)
        loss, gradient = found(s, t, tau, way)
        exact, wanted = found(s, t, tau, "chunked")
        assert float((loss - exact).abs().max()) < 3e-4
        assert float((gradient - wanted).abs().max()) < 3e-4 * 2 * 2 / 32_000
