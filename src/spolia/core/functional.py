"""Running a module with other weights than its own, differentiable in them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn


class _Applied(nn.Module):
    """A function of a module as a module itself, so that functional_call reaches the weights inside."""

    def __init__(self, module: nn.Module, function: Callable[..., Tensor]):
        super().__init__()
        self.module, self.function = module, function

    def forward(self, *arguments: Any) -> Tensor:
        return self.function(self.module, *arguments)


def call(module: nn.Module, weights: Mapping[str, Tensor], function: Callable[..., Tensor], *arguments: Any) -> Tensor:
    """`function(module, *arguments)` with `weights` (parameters and buffers by name) in place of the module's own.

    Names left out keep the module's value. The module is as it was afterwards, whatever happens; tied tensors that are
    given once stand for all their names.
    """
    named = {f"module.{name}": tensor for name, tensor in weights.items()}
    return torch.func.functional_call(_Applied(module, function), named, arguments)
