"""RKD on hand-made points: what moves with its teacher as a whole loses nothing; against sums written out."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from spolia.core.relations import cosines, distances
from spolia.errors import SpoliaError
from spolia.methods.distill.objective import Outputs
from spolia.methods.distill.rkd import Rkd, rkd


def test_turned_scaled_and_shifted_points_lose_nothing() -> None:
    turn = torch.tensor([[math.cos(1.0), -math.sin(1.0)], [math.sin(1.0), math.cos(1.0)]], dtype=torch.float64)
    points = torch.randn(6, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert rkd()(3 * points @ turn + 5, points).abs().max() < 1e-13  # rounding, times 50
    assert (rkd()(points * torch.tensor([3.0, 1.0]), points) > 0.01).all()


def test_a_line_against_a_right_triangle() -> None:
    """Student at 0, 1, 2 of a line; teacher 3, 4, 5: distances over their means, then the Huber loss by hand."""
    line = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    triangle = torch.tensor([[0.0, 0.0], [3.0, 0.0], [0.0, 4.0]])
    mean_line, mean_triangle = 4 / 3, 4.0
    apart = [
        (1 / mean_line - 3 / mean_triangle),
        (2 / mean_line - 4 / mean_triangle),
        (1 / mean_line - 5 / mean_triangle),
    ]
    half = [a * a / 2 for a in apart]  # pairs 01, 02, 12
    expected = [25 * (half[0] + half[1]) / 3, 25 * (half[0] + half[2]) / 3, 25 * (half[1] + half[2]) / 3]
    found = rkd().parts(line, triangle)
    np.testing.assert_allclose(found["distance"], expected, rtol=1e-5, atol=1e-7)  # fp32
    # angles at the three points: cos 1, -1, 1 on the line; 0, 3/5, 4/5 in the triangle; j and k in both orders
    bends = [1 - 0, -1 - 3 / 5, 1 - 4 / 5]
    huber = [b * b / 2 if abs(b) < 1 else abs(b) - 0.5 for b in bends]
    np.testing.assert_allclose(found["angle"], [50 * 2 * h / 9 for h in huber], rtol=1e-5)


def test_the_mean_is_the_published_loss(drawn: Callable[..., Any]) -> None:
    s, t, _ = drawn(7, 5)
    huber = torch.nn.functional.smooth_l1_loss
    expected = 25 * huber(distances(s), distances(t)) + 50 * huber(cosines(s), cosines(t))
    torch.testing.assert_close(rkd()(s, t).mean(), expected)


def test_features_of_two_widths(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 5)
    ours, theirs = drawn(6, 3, seed=1)[0], drawn(6, 4, 2, seed=2)[0]
    objective = rkd(Rkd(student_site="pool", teacher_site="pool"))
    assert objective.taps == (("pool", "pool"),)
    found = objective.parts(Outputs(s, (ours,)), Outputs(t, (theirs,)), y)
    huber = torch.nn.functional.smooth_l1_loss(distances(ours), distances(theirs.flatten(1)), reduction="none")
    torch.testing.assert_close(found["distance"], 25 * huber.mean(1))
    with pytest.raises(SpoliaError, match="one vector a sample"):
        objective(Outputs(s, (ours[:3],)), Outputs(t, (theirs,)), y)
