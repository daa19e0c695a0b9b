"""Conv4, the usual network of few-shot learning: four blocks of convolution, norm, relu and pooling, and a linear head.

Vinyals et al., Matching networks for one shot learning, NeurIPS 2016, arXiv 1606.04080; with 32 or 64 channels as in Finn
et al., ICML 2017, arXiv 1703.03400.

    x <- pool2(relu(norm(conv3x3(x)))),  4 times,    logits = W flat(x) + b

A convolution before a norm over its outputs has no bias: it would have a gradient of exactly zero.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Generator, Tensor, nn

from spolia.errors import SpoliaError, did_you_mean
from spolia.zoo.mlp import linear

MODEL_TYPE = "spolia_conv4"
BLOCKS = 4
GROUPS = 8  # of channels in `group`
Norm = Literal["batch", "group", "layer", "instance", "none"]


class Conv4(nn.Module):
    """Images [batch, channels, size, size] to logits [batch, classes]. Weights are drawn from `generator` alone.

    `features(x)` are what the head sees, [batch, width * (size // 16)^2]. `layer` is one norm over all channels and
    places of an image.
    """

    def __init__(
        self,
        classes: int = 5,
        *,
        channels: int = 3,
        width: int = 64,
        size: int = 84,
        norm: Norm = "batch",
        generator: Generator,
    ):
        super().__init__()
        if size < 2**BLOCKS:
            what = f"images of {size} leave nothing after four poolings"
            raise SpoliaError(what, where="size", mend="give images of 16 pixels or more")
        if norm not in get_args(Norm):
            raise SpoliaError(f"`{norm}` is unknown", where="norm", mend=did_you_mean(norm, get_args(Norm)))
        if norm == "group" and width % GROUPS:
            what = f"a width of {width} does not part into {GROUPS} groups"
            raise SpoliaError(what, where="width", mend=f"choose a multiple of {GROUPS}")
        self.channels, self.width, self.size, self.norm = channels, width, size, norm
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            self.blocks = nn.Sequential(*(block(channels if i == 0 else width, width, norm) for i in range(BLOCKS)))
        self.to_empty(device="cpu")
        self.head = linear(width * (size // 2**BLOCKS) ** 2, classes, generator)
        self._draw(generator)

    def features(self, x: Tensor) -> Tensor:
        return self.blocks(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        sizes: dict[str, int | str] = {"image_size": self.size, "num_channels": self.channels}
        sizes |= {"hidden_size": self.width, "num_labels": self.head.out_features}
        return {"model_type": MODEL_TYPE, **sizes, "norm": self.norm}

    @torch.no_grad()
    def _draw(self, generator: Generator) -> None:
        """Kernels at He's scale for rectified inputs; norms and biases as usual."""
        for layer in self.blocks.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(std=math.sqrt(2 / layer.weight[0].numel()), generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
            elif isinstance(layer, nn.BatchNorm2d | nn.InstanceNorm2d | nn.GroupNorm):
                layer.reset_parameters()  # ones, zeros, and running statistics of nothing seen


def block(inputs: int, width: int, norm: Norm) -> nn.Sequential:
    """[batch, inputs, h, w] to [batch, width, h // 2, w // 2]."""
    made: dict[str, nn.Module] = {"conv": nn.Conv2d(inputs, width, 3, padding=1, bias=norm == "none")}
    if norm == "batch":
        made["norm"] = nn.BatchNorm2d(width)
    elif norm == "instance":
        made["norm"] = nn.InstanceNorm2d(width, affine=True)
    elif norm != "none":
        made["norm"] = nn.GroupNorm(GROUPS if norm == "group" else 1, width)
    made |= {"relu": nn.ReLU(), "pool": nn.MaxPool2d(2)}
    layers = nn.Sequential()
    for name, layer in made.items():
        layers.add_module(name, layer)
    return layers
