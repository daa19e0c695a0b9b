"""The smooth tau's loss with its gradient found in the forward pass: what is kept for the backward pass is [n, C]."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spolia.core.ranking_exact import Sums
from spolia.core.ranking_terms import finished
from spolia.errors import SpoliaError

Sweep = Callable[[Tensor, bool], tuple[Sums, Tensor | float]]
"""(student [n, C], whether slopes are wanted) -> the sums, and what they are divided by."""


def loss_of(s: Tensor, sweep: Sweep) -> Tensor:
    """1 - total / whole of every sample [n], differentiable once in s [n, C]."""
    if s.requires_grad and torch.is_grad_enabled():
        return _Found.apply(s, sweep)[0]
    return _swept(s, sweep, False)[0]


class _Found(torch.autograd.Function):
    @staticmethod
    def forward(s: Tensor, sweep: Sweep) -> tuple[Tensor, Tensor]:
        loss, slope = _swept(s, sweep, True)
        assert slope is not None
        return loss, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Sweep], output: tuple[Tensor, Tensor]) -> None:
        ctx.mark_non_differentiable(output[1])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(inputs[0], output[1])

    @staticmethod
    def backward(ctx: Any, *upstreams: Any) -> Any:
        upstream, _ = upstreams
        if upstream is None:
            return None, None
        s, slope = ctx.saved_tensors
        gradient = upstream.unsqueeze(1) * slope
        return _Once.apply(gradient, s) if torch.is_grad_enabled() else gradient, None


class _Once(torch.autograd.Function):
    """A gradient whose own derivative is unknown: asking for it must not give 0 in silence."""

    @staticmethod
    def forward(gradient: Tensor, s: Tensor) -> Tensor:
        return gradient

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *upstreams: Any) -> Any:
        what = "this way of computing the rank loss can be differentiated once"
        raise SpoliaError(what, where="ranking loss", mend="implementation `broadcast` can be differentiated twice")


def _swept(s: Tensor, sweep: Sweep, slopes: bool) -> tuple[Tensor, Tensor | None]:
    """Loss [n] and its slope in s [n, C]. Autocast would do the sums in half precision: it is off within."""
    with torch.no_grad(), torch.autocast(s.device.type, enabled=False):
        sums, whole = sweep(s.detach(), slopes)
        if sums.slope is None:
            return finished(sums.total, whole), None
        whole = torch.as_tensor(whole, dtype=s.dtype, device=s.device).expand(len(s))
        share = torch.where(whole > 0, -1 / whole, 0.0)
        return finished(sums.total, whole), sums.slope.mul_(share.unsqueeze(1))
