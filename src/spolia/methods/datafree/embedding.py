"""Where a model stands among others, told from its recovered images alone: how alike the tasks of two models are.

    F_p = mean over images of sum_c p_c (d log p_c / d theta_p)^2,    mean over each filter
    a = F / (F + F' + e), b = F' / (F + F' + e) by element,    S = mean over tensors of cos(a, b),    D = 1 - S

The true diagonal Fisher of a probe under a head fitted to the model's own recovered images: which class stands at which
output makes no difference. The probe is any network, or the learner being trained. Without a probe `cka` compares what the
models themselves answer to one common batch: Kornblith et al. 2019, arXiv 1905.00414.

Wei et al. 2024, arXiv 2405.16560, whose code has the squared mean gradient of an ImageNet network under its own head, for
labels that mean other things there, and e = 1e-6 whatever the size of F; e here is that part of the mean of F.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from spolia.core.gradients import fisher
from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn

    Embed = Callable[[nn.Module, Tensor], Tensor]

SMALL = 1e-6  # of the mean of a tensor's Fisher: what keeps elements that are 0 for both out
HEAD_STEPS, HEAD_LR = 100, 0.1  # of the probe's head: Adam on all images at once, from 0


def task_vectors(
    probe: nn.Module, tasks: Sequence[tuple[Tensor, Tensor]], embed: Embed | None = None
) -> list[list[Tensor]]:
    """The probe's Fisher on each task (images [n, ...], labels [n]): by parameter [filters]. The probe stays as it is.

    `embed(probe, images)` are features; by default its output, flattened. Batch norms use statistics of all tasks' images.
    """
    from spolia.core.functional import call

    embed = embed or _output
    module = _settled(probe, torch.cat([images for images, _ in tasks]), embed)
    weights = {name: p.detach() for name, p in module.named_parameters()}
    found = []
    for images, labels in tasks:
        with torch.no_grad():
            features = embed(module, images)
        matrix, shift = head(features, labels)

        def logits(w: dict[str, Tensor], x: Tensor, matrix: Tensor = matrix, shift: Tensor = shift) -> Tensor:
            return call(module, w, embed, x) @ matrix + shift

        diagonal = fisher(logits, weights, images)
        found.append([by_filter(t / len(images)) for t in diagonal.values()])
    return found


def head(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [d, ways] and shifts [ways] of softmax regression on features [n, d] of unit mean square."""
    size = features.square().mean().sqrt().clamp(min=torch.finfo(features.dtype).tiny)
    scaled, ways = features / size, int(labels.max()) + 1
    matrix = features.new_zeros(features.shape[1], ways).requires_grad_()
    shift = features.new_zeros(ways).requires_grad_()
    optimizer = torch.optim.Adam([matrix, shift], lr=HEAD_LR)
    with torch.enable_grad():
        for _ in range(HEAD_STEPS):
            loss = torch.nn.functional.cross_entropy(scaled @ matrix + shift, labels)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
    return matrix.detach() / size, shift.detach()


def by_filter(values: Tensor) -> Tensor:
    """The mean over everything that one output of the parameter sees: [filters]."""
    return values if values.dim() < 2 else values.flatten(1).mean(1)


def similarity(vectors: Sequence[Sequence[Tensor]]) -> Tensor:
    """S [n, n] fp64: symmetric, 1 on the diagonal, in 0 … 1. Tensors that no task moves do not count."""
    count = len(vectors)
    total, counted = torch.zeros(count, count, dtype=torch.float64), 0
    for parts in zip(*vectors, strict=True):
        f = torch.stack(list(parts)).double().cpu().flatten(1)  # [n, filters]
        if not bool(f.any()):
            continue
        small, counted = SMALL * f.mean(), counted + 1
        for i in range(count):
            below = f[i] + f + small
            a, b = f[i] / below, f / below
            norms = a.norm(dim=1) * b.norm(dim=1)
            cosine = (a * b).sum(1) / norms.clamp(min=torch.finfo(f.dtype).tiny)
            still = ~f.any(1)  # of both nothing is moved: alike
            total[i] += torch.where(still & still[i], 1.0, cosine)
    found = (total + total.T) / (2 * max(1, counted))
    return found.fill_diagonal_(1.0).clamp(max=1.0)


def cka(outputs: Sequence[Tensor]) -> Tensor:
    """Linear CKA of every pair of models' outputs [m, ways] to one batch: [n, n] fp64, in 0 … 1.

    Turning, or exchanging, a model's outputs changes nothing; nor does their size.
    """
    centred = [(t.double() - t.double().mean(0)) for t in outputs]
    sizes = torch.stack([(t.T @ t).norm() for t in centred]).clamp(min=torch.finfo(torch.float64).tiny)
    count = len(centred)
    found = torch.ones(count, count, dtype=torch.float64)
    for i in range(count):
        for j in range(i):
            found[i, j] = found[j, i] = (centred[i].T @ centred[j]).square().sum() / (sizes[i] * sizes[j])
    return found.clamp(max=1.0)


def _settled(probe: nn.Module, images: Tensor, embed: Embed) -> nn.Module:
    """A copy in eval mode whose batch norms have the statistics of `images`."""
    module = copy.deepcopy(probe).train()
    for part in module.modules():
        if isinstance(part, torch.nn.modules.batchnorm._BatchNorm) and part.running_mean is not None:
            part.reset_running_stats()
            part.momentum = None  # the plain mean of what passes
        elif isinstance(part, torch.nn.modules.dropout._DropoutNd):
            part.eval()
    with torch.no_grad():
        embed(module, images)
    return module.eval()


def _output(network: nn.Module, x: Tensor) -> Tensor:
    return network(x).flatten(1)
