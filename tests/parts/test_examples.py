"""Examples are drawn by place: whole epochs, the same batches on every call, splits that share nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spolia.errors import SpoliaError
from spolia.parts.examples import Examples, by_task


@given(total=st.integers(1, 40), count=st.integers(1, 50), seed=st.integers(0, 3))
def test_epochs_hold_every_example_once(total: int, count: int, seed: int) -> None:
    examples = Examples(torch.arange(total), name="a")
    size = min(count, total)
    seen = np.concatenate([examples.drawn(count, seed, step) for step in range(2 * total)])
    for epoch in range(len(seen) // total):
        assert sorted(seen[epoch * total : (epoch + 1) * total]) == list(range(total))
    assert len(examples.drawn(count, seed, 7)) == size


def test_a_draw_depends_on_seed_step_and_name_only() -> None:
    a, again, b = (Examples(torch.arange(30), name=name) for name in ("a", "a", "b"))
    late = a.drawn(4, 0, 11)
    assert (again.drawn(4, 0, 11) == late).all(), "no state is kept between draws"
    assert any((b.drawn(4, 0, s) != a.drawn(4, 0, s)).any() for s in range(5)), "tasks see orders of their own"
    assert any((a.drawn(4, 1, s) != a.drawn(4, 0, s)).any() for s in range(5))


@given(total=st.integers(2, 40), share=st.floats(0, 0.9))
def test_a_split_shares_nothing_and_loses_nothing(total: int, share: float) -> None:
    rest, held = Examples(torch.arange(total), torch.arange(total) * 2, name="a").split(share, 0)
    both = torch.cat([part.batch(range(len(part))) for part in (rest, held)])
    assert sorted(both.tolist()) == list(range(total)) and len(rest) >= 1
    assert (rest.labels_at(range(len(rest))) == 2 * rest.batch(range(len(rest)))).all(), "labels go with their inputs"


@pytest.mark.parametrize(
    "inputs",
    [
        torch.arange(12).reshape(6, 2),
        np.arange(12).reshape(6, 2),
        {"ids": torch.arange(12).reshape(6, 2)},
        (torch.arange(12).reshape(6, 2),),
        [torch.arange(2) + 2 * i for i in range(6)],
        [(torch.arange(2) + 2 * i, i) for i in range(6)],
    ],
    ids=["tensor", "array", "mapping", "tuple", "sequence", "labelled pairs"],
)
def test_inputs_of_every_form_give_one_batch(inputs: object) -> None:
    made = Examples(inputs, name="a").batch([4, 1])
    made = made["ids"] if isinstance(made, dict) else made[0] if isinstance(made, tuple) else made
    assert made.tolist() == [[8, 9], [2, 3]]


def test_what_is_wrong_is_said_before_any_batch() -> None:
    with pytest.raises(SpoliaError, match="3 labels for 6 inputs"):
        Examples(torch.zeros(6, 2), torch.zeros(3), name="a")
    with pytest.raises(SpoliaError, match="cannot be drawn from by place"):
        Examples(iter([1, 2]), name="a")
    with pytest.raises(SpoliaError, match=r"hold \[5, 6\] inputs"):
        Examples({"x": torch.zeros(6), "y": torch.zeros(5)}, name="a")
    with pytest.raises(SpoliaError, match=r"nothing for b; c is no expert's task"):
        by_task({"a": torch.zeros(2), "c": torch.zeros(2)}, ["a", "b"])
    with pytest.raises(SpoliaError, match="is empty"):
        by_task({"a": torch.zeros(0, 3)}, ["a"])
