"""A transmitter and a receiver learned together: transformer, few real numbers a token, noise, transformer.

    tokens -> encoder -> channel encoder -> [2 uses] reals a token, power 1 -> channel -> channel decoder -> decoder -> tokens

The shapes are DeepSC's (Xie et al. 2021): layers normalised after each part, positions by sines, the receiver reads out word
by word what its own decoder finds likeliest.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor, nn

_NARROW, _WIDE = 256, 512  # inner widths of the channel encoder and decoder, as published


class Transceiver(nn.Module):
    """Tokens 0 … V - 1, and V where a text begins. Weights are drawn from `generator` alone."""

    def __init__(
        self,
        vocabulary: int,
        uses: int = 8,
        width: int = 128,
        depth: int = 4,
        heads: int = 8,
        inner: int = 512,
        dropout: float = 0.1,
        *,
        generator: Generator,
    ):
        super().__init__()
        self.vocabulary, self.uses, self.width = vocabulary, uses, width
        shape = {"dim_feedforward": inner, "dropout": dropout, "batch_first": True}
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            self.source, self.target = nn.Embedding(vocabulary, width), nn.Embedding(vocabulary + 1, width)
            self.encoder = nn.ModuleList(nn.TransformerEncoderLayer(width, heads, **shape) for _ in range(depth))
            self.decoder = nn.ModuleList(nn.TransformerDecoderLayer(width, heads, **shape) for _ in range(depth))
            self.to_channel = nn.Sequential(nn.Linear(width, _NARROW), nn.ReLU(), nn.Linear(_NARROW, 2 * uses))
            self.from_channel = nn.Linear(2 * uses, width)
            self.mended = nn.Sequential(nn.ReLU(), nn.Linear(width, _WIDE), nn.ReLU(), nn.Linear(_WIDE, width))
            self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, vocabulary)
        self.to_empty(device="cpu")
        self._draw(generator)

    def send(self, tokens: Tensor) -> Tensor:
        """Tokens [N, T] to complex symbols [N, T uses], of mean energy 1 in every frame."""
        x = self._placed(self.source(tokens))
        for layer in self.encoder:
            x = layer(x)
        pairs = self.to_channel(x).unflatten(2, (self.uses, 2)).flatten(1, 2)  # [N, T uses, 2]
        energy = pairs.square().sum(2, keepdim=True).mean(1, keepdim=True)
        return torch.view_as_complex((pairs / energy.sqrt().clamp(min=1e-8)).contiguous())

    def heard(self, symbols: Tensor) -> Tensor:
        """Equalised symbols [N, T uses] to what the decoder attends to [N, T, width]."""
        reals = torch.view_as_real(symbols).flatten(1).unflatten(1, (-1, 2 * self.uses))
        x = self.from_channel(reals)
        return self.norm(x + self.mended(x))

    def read(self, heard: Tensor, before: Tensor) -> Tensor:
        """Logits [N, t, V] of each next token, after the tokens `before` [N, t], the first of which is V."""
        x = self._placed(self.target(before))
        mask = nn.Transformer.generate_square_subsequent_mask(before.shape[1], device=before.device, dtype=x.dtype)
        for layer in self.decoder:
            x = layer(x, heard, tgt_mask=mask, tgt_is_causal=True)
        return self.out(x)

    def after_start(self, tokens: Tensor) -> Tensor:
        """Tokens [N, t] with the start before them [N, t + 1]."""
        return nn.functional.pad(tokens, (1, 0), value=self.vocabulary)

    def _placed(self, x: Tensor) -> Tensor:
        length, width = x.shape[1:]
        rate = torch.exp(torch.arange(0, width, 2, device=x.device) * (-math.log(10000.0) / width))
        angle = torch.arange(length, device=x.device)[:, None] * rate
        places = torch.stack([angle.sin(), angle.cos()], dim=2).flatten(1)[:, :width]
        return x * math.sqrt(width) + places.to(x.dtype)

    @torch.no_grad()
    def _draw(self, generator: Generator) -> None:
        """Matrices by Glorot and Bengio's uniform; norms 1, biases 0."""
        for name, parameter in self.named_parameters():
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter, generator=generator)
            else:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
