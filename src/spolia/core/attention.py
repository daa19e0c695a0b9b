"""Keys and values put before those of an attention, from outside the module that has it (prefix tuning).

    with Prefixed() as inside:
        inside.now = keys, values            # [n, prefixes, width] or [prefixes, width]
        block(x)                             # its attention sees them beside its own

Li & Liang 2021, arXiv 2101.00190. It works on whatever calls torch's scaled_dot_product_attention, with heads as
[n, heads, tokens, width / heads].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Prefixed(TorchFunctionMode):
    """`now`: what goes before keys and values of the attentions that run; None: nothing. `met`: attentions that got it."""

    def __init__(self) -> None:
        super().__init__()
        self.now: tuple[Tensor, Tensor] | None = None
        self.met = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is not torch.nn.functional.scaled_dot_product_attention or self.now is None:
            return func(*args, **kwargs)
        named = dict(zip(("query", "key", "value", "attn_mask"), args, strict=False)) | kwargs
        prefix, self.met = self.now, self.met + 1
        for name, more in zip(("key", "value"), prefix, strict=True):
            named[name] = _joined(named[name], more)
        if named.get("attn_mask") is not None:
            named["attn_mask"] = seen_before(named["attn_mask"], prefix[0].shape[-2])
        return func(*args[4:], **named)


def seen_before(mask: Tensor, count: int) -> Tensor:
    """An attention mask [..., keys] with `count` keys more in front, seen by every query."""
    return torch.nn.functional.pad(mask, (count, 0), value=mask.dtype == torch.bool)


def _joined(own: Tensor, more: Tensor) -> Tensor:
    """[n, heads, tokens, d] with the prefixes [n, p, heads d] before its tokens."""
    n, heads, _, d = own.shape
    if more.dim() == 2:
        more = more.expand(n, -1, -1)
    more = more.reshape(n, -1, heads, d).transpose(1, 2).to(own.dtype)
    return torch.cat([more, own], 2)
