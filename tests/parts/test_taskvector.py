"""Task vectors obey the arithmetic of vectors and leave what they were made of alone."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.errors import SpoliaError
from spolia.parts.taskvector import TaskVector

State = dict[str, torch.Tensor]


def state(seed: int, dtype: torch.dtype = torch.float32) -> State:
    noise = torch.Generator().manual_seed(seed)
    return {
        "w": torch.randn(3, 4, generator=noise).to(dtype),
        "b": torch.randn((), generator=noise).to(dtype),
        "n": torch.tensor([seed]),
    }


BASE, A, B = state(0), state(1), state(2)
TA, TB = TaskVector.between(BASE, A), TaskVector.between(BASE, B)


def close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:  # fp32 numbers of size one after two or three operations: a few units in the last place
        torch.testing.assert_close(found[name], expected[name], rtol=1e-6, atol=1e-6)


def test_between_and_apply_are_inverse() -> None:
    assert TA.tensors.keys() == {"w", "b"}
    found = TA.apply(BASE)
    close({n: found[n] for n in ("w", "b")}, {n: A[n] for n in ("w", "b")})
    assert torch.equal(found["n"], BASE["n"]) and found["n"].data_ptr() != BASE["n"].data_ptr()
    assert all(torch.equal(TA.apply(BASE, 0.0)[n], BASE[n]) for n in BASE)


def test_nothing_given_is_changed() -> None:
    base, a = state(0), state(1)
    vector = TaskVector.between(base, a)
    before = {n: t.clone() for n, t in vector.tensors.items()}
    _ = (vector + vector, -vector, vector * 2, 2 * vector, vector - vector, vector.apply(base, 3.0))
    assert all(torch.equal(base[n], BASE[n]) and torch.equal(a[n], A[n]) for n in base)
    assert all(torch.equal(vector.tensors[n], before[n]) for n in before)


@settings(max_examples=50, deadline=None)
@given(st.floats(-4, 4, width=32), st.integers(0, 99), st.integers(0, 99))
def test_vector_arithmetic(factor: float, i: int, j: int) -> None:
    a, b = TaskVector.between(BASE, state(i)), TaskVector.between(BASE, state(j))
    close((a + b).tensors, {n: a.tensors[n] + b.tensors[n] for n in a.tensors})
    close((a - b).tensors, {n: a.tensors[n] - b.tensors[n] for n in a.tensors})
    close((factor * a).tensors, (a * factor).tensors)
    close((-a).tensors, (a * -1).tensors)
    # fp64 sums of 13 products, so only the rounding of fp32 factors remains.
    assert math.isclose((a * factor).dot(b), factor * a.dot(b), rel_tol=1e-5, abs_tol=1e-5)
    assert math.isclose(a.norm**2, a.dot(a), rel_tol=1e-12)
    if a.norm and b.norm:
        assert abs(a.cosine(b)) <= 1 + 1e-12 and math.isclose(a.cosine(b), b.cosine(a))


def test_lengths_and_angles() -> None:
    base = {"x": torch.zeros(2), "y": torch.zeros(1)}
    a = TaskVector.between(base, {"x": torch.tensor([3.0, 0.0]), "y": torch.tensor([4.0])})
    b = TaskVector.between(base, {"x": torch.tensor([0.0, 2.0]), "y": torch.tensor([0.0])})
    assert a.norm == 5 and a.dot(b) == 0 and a.cosine(b) == 0 and a.cosine(-a) == -1
    assert math.isnan(a.cosine(a * 0.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_types(dtype: torch.dtype) -> None:
    base, expert = state(0, dtype), state(1, dtype)
    vector = TaskVector.between(base, expert)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert all(t.dtype == wide for t in vector.tensors.values())
    assert torch.equal(vector.tensors["w"], expert["w"].to(wide) - base["w"].to(wide))
    assert vector.apply(base)["w"].dtype == dtype


@pytest.mark.parametrize(
    ("other", "word"),
    [
        ({"w": A["w"], "b": A["b"]}, "`n`"),
        (A | {"extra": torch.ones(1)}, "`extra`"),
        (A | {"w": torch.ones(4, 3)}, "`w`"),
    ],
)
def test_models_that_differ_are_refused(other: State, word: str) -> None:
    with pytest.raises(SpoliaError, match=word):
        TaskVector.between(BASE, other)
    with pytest.raises(SpoliaError, match=word):
        TaskVector.between(other, BASE)


@pytest.mark.parametrize("act", ["add", "subtract", "dot", "cosine", "apply"])
@pytest.mark.parametrize("extra", ["mine", "theirs"])
def test_vectors_of_other_models_are_refused(act: str, extra: str) -> None:
    """Silently dropping a tensor would give a plausible, wrong number."""
    larger = TaskVector.between(BASE | {"v": torch.ones(2)}, A | {"v": torch.zeros(2)})
    a, b = (larger, TA) if extra == "mine" else (TA, larger)
    acts = {"add": lambda: a + b, "subtract": lambda: a - b, "dot": lambda: a.dot(b), "cosine": lambda: a.cosine(b)}
    if act == "apply" and extra == "theirs":
        return  # a base may hold more than the vector changes: integers, for one
    with pytest.raises(SpoliaError, match="`v`"):
        acts.get(act, lambda: larger.apply(BASE))()
