"""A residual MLP small enough to train in a second, with one linear head per task kept apart from it.

The encoder is what experts fine-tune and what is merged; the heads are fitted together with the base and then stay
as they are, as the text heads of CLIP do in the merging papers.

    x <- x + gelu(norm(W x + b)),   three times at width 64
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

MODEL_TYPE = "spolia_mlp"


class ResidualMLP(nn.Module):
    """The encoder: inputs [batch, width] to features [batch, width]. Weights are drawn from `generator` alone."""

    def __init__(self, width: int = 64, depth: int = 3, *, generator: Generator):
        super().__init__()
        self.width, self.depth = width, depth
        self.layers = nn.ModuleList(linear(width, width, generator) for _ in range(depth))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(depth))
        self.blocks = nn.ModuleList(nn.Identity() for _ in range(depth))  # where the state after a block can be hooked

    def forward(self, x: Tensor) -> Tensor:
        for layer, norm, block in zip(self.layers, self.norms, self.blocks, strict=True):
            x = block(x + nn.functional.gelu(norm(layer(x))))
        return x

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        return {"model_type": MODEL_TYPE, "width": self.width, "depth": self.depth}


def heads(tasks: Iterable[str], width: int = 64, classes: int = 10, *, generator: Generator) -> nn.ModuleDict:
    """One linear layer per task, features [batch, width] to logits [batch, classes]."""
    return nn.ModuleDict({task: linear(width, classes, generator) for task in tasks})


def linear(inputs: int, outputs: int, generator: Generator) -> nn.Linear:
    """PyTorch's own initial scale, uniform within 1 / sqrt(inputs), without the global generator."""
    layer = skip_init(nn.Linear, inputs, outputs)
    assert isinstance(layer, nn.Linear)
    bound = 1 / math.sqrt(inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
