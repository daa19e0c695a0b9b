"""Cuts by histograms are the order statistics that sorting gives, ties and quotas among them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.checkpoint import DTYPES
from spolia.core.select import SAMPLE, Cut, cut_of_nonzero, cuts, cuts_of, ranks_in_rows
from spolia.core.stream import Plane, Stack, TensorPlane

WIDTHS = {torch.float32: 32, torch.float64: 64}


def stream(values: torch.Tensor, edges: list[int]) -> Callable[..., None]:
    """Sweeps over `values` [rows, n] in blocks cut at `edges`."""
    ends = [0, *sorted(edges), values.shape[1]]

    def sweep(count: Callable[..., None], totals: torch.Tensor) -> None:
        for start, stop in itertools.pairwise(ends):
            count(values[:, start:stop].contiguous(), totals)

    return sweep


def by_sorting(row: torch.Tensor, rank: int) -> Cut:
    value = row.abs().sort(descending=True).values[rank - 1]
    return Cut(float(value), rank - int((row.abs() > value).sum()), int((row.abs() == value).sum()))


def special(dtype: torch.dtype) -> list[float]:
    about = torch.finfo(dtype)
    odd = [0.0, 1.0, 0.5, about.tiny, about.smallest_normal / 2, about.max, about.eps, 1 + about.eps, math.inf]
    return odd + [-v for v in odd]


@st.composite
def rows(draw: st.DrawFn) -> tuple[torch.Tensor, list[list[int]], list[int]]:
    dtype = draw(st.sampled_from(list(WIDTHS)))
    count, n = draw(st.integers(1, 2)), draw(st.integers(1, 40))
    anything = st.floats(width=WIDTHS[dtype], allow_nan=False)
    values = draw(
        st.lists(
            st.lists(st.sampled_from(special(dtype)) | anything, min_size=n, max_size=n),
            min_size=count,
            max_size=count,
        )
    )
    ranks = draw(st.lists(st.lists(st.integers(1, n), max_size=2), min_size=count, max_size=count))
    return torch.tensor(values, dtype=dtype), ranks, draw(st.lists(st.integers(0, n), max_size=3))


@settings(max_examples=30, deadline=None)
@given(rows())
def test_cuts_are_what_sorting_gives(drawn: tuple[torch.Tensor, list[list[int]], list[int]]) -> None:
    values, ranks, edges = drawn
    found = cuts(stream(values, edges), ranks, values.dtype)
    assert found == [[by_sorting(row, rank) for rank in wanted] for row, wanted in zip(values, ranks, strict=True)]


@pytest.mark.parametrize("dtype", list(WIDTHS))
def test_cuts_of_many_values_of_one_size(dtype: torch.dtype) -> None:
    """Magnitudes that share their highest 16 bits: only the later sweeps can tell them apart."""
    noise = torch.randn(2, 20_000, dtype=dtype, generator=torch.Generator().manual_seed(0))
    values = 1 + noise * 50 * torch.finfo(dtype).eps
    ranks = [[1, 7, 10_000, 20_000], [19_999]]
    found = cuts(stream(values, [5, 5, 13_000]), ranks, dtype)
    assert found == [[by_sorting(row, rank) for rank in wanted] for row, wanted in zip(values, ranks, strict=True)]
    for row, wanted in zip(values, ranks, strict=True):
        for rank, cut in zip(wanted, found[0] if len(wanted) > 1 else found[1], strict=True):
            assert cut.value == float(row.abs().kthvalue(row.numel() - rank + 1).values)


def test_no_ranks_no_sweep() -> None:
    def never(count: object, totals: object) -> None:
        raise AssertionError("nothing was asked for")

    assert cuts(never, [[], []], torch.float32) == [[], []]


def test_the_input_is_not_changed() -> None:
    values = torch.randn(2, 100, generator=torch.Generator().manual_seed(0))
    before = values.clone()
    cuts(stream(values, [50]), [[3], [7]], torch.float32)
    ranks_in_rows(values.abs())
    assert torch.equal(values, before)


@settings(max_examples=50, deadline=None)
@given(rows())
def test_ranks_are_those_of_a_stable_argsort(drawn: tuple[torch.Tensor, list[list[int]], list[int]]) -> None:
    magnitudes = drawn[0].abs()
    found = ranks_in_rows(magnitudes)
    assert found.dtype == torch.int32
    assert torch.equal(found.long(), magnitudes.argsort(dim=1, stable=True).argsort(dim=1))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (1, 1), (2, 5000)])
@pytest.mark.parametrize("dtype", list(WIDTHS))
def test_ranks_of_odd_shapes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    magnitudes = torch.randint(0, 50, shape, generator=torch.Generator().manual_seed(1)).to(dtype)  # full of ties
    assert torch.equal(ranks_in_rows(magnitudes).long(), magnitudes.argsort(dim=1, stable=True).argsort(dim=1))


def large(kind: str, seed: int) -> torch.Tensor:
    """A task vector long enough to be sampled."""
    n, noise = 9 * SAMPLE + 123, torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=noise)
    if kind == "ties":
        values = (values * 4).round()
    elif kind == "bf16":  # changes of a bf16 model: the commonest magnitudes are several per cent of all each
        start = torch.randn(n, generator=noise) * 0.02
        values = (start + values * 3e-4).bfloat16().float() - start.bfloat16().float()
    elif kind == "sorted":
        values = values.sort().values
    elif kind == "one place":  # the sample sees none of it
        values = torch.zeros(n)
        values[1500:1600] = torch.arange(1, 101)
    elif kind == "constant":
        values = torch.full((n,), -0.5)
    return values


@pytest.mark.sampled(4)
@pytest.mark.parametrize("kind", ["noise", "ties", "bf16", "sorted", "one place", "constant"])
@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_sampled_cuts_are_the_histograms(kind: str, dtype: str) -> None:
    stack = stack_of(torch.stack([large(kind, seed) for seed in (0, 1)]), dtype)
    n = stack.numel
    ranks = [[n // 5, 50], [n, 1, n // 2]]
    assert stack.sample(SAMPLE) is not None
    assert cuts_of(stack, ranks) == cuts(stack.sweep, ranks, stack.dtype)


@pytest.mark.parametrize("kind", ["noise", "ties", "bf16"])
def test_ties_do_not_cost_another_sweep(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    stack = stack_of(torch.stack([large(kind, seed) for seed in (0, 1)]))
    monkeypatch.setattr(stack, "sweep", None)  # the histograms, where the sample's brackets do not decide
    assert all(cut.quota <= cut.ties for row in cuts_of(stack, [[stack.numel // 5], [stack.numel // 3]]) for cut in row)


@pytest.mark.sampled(3)
@pytest.mark.parametrize("kind", ["noise", "ties", "bf16", "sorted", "one place", "constant", "small"])
def test_a_share_of_what_is_not_zero(kind: str) -> None:
    deltas = torch.stack([large(kind if kind != "small" else "ties", seed) for seed in (0, 1)])
    deltas = deltas[:, :1000] if kind == "small" else deltas
    largest = deltas.abs().amax(0)
    rank = int(0.3 * int(largest.count_nonzero()))
    found = cut_of_nonzero(stack_of(deltas), lambda changes: changes.abs().amax(0), 0.3)
    assert found == by_sorting(largest, rank)
    assert cut_of_nonzero(stack_of(deltas), lambda changes: changes.amax(0) * 0, 0.3) is None


def stack_of(deltas: torch.Tensor, dtype: str = "F32") -> Stack:
    """Task vectors [experts, n] as a stack whose base is zero."""
    rows, n = deltas.to(torch.float64 if dtype == "F64" else torch.float32), deltas.shape[1]
    planes: list[Plane] = [TensorPlane("m", DTYPES[dtype], row) for row in rows]
    base = TensorPlane("base", DTYPES[dtype], torch.zeros_like(rows[0]))
    return Stack("w", (n,), base, planes, list(range(len(planes))), 0, (0, n))
