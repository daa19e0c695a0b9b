"""Isotropic merging: its closed forms, and the published procedure in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError
from spolia.methods.merge.iso import flattened, shares


def change(method: str, base: torch.Tensor, changes: list[torch.Tensor], **given: Any) -> torch.Tensor:
    experts = [{"w": base + tau} for tau in changes]
    return spolia.merge(experts, base={"w": base}, method=method, settings=given)["w"].double() - base.double()


def tasks(shape: tuple[int, int], count: int, seed: int = 0) -> list[torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=noise) for _ in range(count)]


def published_cts(changes: list[torch.Tensor], fraction: float) -> torch.Tensor:
    """The authors' procedure with SVDs throughout, in fp64."""
    changes = [tau.double() for tau in changes]
    d, count = min(changes[0].shape), len(changes)
    common = int(d * fraction)
    common = d - min(round((d - common) / count), d // count) * count  # rounding up may ask for more than there are
    own = (d - common) // count
    u, s, v = torch.linalg.svd(sum(changes, torch.zeros_like(changes[0])), full_matrices=False)
    u, s, v = u[:, :common], s[:common], v[:common]
    us, ss, vs = [], [], []
    for tau in changes:
        a, b, c = torch.linalg.svd(tau - u @ u.t() @ tau, full_matrices=False)
        us, ss, vs = [*us, a[:, :own]], [*ss, b[:own]], [*vs, c[:own]]
    wide, tall = torch.cat([*us, u], 1), torch.cat([*vs, v])
    a, _, b = torch.linalg.svd(wide, full_matrices=False)
    c, _, e = torch.linalg.svd(tall, full_matrices=False)
    return torch.cat([*ss, s]).mean() * (a @ b @ c @ e)


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from([(9, 9), (17, 6), (5, 21)]), count=st.integers(1, 4), seed=st.integers(0, 99))
def test_iso_c_makes_all_singular_values_their_mean(shape: tuple[int, int], count: int, seed: int):
    changes = tasks(shape, count, seed)
    got = change("iso_c", torch.zeros(shape), changes)
    u, s, v = torch.linalg.svd(torch.stack(changes).double().sum(0), full_matrices=False)
    # fp32 sums of changes; the polar factor magnifies their rounding by largest over smallest singular value
    torch.testing.assert_close(got, s.mean() * u @ v, rtol=0, atol=1e-6 * float(s[0] / s[-1]) * float(s[0]))
    kept = torch.linalg.svdvals(got)
    torch.testing.assert_close(kept, s.mean().expand_as(kept), rtol=1e-6 * max(10.0, float(s[0] / s[-1])), atol=0)
    assert float(kept.sum()) == pytest.approx(float(s.sum()), rel=1e-5)  # the nuclear norm stays


def test_an_isotropic_change_stays():
    q, _ = torch.linalg.qr(tasks((12, 8), 1)[0])
    torch.testing.assert_close(change("iso_c", torch.zeros(12, 8), [3 * q]), 3 * q.double(), rtol=0, atol=5e-6)  # fp32


def test_directions_without_change_get_none():
    """Rank 2 of 5: the two directions get the mean over five, the others stay."""
    left, _ = torch.linalg.qr(tasks((7, 2), 1)[0].double())
    right, _ = torch.linalg.qr(tasks((5, 2), 1, 1)[0].double())
    s = torch.tensor([4.0, 1.0], dtype=torch.float64)
    got = change("iso_c", torch.zeros(7, 5), [((left * s) @ right.t()).float()], precision="float64")
    # rounding to fp32 fills the other directions at 1e-7 of the largest, below the floor
    torch.testing.assert_close(got, left @ right.t(), rtol=0, atol=1e-5)
    assert torch.equal(change("iso_c", torch.ones(4, 3), [torch.zeros(4, 3)]), torch.zeros(4, 3).double())
    assert torch.equal(change("iso_cts", torch.ones(4, 3), [torch.zeros(4, 3)] * 2), torch.zeros(4, 3).double())


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(20, 20), (30, 16), (11, 25)]),
    count=st.integers(1, 3),
    fraction=st.sampled_from([0.0, 0.4, 0.8, 1.0]),
    seed=st.integers(0, 99),
)
def test_iso_cts_is_the_published_procedure(shape: tuple[int, int], count: int, fraction: float, seed: int):
    changes = tasks(shape, count, seed)
    got = change("iso_cts", torch.zeros(shape), changes, common=fraction, precision="float64")
    # fp64 inside, changes and result in fp32; the nearest orthonormal matrix magnifies roundings where directions meet
    torch.testing.assert_close(got, published_cts(changes, fraction), rtol=0, atol=1e-4)


