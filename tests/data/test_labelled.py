from __future__ import annotations

import numpy as np
import pytest
import torch

from spolia.data.labelled import cropped, labelled_arrays, labelled_digits, names_in
from spolia.errors import SpoliaError


def test_digits_come_in_two_parts_that_share_no_scan():
    held = labelled_digits()
    assert held.shape == (1, 8, 8) and len(held.train[1]) == 1197 and len(held.test[1]) == 600
    assert float(held.train[0].min()) == 0 and float(held.train[0].max()) == 1
    assert not torch.equal(held.test[0], labelled_digits(seed=1).test[0])


def test_arrays_are_read_by_their_names(tmp_path):
    x, y = np.arange(60, dtype=np.float32).reshape(12, 5), np.arange(12) % 3
    np.savez(tmp_path / "parts.npz", x_train=x[:9], y_train=y[:9], x_test=x[9:], y_test=y[9:])
    held = labelled_arrays(tmp_path / "parts.npz")
    assert torch.equal(held.train[0], torch.from_numpy(x[:9])) and held.test[1].tolist() == [0, 1, 2]
    np.savez(tmp_path / "whole.npz", inputs=x, labels=y + 7)
    assert names_in(tmp_path / "whole.npz") == [("inputs", "labels")]
    one, other = (labelled_arrays(tmp_path / "whole.npz", share=0.25, seed=seed) for seed in (0, 1))
    assert one.classes == ("7", "8", "9") and torch.bincount(one.test[1]).tolist() == [1, 1, 1]
    both = torch.cat([one.train[0], one.test[0]])
    assert sorted(both[:, 0].tolist()) == x[:, 0].tolist()  # every input in one part
    assert not torch.equal(one.test[0], other.test[0])


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"a": np.zeros((3, 2)), "y": np.zeros(3, int)}, "call the arrays x and y"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(2, int)}, "one whole number an input"),
        ({"x": np.zeros((3, 2)), "y": np.zeros(3)}, "one whole number an input"),
        ({"x": np.zeros((3, 2)), "y": np.array([0, 0, 1])}, "one input of class 1"),
    ],
)
def test_arrays_that_do_not_fit_are_told(arrays, said, tmp_path):
    np.savez(tmp_path / "a.npz", **arrays)
    with pytest.raises(SpoliaError) as told:
        labelled_arrays(tmp_path / "a.npz")
    assert said in str(told.value)


def test_a_crop_is_a_shift_and_perhaps_a_mirror():
    x = torch.arange(2 * 3 * 6 * 6, dtype=torch.float32).view(2, 3, 6, 6) + 1
    wide = torch.nn.functional.pad(x, (2, 2, 2, 2))
    shifts = [wide[0, :, i : i + 6, j : j + 6] for i in range(5) for j in range(5)]
    allowed = [*shifts, *(one.flip(-1) for one in shifts)]
    draws, found = np.random.default_rng(0), set()
    for _ in range(60):
        made = cropped(x, draws, border=2)
        assert made.shape == x.shape
        (which,) = [i for i, one in enumerate(allowed) if torch.equal(one, made[0])]
        found.add(which)
    assert len(found) > 20 and any(i >= 25 for i in found) and any(i < 25 for i in found)
    again = cropped(x, np.random.default_rng(3)), cropped(x, np.random.default_rng(3))
    assert torch.equal(*again)
    assert cropped(x.to(torch.uint8), np.random.default_rng(0)).dtype == torch.uint8
