"""Residual networks for images of 32 x 32: ResNet-20, -32, -56 of CIFAR, any depth 6 n + 2 and any width.

He et al., Deep residual learning for image recognition, CVPR 2016, arXiv 1512.03385, section 4.2: a 3 x 3 stem, three stages
of n blocks with 16, 32, 64 channels, the mean over all places, a linear head. A shortcut that halves the map takes every
second place and fills the new channels with zeros, half of them before and half behind (option A): it has no weights.

    x <- relu(x' + norm(conv(relu(norm(conv(x))))))      x' is x, or the shortcut of it

Tensors are called as in akamaster/pytorch_resnet_cifar10, so that its weights load as they are.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Generator, Tensor, nn

from spolia.core.checkpoint import read_tensors
from spolia.errors import SpoliaError
from spolia.zoo.mlp import linear

MODEL_TYPE = "spolia_resnet_cifar"
STAGES = 3


class ResNet(nn.Module):
    """Images [batch, 3, h, w] to logits [batch, classes]. Weights are drawn from `generator` alone.

    `depth`: 6 n + 2 layers; `width`: channels of the first stage. `features(x)` are what the head sees, [batch, 4 width].
    """

    def __init__(self, depth: int = 20, width: int = 16, classes: int = 10, *, generator: Generator):
        super().__init__()
        if depth < 8 or depth % 6 != 2:
            mend = "choose 6 n + 2: 8, 14, 20, 32, 44, 56, 110"
            raise SpoliaError(f"no such network has {depth} layers", where="depth", mend=mend)
        if width < 2 or width % 2:
            raise SpoliaError(f"is {width}", where="width", mend="choose an even number of channels")
        self.depth, self.width, self.classes = depth, width, classes
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            self.conv1, self.bn1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
            self.layer1 = stage(width, width, depth // 6, 1)
            self.layer2 = stage(width, 2 * width, depth // 6, 2)
            self.layer3 = stage(2 * width, 4 * width, depth // 6, 2)
        self.to_empty(device="cpu")
        self.linear = linear(4 * width, classes, generator)
        self._draw(generator)

    def features(self, x: Tensor) -> Tensor:
        x = self.bn1(self.conv1(x)).relu()
        return self.layer3(self.layer2(self.layer1(x))).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.features(x))

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        sizes: dict[str, int | str] = {"depth": self.depth, "width": self.width, "num_labels": self.classes}
        return {"model_type": MODEL_TYPE, **sizes}

    @torch.no_grad()
    def _draw(self, generator: Generator) -> None:
        """Kernels at He's scale for rectified inputs; norms as usual."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d):
                layer.weight.normal_(std=math.sqrt(2 / layer.weight[0].numel()), generator=generator)
            elif isinstance(layer, nn.BatchNorm2d):
                layer.reset_parameters()  # ones, zeros, and running statistics of nothing seen


class Block(nn.Module):
    """Two convolutions beside a shortcut: [batch, inputs, h, w] to [batch, width, h / stride, w / stride]."""

    def __init__(self, inputs: int, width: int, stride: int):
        super().__init__()
        self.stride, self.more = stride, width - inputs
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        made = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu()))
        if self.stride > 1 or self.more:
            half = self.more // 2
            x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, half, self.more - half))
        return (made + x).relu()


def stage(inputs: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """`blocks` blocks, the first of which may halve the map."""
    return nn.Sequential(*(Block(inputs if i == 0 else width, width, stride if i == 0 else 1) for i in range(blocks)))


def read(file: str | os.PathLike[str], *, classes: int | None = None) -> ResNet:
    """The network whose weights stand in `file`, in eval mode: its depth and width are read off them.

    A folder with `model.safetensors`, or one safetensors file. SpoliaError where they are of another network, or of another
    number of classes than `classes`.
    """
    state = read_tensors(Path(file))
    made = fitting(state, str(file))
    if classes is not None and made.classes != classes:
        what = f"its head knows {made.classes} classes, {classes} are asked for"
        raise SpoliaError(what, where=str(file), mend="give weights of the same classes")
    return made


def fitting(state: Mapping[str, Tensor], where: str) -> ResNet:
    """The network that `state` is of, with these weights, in eval mode."""
    blocks = {name.split(".")[1] for name in state if name.startswith("layer1.")}
    ours = {"conv1.weight", "linear.weight", "layer3.0.conv1.weight"} <= state.keys() and blocks
    if not ours:
        mend = "give weights whose tensors are called conv1, bn1, layer1 … layer3, linear"
        raise SpoliaError("these are not the weights of a CIFAR ResNet", where=where, mend=mend)
    depth, width, classes = 6 * len(blocks) + 2, len(state["conv1.weight"]), len(state["linear.weight"])
    made = ResNet(depth, width, classes, generator=torch.Generator())
    own = made.state_dict()
    for name in [*(n for n in own if not n.endswith("num_batches_tracked")), *(n for n in state if n not in own)]:
        if name not in own or name not in state or state[name].shape != own[name].shape:
            what = f"its tensor `{name}` is not that of a ResNet-{depth} of width {width}"
            raise SpoliaError(what, where=where, mend="get a sound copy")
    made.load_state_dict({name: state.get(name, own[name]) for name in own})
    return made.eval()
