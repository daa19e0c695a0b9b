"""What several processes of one training share, so that each holds the same student after every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from spolia.core.dist import summed, world
from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor, nn


def alike(tensors: Iterable[Tensor], rank: int) -> None:
    """The first process's values for all, in place."""
    if world()[1] == 1:
        return
    with torch.no_grad():
        for tensor in tensors:
            shared = tensor.to(torch.uint8) if tensor.dtype == torch.bool else tensor.detach().clone()
            tensor.copy_(summed(shared if rank == 0 else shared.zero_()))


def exchanged(parameters: list[Tensor]) -> None:
    """Gradients become their sum over all processes. One that no process has stays None: nothing decays or moves it."""
    there = summed(torch.tensor([p.grad is not None for p in parameters], dtype=torch.int32)).tolist()
    used = [p for p, number in zip(parameters, there, strict=True) if number]
    for dtype in sorted({p.dtype for p in used}, key=str):
        group = [p for p in used if p.dtype == dtype]
        flat = torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).reshape(-1) for p in group])
        for p, part in zip(group, summed(flat).split([p.numel() for p in group]), strict=True):
            p.grad = part.view_as(p)


def averaged(module: nn.Module, ranks: int) -> None:
    """Running statistics become their mean over all processes."""
    with torch.no_grad():
        for buffer in module.buffers():
            if buffer.is_floating_point():
                summed(buffer).div_(ranks)
