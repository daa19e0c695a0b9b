from __future__ import annotations

import torch
from torch import nn

from spolia.core.priors import disagreement, distillation, length, off_grey, statistics_gap, total_variation


def network() -> nn.Sequential:
    draws = torch.Generator().manual_seed(0)
    made = nn.Sequential(
        nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    ).double()
    with torch.no_grad():
        for p in made.parameters():
            p.copy_(torch.randn(p.shape, generator=draws))
    return made.eval()


def images(seed: int = 0) -> torch.Tensor:
    return torch.rand(6, 2, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def norms(module: nn.Module) -> list[nn.Module]:
    return [layer for layer in module if isinstance(layer, nn.BatchNorm2d)]


def test_the_gap_is_zero_where_statistics_match():
    module, x = network(), images()
    with torch.no_grad():  # layer by layer: what the first passes on follows from its own statistics
        y = module[0](x)
        for norm in (1, 4):
            module[norm].running_mean.copy_(y.mean((0, 2, 3)))
            module[norm].running_var.copy_(y.var((0, 2, 3), unbiased=False))
            y = module[norm](y) if norm == 4 else module[3](module[2](module[norm](y)))
    with statistics_gap(norms(module)) as read:
        with torch.no_grad():
            module(x)
        assert float(read()) < 1e-12  # fp64: two orders of one sum
        module(images(1))
        assert float(read().detach()) > 1e-3


def test_the_gap_is_the_sum_of_two_lengths_a_layer():
    module, x = network(), images()
    with statistics_gap(norms(module)) as read:
        module(x)
        found = read()
    first = module[0](x)
    second = module[3](module[2](module[1](first)))
    wanted = 0.0
    for layer, seen in ((module[1], first), (module[4], second)):
        wanted += (seen.mean((0, 2, 3)) - layer.running_mean).norm()
        wanted += (seen.var((0, 2, 3), unbiased=False) - layer.running_var).norm()
    assert torch.allclose(found, wanted, rtol=1e-12)
    assert not any(layer._forward_pre_hooks for layer in module)


def test_total_variation_and_grey():
    flat = torch.full((2, 1, 4, 4), 0.5)
    assert float(total_variation(flat)) == 0 and float(off_grey(flat)) == 0
    edge = torch.zeros(1, 1, 1, 3)
    edge[..., 2] = 1
    assert float(total_variation(edge)) == 1  # one step to the right; a single row has no other neighbours
    assert float(off_grey(torch.ones(1, 1, 2, 2))) == 1  # four halves


def test_the_gradient_of_a_length_at_zero_is_zero():
    x = torch.zeros(3, requires_grad=True)
    length(x).backward()
    assert torch.equal(x.grad, torch.zeros(3))


def logits(seed: int) -> torch.Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_the_legacy_gradient_is_that_of_an_inner_product():
    student, teacher = logits(0).requires_grad_(), logits(1)
    (found,) = torch.autograd.grad(distillation(student, teacher, "legacy"), student)
    product = -(student.softmax(1) * teacher.softmax(1)).sum() / (7 * 5)
    (wanted,) = torch.autograd.grad(product, student)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)


def test_the_proper_loss_is_zero_for_equal_answers_alone():
    teacher = logits(1)
    assert abs(float(distillation(teacher + 3, teacher))) < 1e-12  # shifted logits are the same answer
    assert float(distillation(logits(0), teacher)) > 0.01
    assert float(distillation(teacher, teacher, "legacy")) != 0


def test_disagreement_counts_where_both_say_the_same():
    teacher = torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
    student = torch.tensor([[1.0, 0.0], [3.0, 0.0]], dtype=torch.float64, requires_grad=True)
    p, q = teacher[0].softmax(0), student[0].softmax(0)
    wanted = -(p * (p / q).log()).sum() / 2  # the second is another answer
    found = disagreement(student, teacher)
    assert torch.allclose(found, wanted, rtol=1e-12)
    found.backward()
    assert student.grad[0].abs().sum() > 0 and not student.grad[1].any()
    assert not disagreement(student, teacher, "legacy").requires_grad  # its student is a constant
