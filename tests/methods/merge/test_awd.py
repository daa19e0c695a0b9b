"""AWD: the solver against geometry and against plain autograd, the merge against the explicit shared vector, the limits."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.bench.multitask import evaluate, mean_percent
from spolia.core.checkpoint import read_tensors
from spolia.methods.merge.awd import Awd, disentangle
from spolia.runs.digits_pool import DigitExperts

pytestmark = pytest.mark.sampled(3)  # of many cases alike

State = dict[str, torch.Tensor]


def gram_of(cosine: float, norms: tuple[float, ...]) -> torch.Tensor:
    """Vectors of these norms with one cosine between all of them [1, K, K]."""
    lengths = torch.tensor(norms, dtype=torch.float64)
    alike = torch.full((len(norms), len(norms)), cosine, dtype=torch.float64).fill_diagonal_(1)
    return (alike * lengths * lengths[:, None]).unsqueeze(0)


def length(gram: torch.Tensor, a: torch.Tensor) -> float:
    return float((a @ gram[0] @ a.t()).sqrt())


@pytest.mark.parametrize(("norms", "cosine"), [((1.0, 1.0), 0.3), ((1.0, 1.5), 0.3), ((1.0, 1.0), 0.6)])
def test_two_vectors_end_on_the_sphere_of_thales(norms: tuple[float, float], cosine: float) -> None:
    """The remainders are orthogonal on the sphere over tau_1 tau_2; its point nearest to 0 is |c| - r away."""
    gram = gram_of(cosine, norms)
    a, seen = disentangle(gram, Awd())
    centre = math.sqrt(norms[0] ** 2 + norms[1] ** 2 + 2 * cosine * norms[0] * norms[1]) / 2
    radius = math.sqrt(norms[0] ** 2 + norms[1] ** 2 - 2 * cosine * norms[0] * norms[1]) / 2
    assert length(gram, a) == pytest.approx(centre - radius, rel=5e-3)  # the last steps are finite
    assert float(seen[0, 1]) < 1e-3 and float(seen[0, 0]) == pytest.approx(cosine)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("count", [4, 8])
@pytest.mark.parametrize("cosine", [0.1, 0.15, 0.3, 0.5])
def test_equal_norms_and_cosines_have_a_closed_form(count: int, cosine: float) -> None:
    """delta = s mean(tau), s = 1 - sqrt((1 - rho) / (1 + (K - 1) rho)); every a_k = s / K."""
    a, _ = disentangle(gram_of(cosine, (1.0,) * count), Awd())
    s = 1 - math.sqrt((1 - cosine) / (1 + (count - 1) * cosine))
    torch.testing.assert_close(a, torch.full_like(a, s / count), rtol=5e-3, atol=0)  # as above


@pytest.mark.parametrize("alpha", [0.0, 0.001, 0.1, 0.5])
def test_the_answer_does_not_depend_on_alpha_below_its_threshold(alpha: float) -> None:
    gram = gram_of(0.15, (1.0,) * 8)
    a, _ = disentangle(gram, Awd(alpha=alpha))
    assert length(gram, a) == pytest.approx(0.1803, rel=5e-3)


def test_a_large_alpha_shares_nothing() -> None:
    a, _ = disentangle(gram_of(0.15, (1.0,) * 8), Awd(alpha=2.0))
    assert not a.any()


@given(alpha=st.floats(0, 1), norms=st.lists(st.floats(0.01, 100), min_size=2, max_size=6))
@settings(max_examples=20, deadline=None)
def test_orthogonal_vectors_stay(alpha: float, norms: list[float]) -> None:
    a, _ = disentangle(gram_of(0.0, tuple(norms)), Awd(alpha=alpha, steps=50))
    assert not a.any()


def explicit(taus: torch.Tensor, choice: Awd, steps: int, size: float) -> torch.Tensor:
    """delta by autograd on the vectors themselves, with the paper's fixed steps. taus [K, n] -> [n]"""
    delta = torch.zeros(taus.shape[1], dtype=torch.float64, requires_grad=True)
    push = torch.zeros_like(delta)
    for _ in range(steps):
        rest = taus - delta
        unit = rest / rest.norm(dim=1, keepdim=True)
        alike = (unit @ unit.t()).abs()
        count = len(taus)
        loss = (alike.sum() - alike.diagonal().sum()) / (count * (count - 1))
        loss = loss + (choice.alpha * delta.norm() if delta.detach().any() else 0)
        (slope,) = torch.autograd.grad(loss, delta)
        push = choice.momentum * push + slope
        delta = (delta - size * push).detach().requires_grad_()
    return delta.detach()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("count", [2, 3, 5])
