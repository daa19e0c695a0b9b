"""TSV-Merge against the published procedure in fp64, and the cases in which it must lose nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import spolia
from spolia.errors import SpoliaError
from spolia.methods.merge.matrices import gram, inverse_root, thin_svd
from spolia.methods.merge.tsv import Tsv, tsv
from spolia.parts.align import align
from spolia.parts.expert import ExpertPool
from spolia.parts.merging import Merge

State = dict[str, torch.Tensor]


def draws(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def change(base: torch.Tensor, changes: list[torch.Tensor], **given: Any) -> torch.Tensor:
    """What the merge adds to the base, for matrices `w`, in fp64."""
    experts = [{"w": base + tau} for tau in changes]
    return spolia.merge(experts, base={"w": base}, method="tsv", settings=given)["w"].double() - base.double()


def published(changes: list[torch.Tensor]) -> torch.Tensor:
    """The authors' procedure: zero-padded factors, an SVD of each of the two concatenations."""
    rank = min(changes[0].shape) // len(changes)
    parts = [torch.linalg.svd(tau.double(), full_matrices=False) for tau in changes]
    u = torch.cat([u[:, :rank] for u, _, _ in parts], 1)
    s = torch.cat([s[:rank] for _, s, _ in parts])
    v = torch.cat([v[:rank] for _, _, v in parts])
    pu, _, ru = torch.linalg.svd(u, full_matrices=False)
    pv, _, rv = torch.linalg.svd(v, full_matrices=False)
    return pu @ ru @ torch.diag(s) @ pv @ rv


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from([(12, 12), (20, 9), (7, 30)]),
    experts=st.integers(1, 5),
    precision=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 99),
)
def test_the_published_procedure(shape: tuple[int, int], experts: int, precision: str, seed: int):
    noise = draws(seed)
    base = torch.randn(shape, generator=noise)
    # the task vectors that the merge sees: differences of fp32 numbers
    changes = [(base + 0.1 * torch.randn(shape, generator=noise)) - base for _ in range(experts)]
    got = change(base, changes, precision=precision)
    # fp32 roundings of the base (about 3) and of an SVD, whose vectors turn by roundings over gaps of singular values
    torch.testing.assert_close(got, published(changes), rtol=0, atol=2e-4 if precision == "float32" else 1e-6)


def test_one_expert_is_itself():
    noise = draws()
    base, tau = torch.randn(2, 9, 6, generator=noise)
    torch.testing.assert_close(change(base, [tau]), tau.double(), rtol=0, atol=5e-6)  # an fp32 SVD


def test_orthogonal_tasks_of_low_rank_are_added_without_loss():
    noise = draws(1)
    u, _ = torch.linalg.qr(torch.randn(16, 12, generator=noise))
    v, _ = torch.linalg.qr(torch.randn(12, 12, generator=noise))
    changes = [
        u[:, 3 * k : 3 * k + 3] @ torch.randn(3, 3, generator=noise) @ v[:, 3 * k : 3 * k + 3].t() for k in range(4)
    ]
    # rank 3 = 12 // 4 each, and 1 as well: noise directions would cost exactness
    for tasks in (changes, [torch.outer(u[:, k], v[:, k]) for k in range(4)]):
        total = torch.stack(tasks).double().sum(0)
        torch.testing.assert_close(change(torch.zeros(16, 12), tasks), total, rtol=0, atol=5e-6)  # fp32 SVDs


def test_two_tasks_of_rank_one_turn_away_from_each_other():
    """Two unit vectors at an angle: the nearest orthonormal pair keeps their bisector."""
    cosine = 0.6
    u = torch.tensor([[1.0, 0, 0, 0], [cosine, 0.8, 0, 0]])
    v = torch.eye(4)[:2]
    got = change(torch.zeros(4, 4), [torch.outer(u[0], v[0]), 2 * torch.outer(u[1], v[1])])
    total, difference = (u[0] + u[1]).double(), (u[0] - u[1]).double()
    total, difference = total / total.norm(), difference / difference.norm()
    half = 0.5**0.5
    turned = [half * (total + difference), half * (total - difference)]
    expected = torch.outer(turned[0], v[0].double()) + 2 * torch.outer(turned[1], v[1].double())
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-6)  # fp32


def test_equal_tasks_are_merged_to_one_and_unchanged_ones_do_not_count():
    noise = draws(2)
    base, tau = torch.randn(2, 8, 8, generator=noise)
    u, s, v = torch.linalg.svd(tau.double())
    first = (u[:, :4] * s[:4]) @ v[:4]  # the share of each of two experts
    torch.testing.assert_close(change(base, [tau, tau]), first, rtol=0, atol=2e-5)  # an fp32 SVD
    torch.testing.assert_close(change(base, [tau, torch.zeros(8, 8)]), first, rtol=0, atol=2e-5)
    assert torch.equal(change(base, [torch.zeros(8, 8)] * 3), torch.zeros(8, 8).double())


def test_the_order_of_experts_does_not_count():
    noise = draws(3)
    base = torch.randn(10, 14, generator=noise)
    changes = [torch.randn(10, 14, generator=noise) for _ in range(3)]
    # fp32 SVDs of the same matrices; only sums are in another order
    torch.testing.assert_close(change(base, changes), change(base, changes[::-1]), rtol=0, atol=2e-5)


