"""SqueezeNet 1.0 without its classifier: a convolutional encoder of 0.74 M parameters, its tensors called as torchvision's.

Iandola et al., SqueezeNet: AlexNet-level accuracy with 50x fewer parameters, 2016, arXiv 1602.07360. It has no
normalisation layers, so nothing but weights is merged. The classifier's last convolution is left out: heads take its place.
"""

from __future__ import annotations

import math
import os
import zlib
from pathlib import Path
from zipfile import BadZipFile

import numpy as np
import torch
from torch import Generator, Tensor, nn

from spolia.errors import SpoliaError

MODEL_TYPE = "spolia_squeezenet"
WIDTH = 512  # of a feature
FIRES = {3: (96, 16, 64), 4: (128, 16, 64), 5: (128, 32, 128), 7: (256, 32, 128), 8: (256, 48, 192), 9: (384, 48, 192),
         10: (384, 64, 256), 12: (512, 64, 256)}  # place in `features`: inputs, squeezed, each of two expanded  # fmt: skip
POOLS = (2, 6, 11)


class SqueezeNet(nn.Module):
    """The encoder: images [batch, 3, h, w] to features [batch, 512], the mean over all places of the last map.

    h and w at least 21: a smaller image leaves nothing to pool. Weights are drawn from `generator` alone.
    """

    def __init__(self, *, generator: Generator):
        super().__init__()
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            layers: list[nn.Module] = [nn.Conv2d(3, 96, 7, 2), nn.ReLU()]
            for place in range(2, 13):
                layers.append(nn.MaxPool2d(3, 2, ceil_mode=True) if place in POOLS else Fire(*FIRES[place]))
            self.features = nn.Sequential(*layers)
        self.to_empty(device="cpu")
        with torch.no_grad():
            for parameter in self.parameters():
                if parameter.dim() == 1:
                    parameter.zero_()
                else:  # He's scale for rectified inputs
                    parameter.normal_(std=math.sqrt(2 / parameter[0].numel()), generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return self.features(x).mean((2, 3))

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        return {"model_type": MODEL_TYPE, "version": "1.0", "hidden_size": WIDTH}


class Fire(nn.Module):
    """Few channels by 1 x 1, then many by 1 x 1 and 3 x 3 side by side: [batch, inputs, h, w] to [batch, 2 expand, h, w]."""

    def __init__(self, inputs: int, squeeze: int, expand: int):
        super().__init__()
        self.squeeze = nn.Conv2d(inputs, squeeze, 1)
        self.expand1x1 = nn.Conv2d(squeeze, expand, 1)
        self.expand3x3 = nn.Conv2d(squeeze, expand, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.squeeze(x).relu()
        return torch.cat([self.expand1x1(x).relu(), self.expand3x3(x).relu()], 1)


def read_npz(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The encoder's tensors in an npz file of the whole network, in the encoder's order; the classifier's are left out.

    SpoliaError where the file cannot be read or is of another network.
    """
    try:
        with np.load(Path(file), allow_pickle=False) as held:
            found = {name: torch.from_numpy(held[name]) for name in held.files if name.startswith("features.")}
    except (OSError, ValueError, TypeError, EOFError, BadZipFile, zlib.error) as error:
        raise SpoliaError(f"cannot be read: {error}", where=str(file), mend="get a sound copy") from None
    own = SqueezeNet(generator=torch.Generator()).state_dict()
    for name in [*own, *(n for n in found if n not in own)]:
        if name not in found or name not in own or found[name].shape != own[name].shape:
            what = f"its tensor `{name}` is not SqueezeNet 1.0's"
            raise SpoliaError(what, where=str(file), mend="give the weights as torchvision names them")
    return {name: found[name].float() for name in own}