def test_the_gram_steps_are_the_steps_on_the_vectors(count: int, momentum: float) -> None:
    noise = torch.Generator().manual_seed(count)
    taus = torch.randn(count, 40, generator=noise, dtype=torch.float64) + 0.7
    choice = Awd(solver="paper", momentum=momentum, steps=100, step_size=0.003)
    a, _ = disentangle((taus @ taus.t()).unsqueeze(0), choice)
    expected = explicit(taus, choice, 100, 0.003)
    torch.testing.assert_close(a[0] @ taus, expected, rtol=1e-9, atol=1e-10)  # fp64, 100 steps


def test_groups_side_by_side_are_solved_as_if_alone() -> None:
    noise = torch.Generator().manual_seed(0)
    taus = torch.randn(2500, 3, 6, generator=noise, dtype=torch.float64) + 0.5  # more than are solved together
    grams = taus @ taus.mT
    a, _ = disentangle(grams, Awd(steps=40))
    for group in (0, 1023, 1024, 2499):
        alone, _ = disentangle(grams[group : group + 1], Awd(steps=40))
        torch.testing.assert_close(a[group], alone[0], rtol=1e-9, atol=1e-12)  # sums in another order


@pytest.mark.slow
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 99), factor=st.sampled_from([1e-3, 7.0, 1e4]), count=st.integers(2, 6))
def test_scale_and_order_of_the_task_vectors(seed: int, factor: float, count: int) -> None:
    noise = torch.Generator().manual_seed(seed)
    taus = torch.randn(count, 30, generator=noise, dtype=torch.float64) + 0.5
    gram = (taus @ taus.t()).unsqueeze(0)
    a, _ = disentangle(gram, Awd(steps=100))
    scaled, _ = disentangle(gram * factor**2, Awd(steps=100))
    torch.testing.assert_close(scaled, a, rtol=1e-6, atol=1e-9)  # kinks amplify a rounding; few steps
    order = torch.randperm(count, generator=noise)
    turned, _ = disentangle(gram[:, order][:, :, order], Awd(steps=100))
    torch.testing.assert_close(turned, a[:, order], rtol=1e-6, atol=1e-9)


def test_twins_zero_vectors_and_single_experts_are_finite() -> None:
    twin = torch.ones(1, 3, 3, dtype=torch.float64)
    silent = gram_of(0.3, (1.0, 1.0, 0.0))
    for gram in (twin, silent, torch.zeros(1, 3, 3), torch.ones(1, 1, 1), torch.zeros(0, 2, 2)):
        a, seen = disentangle(gram, Awd(steps=100))
        assert a.isfinite().all() and seen.isfinite().all()
    a, _ = disentangle(silent, Awd())
    assert float(a[0, 2]) == pytest.approx(0, abs=1e-9) and length(silent, a) == pytest.approx(0.2146, rel=5e-3)
    assert not disentangle(torch.ones(1, 1, 1), Awd())[0].any()


# --- the merge -------------------------------------------------------------------------------------------------------


def cost(taus: torch.Tensor, a: torch.Tensor, alpha: float) -> float:
    """The objective at delta = sum a_k tau_k, in units of the rms norm, over experts that moved."""
    taus = taus / taus.square().sum(1).mean().sqrt()
    delta = a @ taus
    left = torch.nn.functional.normalize((taus - delta)[taus.norm(dim=1) > 1e-3], dim=1)
    pairs, count = (left @ left.T).triu(1).abs(), len(taus)
    return float(pairs.sum() / (count * (count - 1) / 2) + alpha * delta.norm())


