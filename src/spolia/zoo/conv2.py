"""Conv2: two blocks of Conv4, for images of 8 to 16 pixels a side.

x <- pool2(relu(norm(conv3x3(x)))),  2 times,    logits = W flat(x) + b
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from spolia.errors import SpoliaError
from spolia.zoo.conv4 import block
from spolia.zoo.mlp import linear

MODEL_TYPE = "spolia_conv2"
BLOCKS = 2


class Conv2(nn.Module):
    """Images [batch, channels, size, size] to logits [batch, classes]. Weights are drawn from `generator` alone.

    `features(x)` are what the head sees, [batch, width * (size // 4)^2].
    """

    def __init__(self, classes: int, *, channels: int = 1, width: int = 24, size: int = 8, generator: Generator):
        super().__init__()
        if size < 2**BLOCKS:
            what = f"images of {size} leave nothing after two poolings"
            raise SpoliaError(what, where="size", mend="give images of 4 pixels or more")
        self.channels, self.width, self.size = channels, width, size
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            self.blocks = nn.Sequential(*(block(channels if i == 0 else width, width, "batch") for i in range(BLOCKS)))
        self.to_empty(device="cpu")
        self.head = linear(width * (size // 2**BLOCKS) ** 2, classes, generator)
        with torch.no_grad():
            for layer in self.blocks.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.normal_(std=math.sqrt(2 / layer.weight[0].numel()), generator=generator)
                elif isinstance(layer, nn.BatchNorm2d):
                    layer.reset_parameters()  # ones, zeros, and running statistics of nothing seen

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        sizes: dict[str, int | str] = {"image_size": self.size, "num_channels": self.channels}
        return {"model_type": MODEL_TYPE, **sizes, "hidden_size": self.width, "num_labels": self.head.out_features}