def test_what_is_no_matrix_takes_the_mean():
    noise = draws(4)
    shapes = {
        "b": (9,),
        "conv": (3, 2, 2),
        "text_projection": (6, 6),
        "model.embed_tokens.weight": (8, 5),
        "few": (2, 9),
    }
    base = {name: torch.randn(shape, generator=noise) for name, shape in shapes.items()}
    experts = [{n: t + torch.randn(t.shape, generator=noise) for n, t in base.items()} for _ in range(3)]
    merged = spolia.merge(experts, base=base, method="tsv", settings={"scale": 0.5})
    for name, start in base.items():  # `few` has fewer rows than there are experts
        mean = torch.stack([e[name] for e in experts]).mean(0)
        torch.testing.assert_close(merged[name], torch.lerp(start, mean, 0.5), rtol=1e-5, atol=1e-6)  # fp32 sums
    other = spolia.merge(experts, base=base, method="tsv", settings={"exclude": "nothing"})
    assert not torch.allclose(other["text_projection"], torch.stack([e["text_projection"] for e in experts]).mean(0))


def test_bf16_is_the_fp32_result_rounded_once():
    noise = draws(5)
    base = torch.randn(12, 8, generator=noise).bfloat16()
    experts = [(base.float() + torch.randn(12, 8, generator=noise)).bfloat16() for _ in range(2)]
    low = spolia.merge([{"w": e} for e in experts], base={"w": base}, method="tsv")["w"]
    high = spolia.merge([{"w": e.float()} for e in experts], base={"w": base.float()}, method="tsv")["w"]
    assert low.dtype == torch.bfloat16 and torch.equal(low, high.bfloat16())


def test_too_little_memory_names_the_tensor():
    big = torch.zeros(1500, 1200)
    with pytest.raises(SpoliaError, match=r"(?s)tensor `big` is merged in one piece.*allow at least") as caught:
        spolia.merge([{"big": big}] * 2, base={"big": big}, method="tsv", chunk_memory=40_000_000)
    assert "40 MB" in str(caught.value)


@pytest.mark.slow
def test_slices_cover_a_large_tensor():
    shape = (1100, 1100)  # more than one slice
    base = torch.zeros(shape)
    left, right = torch.zeros(shape[0]), torch.zeros(shape[1])
    left[0] = right[-1] = 1
    pool = ExpertPool.of([{"w": torch.outer(left, right)}], {"w": base})
    aligned, _ = align(pool, None)  # type: ignore[arg-type]
    job = Merge(pool, aligned, tsv, None, lambda name: Tsv(), {})
    found = list(tsv(job.stack(aligned[0], (0, base.numel()), None), Tsv()))
    assert (
        len(found) == 2 and [b.start for b, _ in found] == [0, found[0][0].stop] and found[-1][0].stop == base.numel()
    )
    torch.testing.assert_close(
        torch.cat([v for _, v in found]).view(shape), torch.outer(left, right), rtol=0, atol=1e-6
    )


@given(seed=st.integers(0, 99), rows=st.integers(1, 9), columns=st.integers(1, 5))
@settings(max_examples=25, deadline=None)
def test_inverse_root_makes_columns_orthonormal(seed: int, rows: int, columns: int):
    x = torch.randn(rows, columns, generator=draws(seed), dtype=torch.float64)
    root, values = inverse_root(gram(x))
    y = x @ root
    square = y.t() @ y  # a projector of the rank of x
    # squares of singular values are exact to 2e-16 / s^2, and s^2 > 1e-12 of the largest
    torch.testing.assert_close(square @ square, square, rtol=0, atol=1e-3)
    assert round(float(square.trace())) == torch.linalg.matrix_rank(x, rtol=1e-6)
    given = torch.linalg.svdvals(x)
    torch.testing.assert_close(values.flip(0)[: len(given)], given, rtol=0, atol=1e-7 * float(given[0]))  # root of eps


def test_thin_svd_leaves_rounding_out():
    noise = draws(6)
    low = torch.randn(40, 3, generator=noise) @ torch.randn(3, 30, generator=noise)
    u, s, vt = thin_svd(low, 10)
    assert u.shape == (40, 3) and s.shape == (3,) and vt.shape == (3, 30)
    assert [len(part) for part in thin_svd(torch.zeros(4, 5), 3)] == [4, 0, 0]
    assert thin_svd(1e-6 * torch.randn(4, 5, generator=noise), 3, size=100.0)[1].shape == (0,)


@pytest.mark.parametrize("pattern", ["(", "*x"])
def test_a_bad_pattern_is_refused(pattern: str):
    with pytest.raises(SpoliaError, match="regular expression"):
        change(torch.zeros(3, 3), [torch.ones(3, 3)], exclude=pattern)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_expert_is_named(bad: float):
    first, second = torch.ones(2, 4, 4)
    second[0, 3] = bad
    with pytest.raises(SpoliaError, match=r"second.*`w` holds NaN or Inf, first at element 3"):
        spolia.merge({"first": {"w": first}, "second": {"w": second}}, base={"w": torch.zeros(4, 4)}, method="tsv")