@given(st.integers(0, 2**16), st.lists(st.floats(-14, 0), min_size=2, max_size=6), st.sampled_from(["prox", "paper"]))
@settings(deadline=None, max_examples=60)
def test_no_group_ends_above_its_start_however_unlike_the_norms_are(
    seed: int, powers: list[float], solver: Any
) -> None:
    """Dead channels move by weight decay alone, by a billionth of what others move."""
    draws = torch.Generator().manual_seed(seed)
    taus = torch.randn(len(powers), 12, generator=draws, dtype=torch.float64) + 1.0
    taus *= 10.0 ** torch.tensor(powers, dtype=torch.float64)[:, None]
    taus /= taus.square().sum(1).mean().sqrt()  # in which the two solvers have one objective
    a, _ = disentangle((taus @ taus.T)[None], Awd(solver=solver, steps=60))
    zero = torch.zeros_like(a[0])
    assert cost(taus, a[0], 0.1) <= cost(taus, zero, 0.1) + 1e-9  # fp64


@pytest.mark.slow
def test_experts_that_hardly_moved_change_nothing_for_the_others() -> None:
    draws = torch.Generator().manual_seed(0)
    taus = torch.randn(3, 20, generator=draws, dtype=torch.float64) + 1.0
    still = 1e-7 * torch.randn(2, 20, generator=draws, dtype=torch.float64)
    both = torch.cat([taus, still])
    alpha = 0.1 * 3 / 10 / (5 / 3) ** 0.5  # of ten pairs three count, and the rms norm is smaller
    alone, _ = disentangle((taus @ taus.T)[None], Awd(steps=4000))
    beside, _ = disentangle((both @ both.T)[None], Awd(steps=4000, alpha=alpha))
    torch.testing.assert_close(beside[0, :3], alone[0], rtol=0, atol=2e-3)  # where the last steps end
    assert float(beside[0, 3:].abs().max()) == 0.0


def models(count: int, seed: int = 0) -> tuple[State, list[State]]:
    noise = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (9, 7), "k.weight": (4, 3, 2, 2), "b": (5,), "embed_tokens.weight": (6, 3)}
    base = {n: torch.randn(s, generator=noise) for n, s in shapes.items()}
    return base, [{n: t + torch.randn(t.shape, generator=noise) + 0.6 for n, t in base.items()} for _ in range(count)]


def remainders(base: State, experts: list[State], choice: Awd) -> State:
    """tau_k - delta of every tensor [K, *shape], each group by itself."""
    taus = {n: torch.stack([e[n].double() - t.double() for e in experts]) for n, t in base.items()}
    if choice.granularity == "global":
        flat = torch.cat([t.flatten(1) for t in taus.values()], 1)
        a = disentangle((flat @ flat.t()).unsqueeze(0), choice)[0][0]
        return {n: t - torch.tensordot(a, t, 1) for n, t in taus.items()}
    out = {}
    for n, tau in taus.items():
        if tau.dim() < 3 or "embed" in n:
            out[n] = tau
            continue
        rows = tau.flatten(1).unsqueeze(1) if choice.granularity == "tensor" else tau.flatten(2)  # [K, groups, n]
        grams = torch.einsum("irn,jrn->rij", rows, rows)
        a = disentangle(grams, choice)[0]  # [groups, K]
        out[n] = (rows - torch.einsum("rk,krn->rn", a, rows)).view_as(tau)
    return out


@pytest.mark.parametrize("granularity", ["global", "tensor", "row"])
@pytest.mark.parametrize("count", [1, 3])
def test_the_merge_is_the_sum_of_the_remainders(granularity: Any, count: int) -> None:
    base, experts = models(count)
    weight = (1.0, -0.5, 2.0)[:count]
    choice = Awd(granularity=granularity, weight=weight, scale=0.7, steps=200)
    got = spolia.merge(experts, base=base, method="awd", settings=choice)
    for n, rest in remainders(base, experts, choice).items():
        expected = base[n].double() + 0.7 * torch.tensordot(torch.tensor(weight, dtype=torch.float64), rest, 1)
        torch.testing.assert_close(got[n].double(), expected, rtol=0, atol=2e-5)  # fp32 task vectors in the Gram


