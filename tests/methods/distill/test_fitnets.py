"""FitNets on real modules: taps, regressors of the right widths, the same for a seed, learned with the student."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spolia.core.divergence import mean
from spolia.errors import SpoliaError
from spolia.methods.distill.fitnets import Fitnets, fitnets
from spolia.methods.distill.kd import kd
from spolia.methods.distill.objective import Objective, Outputs
from spolia.parts.taps import tapped

SITES = Fitnets(student_sites=("0", "2"), teacher_sites=("0", "2"))
X, Y = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 3, -100, 1])


def network(width: int, stride: int) -> nn.Sequential:
    torch.manual_seed(width)
    first = nn.Conv2d(3, width, 3, stride, 1)
    return nn.Sequential(
        first, nn.ReLU(), nn.Conv2d(width, width, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 4)
    )


def outputs(module: nn.Module, objective: Objective, side: int) -> Outputs:
    with tapped(module, [pair[side] for pair in objective.taps]) as read:
        logits = module(X)
        return Outputs(logits, read())


def test_a_training_step() -> None:
    student, teacher, objective = network(5, 2), network(8, 1), fitnets(SITES)
    given = outputs(student, objective, 0), outputs(teacher, objective, 1)
    with pytest.raises(SpoliaError, match="has not been made"):
        objective(*given, Y)
    objective = objective.begun(*given, seed=3)
    assert {name: tuple(t.shape) for name, t in objective.learned.items()} == {
        "hint.0.weight": (8, 5),
        "hint.0.bias": (8,),
        "hint.1.weight": (8, 5),
        "hint.1.bias": (8,),
    }
    again = fitnets(SITES).begun(*given, seed=3)
    assert all(torch.equal(objective.learned[name], again.learned[name]) for name in again.learned)
    before = mean(objective(*given, Y), Y)
    optimizer = torch.optim.SGD([*student.parameters(), *objective.learned.values()], lr=1e-3)
    before.backward()
    optimizer.step()
    after = mean(objective(outputs(student, objective, 0), given[1], Y), Y)
    assert after < before
    assert all(t.grad.any() for t in objective.learned.values())


def test_a_regressor_that_fits_leaves_no_hint() -> None:
    """A teacher's feature that is a linear map of the student's."""
    objective = fitnets(Fitnets(student_sites=("a",), teacher_sites=("a",)))
    logits, ours = torch.randn(4, 3), torch.randn(4, 5)
    matrix, shift = torch.randn(7, 5), torch.randn(7)
    objective = objective.begun(Outputs(logits, (ours,)), Outputs(logits, (ours @ matrix.T + shift,)))
    with torch.no_grad():
        objective.learned["hint.0.weight"].copy_(matrix)
        objective.learned["hint.0.bias"].copy_(shift)
    parts = objective.parts(Outputs(logits, (ours,)), Outputs(logits, (ours @ matrix.T + shift,)))
    assert parts["hint"].max() < 1e-8  # fp32


def test_a_term_more_keeps_the_regressors() -> None:
    student, teacher = network(5, 1), network(8, 1)
    objective = fitnets(SITES).plus("soft", lambda seen: kd().parts(seen.student.logits, seen.teacher.logits)["kd"])
    given = outputs(student, objective, 0), outputs(teacher, objective, 1)
    assert list(objective.begun(*given).parts(*given, Y)) == ["ce", "hint", "soft"]


def test_tokens_have_a_hint_each() -> None:
    objective = fitnets(Fitnets(student_sites=("a",), teacher_sites=("a",)))
    ours, theirs = torch.randn(2, 6, 5), torch.randn(2, 6, 7)
    tokens, images = torch.randn(2, 6, 11), torch.randn(2, 4)
    for logits in (tokens, images):
        given = Outputs(logits, (ours,)), Outputs(logits, (theirs,))
        assert objective.begun(*given)(*given).shape == logits.shape[:-1]


def test_what_is_missing_is_named() -> None:
    with pytest.raises(SpoliaError, match="no modules are named"):
        fitnets(Fitnets())
    with pytest.raises(ValueError, match="1 student_sites for 0 teacher_sites"):
        Fitnets(student_sites=("a",))
