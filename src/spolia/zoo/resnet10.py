"""ResNet-10 and -18 as few-shot papers have them on small images: a stem of stride 1, four stages, each but the first halving.

He et al., Deep residual learning for image recognition, CVPR 2016, arXiv 1512.03385; here with a 3 x 3 stem without pooling,
one (ResNet-10) or two (ResNet-18) blocks a stage, and a 1 x 1 convolution with norm as shortcut where the width changes.

    x <- relu(x' + norm(conv(relu(norm(conv(x))))))      x' is x, or the shortcut of it
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

from spolia.errors import SpoliaError
from spolia.zoo.mlp import linear

MODEL_TYPE = "spolia_resnet_small"
STAGES = 4


class SmallResNet(nn.Module):
    """Images [batch, channels, h, w] to logits [batch, classes]. Weights are drawn from `generator` alone.

    `depth`: 10 or 18; `width`: channels of the first stage, 64 in the papers. `features(x)`: [batch, 8 width].
    """

    def __init__(self, depth: int = 10, width: int = 64, classes: int = 5, *, channels: int = 3, generator: Generator):
        super().__init__()
        if depth not in (10, 18):
            raise SpoliaError(f"no such network has {depth} layers", where="depth", mend="choose 10 or 18")
        self.depth, self.width, self.channels = depth, width, channels
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            self.stem = nn.Sequential(nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
            widths, blocks = [width * 2**i for i in range(STAGES)], (depth - 2) // 8
            self.stages = nn.Sequential(
                *(
                    nn.Sequential(
                        *(Block(widths[max(0, i - (k == 0))], widths[i], 1 + (i > 0 and k == 0)) for k in range(blocks))
                    )
                    for i in range(STAGES)
                )
            )
        self.to_empty(device="cpu")
        self.head = linear(widths[-1], classes, generator)
        with torch.no_grad():
            for layer in self.modules():
                if isinstance(layer, nn.Conv2d):
                    layer.weight.normal_(std=math.sqrt(2 / layer.weight[0].numel()), generator=generator)
                elif isinstance(layer, nn.BatchNorm2d):
                    layer.reset_parameters()  # ones, zeros, and running statistics of nothing seen

    def features(self, x: Tensor) -> Tensor:
        return self.stages(self.stem(x).relu()).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        sizes: dict[str, int | str] = {"depth": self.depth, "width": self.width, "num_channels": self.channels}
        return {"model_type": MODEL_TYPE, **sizes, "num_labels": self.head.out_features}


class Block(nn.Module):
    """Two convolutions beside a shortcut: [batch, inputs, h, w] to [batch, width, h / stride, w / stride]."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1 or inputs != width:
            self.shortcut.append(nn.Conv2d(inputs, width, 1, stride, bias=False)).append(nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        made = self.norm2(self.conv2(self.norm1(self.conv1(x)).relu()))
        return (made + self.shortcut(x)).relu()