def test_tensors_of_few_and_of_many_rows_are_solved_alike() -> None:
    """Few rows are solved with those of other tensors, as many as 256 by themselves."""
    noise = torch.Generator().manual_seed(0)
    base = {f"{rows}.weight": torch.randn(rows, 5, generator=noise) for rows in (1, 255, 256, 300, 40)}
    experts = [{n: t + torch.randn(t.shape, generator=noise) + 0.4 for n, t in base.items()} for _ in range(3)]
    choice = Awd(steps=60)
    got = spolia.merge(experts, base=base, method="awd", settings=choice)
    for n, rest in remainders(base, experts, choice).items():
        # fp32 task vectors in the Gram, as above
        torch.testing.assert_close(got[n].double(), base[n].double() + 0.3 * rest.sum(0), rtol=0, atol=2e-5)


@pytest.mark.parametrize("granularity", ["global", "tensor", "row"])
def test_without_steps_it_is_task_arithmetic(granularity: str) -> None:
    base, experts = models(3)
    got = spolia.merge(experts, base=base, method="awd", settings={"granularity": granularity, "steps": 0})
    plain = spolia.merge(experts, base=base, method="task_arithmetic")
    for n in base:
        torch.testing.assert_close(got[n], plain[n], rtol=0, atol=1e-6)  # fp32 sums in another order


def test_what_is_no_matrix_is_summed() -> None:
    base, experts = models(3)
    plain = spolia.merge(experts, base=base, method="task_arithmetic")
    got = spolia.merge(experts, base=base, method="awd", settings={"steps": 50})
    for n in ("b", "embed_tokens.weight"):
        torch.testing.assert_close(got[n], plain[n], rtol=0, atol=1e-6)
    assert not torch.allclose(got["a.weight"], plain["a.weight"], atol=1e-3)


def test_a_bad_pattern_is_refused() -> None:
    with pytest.raises(spolia.SpoliaError, match="no regular expression"):
        spolia.merge([{}], base={}, method="awd", settings={"exclude": "("})


@pytest.mark.slow
def test_on_digits_a_scale_that_is_too_large_hurts_less(digit_pool: Callable[..., Any]) -> None:
    """Four experts, three seeds: the changes become orthogonal, the experts stay, and at lambda = 0.8 the merge gains.

    At a well-chosen lambda nothing is claimed: there all granularities and task arithmetic are alike.
    """
    domains = ("upright", "turned", "inverted", "permuted")
    gains: dict[str, list[float]] = {"global": [], "tensor": [], "row": []}
    for seed in range(3):
        pool = digit_pool(domains, seed)
        base, experts = read_tensors(pool.base), [read_tensors(pool.expert(d)) for d in domains]

        def percent(state: State, pool: DigitExperts = pool) -> float:
            return mean_percent(evaluate(pool.outputs(state), pool.tasks("test")))

        plain = percent(spolia.merge(experts, base=base, method="task_arithmetic", settings={"scale": 0.8}))
        for granularity, gained in gains.items():
            chosen = {"granularity": granularity, "scale": 0.8}
            gained.append(percent(spolia.merge(experts, base=base, method="awd", settings=chosen)) - plain)
        rest = remainders(base, experts, Awd(granularity="global"))
        flat = torch.stack([torch.cat([(e[n] - base[n]).flatten() for n in base]) for e in experts]).double()
        before, after = disentangle((flat @ flat.t()).unsqueeze(0), Awd())[1][0, :2].tolist()
        assert after < before / 5
        for k, task in enumerate(pool.tasks("test")):
            own = {n: (t.double() + rest[n][k]).float() for n, t in base.items()}
            alone, disentangled = (
                evaluate(pool.outputs(state), [task])[task.name].percent for state in (experts[k], own)
            )
            assert disentangled > alone - 1.5  # 600 images: a point is one standard error of a difference
    assert min(gains["global"]) > 0 and sum(gains["global"]) / 3 > 2  # 3 to 4.5 points were seen
    assert all(sum(gained) / 3 > -0.5 for gained in gains.values())
