"""Networks of a few thousand weights for images of 8 x 8: hidden layers of one width, or convolutions, and a linear head.

Two blocks of one kind:

    x <- relu(W x + b)                          twice, of flat images
    x <- pool2(relu(conv3x3(x)))                twice, with width and 2 width channels
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from spolia.zoo.mlp import linear

MODEL_TYPE = "spolia_small"
SIDE = 8  # pixels
Kind = Literal["mlp", "conv"]


class SmallNet(nn.Module):
    """Images [batch, 64] in rows to logits [batch, classes]. Weights are drawn from `generator` alone.

    `blocks.0` and `blocks.1` give features: [batch, width], or maps [batch, channels, side, side].
    """

    def __init__(self, kind: Kind = "mlp", width: int = 16, classes: int = 10, *, generator: Generator):
        super().__init__()
        self.kind, self.width, self.classes = kind, width, classes
        if kind == "mlp":
            sizes = ((SIDE * SIDE, width), (width, width))
            self.blocks = nn.Sequential(*(nn.Sequential(linear(i, o, generator), nn.ReLU()) for i, o in sizes))
            last = width
        else:
            sizes = ((1, width), (width, 2 * width))
            self.blocks = nn.Sequential(
                *(nn.Sequential(_conv(i, o, generator), nn.ReLU(), nn.MaxPool2d(2)) for i, o in sizes)
            )
            last = 2 * width * (SIDE // 4) ** 2
        self.head = linear(last, classes, generator)

    def forward(self, x: Tensor) -> Tensor:
        shown = x.view(-1, 1, SIDE, SIDE) if self.kind == "conv" else x
        return self.head(self.blocks(shown).flatten(1))

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        return {"model_type": MODEL_TYPE, "kind": self.kind, "width": self.width, "num_labels": self.classes}


def _conv(inputs: int, outputs: int, generator: Generator) -> nn.Conv2d:
    """PyTorch's own initial scale, without the global generator."""
    layer = skip_init(nn.Conv2d, inputs, outputs, 3, padding=1)
    assert isinstance(layer, nn.Conv2d)
    bound = 1 / math.sqrt(9 * inputs)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
