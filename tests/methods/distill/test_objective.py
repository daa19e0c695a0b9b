"""Objectives: one call for every loss; shapes, labels that do not count, half precision, gradients, what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from spolia.core.divergence import mean
from spolia.core.settings import Settings
from spolia.errors import SpoliaError
from spolia.methods.distill.bases import objective_of
from spolia.methods.distill.ctkd import Ctkd
from spolia.methods.distill.dist import Dist
from spolia.methods.distill.dkd import Dkd
from spolia.methods.distill.kd import Kd, kd
from spolia.methods.distill.lskd import Lskd
from spolia.methods.distill.mlkd import Mlkd, mlkd
from spolia.methods.distill.nkd import Nkd
from spolia.methods.distill.objective import Objective, Outputs
from spolia.methods.distill.rkd import Rkd

pytestmark = pytest.mark.sampled(3)  # of many cases alike

BY_SAMPLE = [Kd(), Kd(divergence="jensen_shannon"), Dkd(), Nkd(), Lskd(), Lskd(base="dkd"), Ctkd(), Ctkd(base="nkd")]
BY_BATCH = [Dist(), Rkd(), Rkd(angle=0)]
ALL = [*BY_SAMPLE, *BY_BATCH]


def name_of(settings: Settings) -> str:
    base = getattr(settings, "base", None)
    return type(settings).__name__ + (f" of {type(base).__name__}" if base else "")


def with_logits(objective: Objective, s: torch.Tensor, t: torch.Tensor, y: Any = None) -> torch.Tensor:
    return objective(s, t, y, 0.5)


@pytest.mark.parametrize("settings", ALL, ids=name_of)
def test_any_leading_shape_is_the_flattened_one(settings: Settings, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 3, 2, 5)
    objective = objective_of(settings)
    shaped = with_logits(objective, s, t, y)
    assert shaped.shape == (2, 3, 2)
    assert torch.equal(shaped.flatten(), with_logits(objective, s.view(12, 5), t.view(12, 5), y.view(12)))


@pytest.mark.parametrize("settings", ALL, ids=name_of)
def test_labels_below_zero_do_not_count(settings: Settings, drawn: Callable[..., Any]) -> None:
    """Their loss and gradient are 0, and the others' are what they are without them."""
    s, t, y = drawn(8, 5)
    kept = torch.tensor([0, 2, 3, 6])
    ignored = torch.full_like(y, -100).index_copy(0, kept, y[kept])
    objective, x = objective_of(settings), s.clone().requires_grad_()
    losses = objective(x, t, ignored)
    torch.testing.assert_close(losses[kept], objective(s[kept], t[kept], y[kept]))
    assert losses.count_nonzero() == len(kept)
    mean(losses, ignored).backward()
    assert x.grad.any(-1).nonzero().flatten().tolist() == kept.tolist()
    nothing = objective(s, t, torch.full_like(y, -100))
    assert not nothing.any()


