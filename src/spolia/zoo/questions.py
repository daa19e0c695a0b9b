"""Generators of queries: noise to what becomes an image, before the function that brings it into range.

The last layer is a batch norm without parameters: what comes out has mean 0 and deviation 1 over the batch in every channel,
which keeps the images from going dark or white. All norms go by the batch at hand, so images are made many at a time.

Truong et al., Data-Free Model Extraction, CVPR 2021, arXiv 2011.14779, for the convolutional one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils import skip_init

from spolia.zoo.mlp import linear

_SLOPE = 0.2  # of leaky ReLU below zero


class FlatQuestions(nn.Module):
    """Noise [n, latent] to inputs [n, *shape] of few numbers: two hidden layers of `width`."""

    def __init__(self, shape: Sequence[int], latent: int = 32, width: int = 128, *, generator: Generator):
        super().__init__()
        self.shape, self.latent, size = tuple(shape), latent, math.prod(shape)
        layers: list[nn.Module] = []
        for inputs in (latent, width):
            layers += [linear(inputs, width, generator), _norm1(width), nn.LeakyReLU(_SLOPE)]
        self.layers = nn.Sequential(*layers, linear(width, size, generator), _norm1(size, affine=False))

    def forward(self, z: Tensor) -> Tensor:
        return self.layers(z).view(len(z), *self.shape)


class ImageQuestions(nn.Module):
    """Noise [n, latent] to images [n, channels, side, side]: grown twofold twice, and cut where side is no multiple of 4."""

    def __init__(self, channels: int = 3, side: int = 32, latent: int = 256, width: int = 128, *, generator: Generator):
        super().__init__()
        self.latent, self.width, self.side, self.start = latent, width, side, math.ceil(side / 4)
        self.first = linear(latent, width * self.start**2, generator)
        self.grown = nn.Sequential(
            _norm2(width),
            nn.Upsample(scale_factor=2),
            _conv(width, width, generator), _norm2(width), nn.LeakyReLU(_SLOPE),
            nn.Upsample(scale_factor=2),
            _conv(width, width // 2, generator), _norm2(width // 2), nn.LeakyReLU(_SLOPE),
            _conv(width // 2, channels, generator), _norm2(channels, affine=False),
        )  # fmt: skip

    def forward(self, z: Tensor) -> Tensor:
        return self.grown(self.first(z).view(len(z), self.width, self.start, self.start))[..., : self.side, : self.side]


def inked(v: Tensor) -> Tensor:
    """sigmoid(3 v - 1): 0 … 1, more of it paper than ink."""
    return torch.sigmoid(3 * v - 1)


def coloured(v: Tensor) -> Tensor:
    """(1 + tanh v) / 2: 0 … 1."""
    return (1 + torch.tanh(v)) / 2


def _norm1(width: int, *, affine: bool = True) -> nn.BatchNorm1d:
    return nn.BatchNorm1d(width, affine=affine, track_running_stats=False)


def _norm2(width: int, *, affine: bool = True) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(width, affine=affine, track_running_stats=False)


def _conv(inputs: int, outputs: int, generator: Generator) -> nn.Conv2d:
    """3 x 3 in PyTorch's own initial scale, without the global generator."""
    layer = skip_init(nn.Conv2d, inputs, outputs, 3, padding=1)
    assert isinstance(layer, nn.Conv2d)
    bound = 1 / math.sqrt(inputs * 9)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.uniform_(-bound, bound, generator=generator)
    return layer