@pytest.mark.parametrize("shape", [(10, 10), (16, 6)])
def test_limits_of_iso_cts(shape: tuple[int, int]):
    changes = tasks(shape, 3)
    base = torch.zeros(shape)
    close = {"rtol": 0, "atol": 2e-4}  # fp32 SVDs with the smallest singular values at some hundredths of the largest
    torch.testing.assert_close(change("iso_cts", base, changes, common=1.0), change("iso_c", base, changes), **close)
    one = changes[:1]  # what one task has beyond the common part is the rest of its own SVD
    torch.testing.assert_close(change("iso_cts", base, one), change("iso_c", base, one), **close)


def test_shares():
    for d in range(1, 60):
        for k in range(1, 12):
            for fraction in (0.0, 0.1, 0.8, 1.0):
                common, own = shares(d, k, fraction)
                assert common + k * own == d and common >= 0 and own >= 0
            assert shares(d, k, 0.8)[1] == round((d - int(0.8 * d)) / k)  # the published count fits at the default
    assert shares(768, 8, 0.8) == (768 - 152, 19)  # 154 left over, 19.25 each


def test_order_and_precision():
    changes, base = tasks((14, 10), 3), tasks((14, 10), 1, 9)[0]
    for method in ("iso_c", "iso_cts"):
        straight = change(method, base, changes)
        # fp32 decompositions of well-conditioned random matrices
        torch.testing.assert_close(straight, change(method, base, changes[::-1]), rtol=0, atol=1e-4)
        torch.testing.assert_close(straight, change(method, base, changes, precision="float64"), rtol=0, atol=1e-4)
        assert torch.allclose(change(method, base, changes, scale=2.0), 2 * straight, atol=1e-5)


def test_flattened_of_a_wide_matrix_is_that_of_its_transpose():
    x = tasks((4, 9), 1)[0].double()
    torch.testing.assert_close(flattened(x), flattened(x.t()).t(), rtol=0, atol=1e-12)  # fp64


@pytest.mark.parametrize("method", ["iso_c", "iso_cts"])
def test_bf16_and_vectors(method: str):
    noise = torch.Generator().manual_seed(5)
    base = {n: torch.randn(s, generator=noise).bfloat16() for n, s in {"w": (12, 8), "b": (6,)}.items()}
    experts = [
        {n: (t.float() + torch.randn(t.shape, generator=noise)).bfloat16() for n, t in base.items()} for _ in "ab"
    ]
    low = spolia.merge(experts, base=base, method=method)
    high = spolia.merge([{n: t.float() for n, t in e.items()} for e in experts],
                        base={n: t.float() for n, t in base.items()}, method=method)  # fmt: skip
    assert all(torch.equal(low[n], high[n].bfloat16()) for n in base)
    mean = torch.stack([e["b"].float() for e in experts]).mean(0)
    torch.testing.assert_close(high["b"], mean, rtol=1e-5, atol=1e-6)  # fp32 sums


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_expert_is_named(bad: float):
    first, second = torch.ones(2, 4, 4)
    second[0, 3] = bad
    with pytest.raises(SpoliaError, match=r"second.*`w` holds NaN or Inf, first at element 3"):
        spolia.merge({"first": {"w": first}, "second": {"w": second}}, base={"w": torch.zeros(4, 4)}, method="iso_c")
