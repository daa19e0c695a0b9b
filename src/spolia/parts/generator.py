"""A generator of images: noise, and if wanted a class, to pictures in 0 … 1.

Fang et al., Up to 100x faster data-free knowledge distillation, AAAI 2022, arXiv 2112.06253, as FREE and its like take it:

    x <- norm(W z)                              [2 width, size / 4, size / 4]
    x <- leaky(norm(conv3x3(up2(x))))           twice, with 2 width and width channels
    image = sigmoid(conv3x3(x))

Conditional: half of the first channels come from the noise, half from the class as one-hot (Hu et al., arXiv 2311.14756).
Norms use the statistics of the batch at hand, always: running ones would mix the experts that it is fitted to.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from spolia.core.norms import BatchNorm
from spolia.errors import SpoliaError

SPREAD = 0.02  # standard deviation of fresh weights
_SLOPE = 0.2  # of the leaky relu


class ImageGenerator(nn.Module):
    """Noise z [n, latent] and, where `classes` is above 0, labels y [n] to images [n, c, h, w]. `shape`: (c, h, w).

    Weights are drawn from `generator` alone.
    """

    def __init__(
        self, shape: tuple[int, int, int], *, classes: int = 0, latent: int = 256, width: int = 64, generator: Generator
    ):
        super().__init__()
        channels, height, width_px = shape
        if height % 4 or width_px % 4:
            what = f"images of {height} x {width_px} are not two doublings of a smaller one"
            raise SpoliaError(what, where="shape", mend="choose sides that 4 divides; experts resize images themselves")
        self.shape, self.classes, self.latent, self.width = tuple(shape), classes, latent, width
        self.start = (2 * width, height // 4, width_px // 4)
        size = self.start[0] * self.start[1] * self.start[2]
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            self.noise = nn.Linear(latent, size // 2 if classes else size)
            self.label = nn.Linear(classes, size // 2) if classes else None
            self.norm1 = BatchNorm(2 * width)
            self.conv1, self.norm2 = nn.Conv2d(2 * width, 2 * width, 3, padding=1, bias=False), BatchNorm(2 * width)
            self.conv2, self.norm3 = nn.Conv2d(2 * width, width, 3, padding=1, bias=False), BatchNorm(width)
            self.conv3 = nn.Conv2d(width, channels, 3, padding=1)
        self.to_empty(device="cpu")
        self.draw(generator)

    def forward(self, z: Tensor, y: Tensor | None = None) -> Tensor:
        x = self.noise(z).unflatten(1, (-1, *self.start[1:]))
        if self.label is not None:
            assert y is not None  # a conditional generator is told the class
            places = torch.arange(self.classes, device=y.device)
            hot = (y.unsqueeze(1) == places).to(z.dtype)  # one_hot looks at values, which vmap does not allow
            x = torch.cat([x, self.label(hot).unflatten(1, (-1, *self.start[1:]))], 1)
        x = _doubled(self.norm1(x))
        x = _doubled(nn.functional.leaky_relu(self.norm2(self.conv1(x)), _SLOPE))
        x = nn.functional.leaky_relu(self.norm3(self.conv2(x)), _SLOPE)
        return torch.sigmoid(self.conv3(x))

    @torch.no_grad()
    def draw(self, generator: Generator) -> None:
        """Begin anew: weights N(0, 0.02), scales of norms N(1, 0.02), biases 0."""
        for layer in self.modules():
            if isinstance(layer, nn.Conv2d | nn.Linear | BatchNorm) and layer.weight is not None:
                mean = 1.0 if isinstance(layer, BatchNorm) else 0.0
                layer.weight.normal_(mean, SPREAD, generator=generator)
                if layer.bias is not None:
                    layer.bias.zero_()
            if isinstance(layer, BatchNorm):  # never used: the batch's own statistics are
                for buffer in layer.buffers():
                    buffer.zero_()


def _doubled(x: Tensor) -> Tensor:
    """Every pixel four times: [n, c, h, w] to [n, c, 2 h, 2 w]."""
    return nn.functional.interpolate(x, scale_factor=2, mode="nearest")