@pytest.mark.parametrize("settings", BY_SAMPLE, ids=name_of)
def test_samples_do_not_see_each_other(settings: Settings, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(4, 5)
    objective = objective_of(settings)
    torch.testing.assert_close(objective(s, t, y)[1:3], objective(s[1:3], t[1:3], y[1:3]))


@pytest.mark.parametrize("settings", ALL, ids=name_of)
def test_gradients(settings: Settings, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(4, 3)
    objective = objective_of(settings)
    assert torch.autograd.gradcheck(lambda x: objective(x, t, y), s.requires_grad_())


@pytest.mark.parametrize("settings", ALL, ids=name_of)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(settings: Settings, half: torch.dtype, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(6, 7)
    s, t = (200 * s).to(half), (200 * t).to(half)
    objective = objective_of(settings)
    single = objective(s.float(), t.float(), y)
    assert single.isfinite().all()
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses = objective(s, t, y)
        assert losses.dtype == torch.float32
        assert torch.equal(losses, single)


@pytest.mark.parametrize("settings", ALL, ids=name_of)
def test_the_teacher_has_no_gradient(settings: Settings, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(4, 5)
    t.requires_grad_()
    objective_of(settings)(s.requires_grad_(), t, y).sum().backward()
    assert t.grad is None
    assert s.grad.any()


@pytest.mark.parametrize("settings", ALL, ids=name_of)
def test_parts_add_up(settings: Settings, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(4, 5)
    objective = objective_of(settings)
    parts = objective.parts(s, t, y, 0.5)
    torch.testing.assert_close(sum(parts.values()), objective(s, t, y, 0.5))
    assert next(iter(parts)) == "ce"
    torch.testing.assert_close(parts["ce"], objective.ce * cross_entropy(s, y, reduction="none"))


@pytest.mark.parametrize("settings", [s for s in ALL if not objective_of(s).labelled], ids=name_of)
def test_without_labels_there_is_no_cross_entropy(settings: Settings, drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(4, 5)
    parts = objective_of(settings).parts(s, t)
    assert "ce" not in parts
    labelled = objective_of(settings).parts(s, t, y)
    assert all(torch.equal(term, labelled[name]) for name, term in parts.items())


def test_a_term_of_ones_own(drawn: Callable[..., Any]) -> None:
    """As a rank loss is added; a number an image is one for each of its tokens."""
    s, t, y = drawn(2, 3, 5)
    by_image = torch.tensor([1.0, 2.0], dtype=torch.float64)
    more = kd().plus("extra", lambda seen: (1 - seen.progress) * by_image)
    assert list(more.parts(s, t, y)) == ["ce", "kd", "extra"]
    torch.testing.assert_close(more(s, t, y, 0.25), kd()(s, t, y) + 0.75 * by_image[:, None].expand(2, 3))
    per_token = kd().plus("extra", lambda seen: torch.ones(2, 3, 4, dtype=torch.float64))
    torch.testing.assert_close(per_token(s, t, y), kd()(s, t, y) + 1)  # of more axes than samples: the mean


def test_three_lines_train_a_student() -> None:
    """The student reaches the teacher: a convex problem, where only the step size could stand in the way."""
    source = torch.Generator().manual_seed(0)
    inputs, teacher = torch.randn(64, 8, generator=source), torch.randn(8, 5, generator=source)
    student = torch.zeros(8, 5, requires_grad=True)
    objective, losses = kd(Kd(alpha=1.0, ce=0.0)), []
    for _ in range(60):
        loss = objective(inputs @ student, inputs @ teacher).mean()
        (slope,) = torch.autograd.grad(loss, student)
        student = (student - slope).detach().requires_grad_()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0] / 100


WRONG: list[tuple[Callable[..., Any], tuple[str, ...]]] = [
    (lambda s, t, y: kd()(s, t[..., :4], y), ("[4, 5]", "[4, 4]")),
    (lambda s, t, y: kd()(s, t, y[:3]), ("[3]", "[4, 5]")),
    (lambda s, t, y: kd()(s, t, y, 1.5), ("progress", "1.5")),
    (lambda s, t, y: objective_of(Dkd())(s, t), ("needs labels",)),
    (lambda s, t, y: mlkd()(s, t, y), ("[2, ..., classes]",)),
    (lambda s, t, y: kd()(Outputs(s, (s,)), t, y), ("1 features of the student", "none")),
    (lambda s, t, y: objective_of(Rkd(student_site="a", teacher_site="b"))(s, t, y), ("0 features", "a")),
    (lambda s, t, y: objective_of(Rkd(student_site="a")), ("one of two",)),
    (lambda s, t, y: kd().plus("own", lambda seen: s[0])(s, t, y), ("[5]", "[4]")),
]


@pytest.mark.parametrize(("call", "words"), WRONG)
def test_what_is_wrong_is_named(call: Callable[..., Any], words: tuple[str, ...], drawn: Callable[..., Any]) -> None:
    with pytest.raises(SpoliaError) as error:
        call(*drawn(4, 5))
    assert all(word in str(error.value) for word in words)


def test_views_share_labels(drawn: Callable[..., Any]) -> None:
    s, t, y = drawn(2, 4, 5)
    both = torch.stack([y[0], y[0]])
    assert torch.equal(mlkd(Mlkd())(s, t, y[0]), mlkd(Mlkd())(s, t, both))
