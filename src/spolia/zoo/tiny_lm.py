"""A causal language model small enough to train on a processor: tokens in, logits of the next token out.

A decoder as GPT-2's (Radford et al., Language models are unsupervised multitask learners, 2019), normalisation before each
part, learned positions, the embedding as output matrix too.

    x <- embed(tokens) + positions,    x <- x + attention(norm(x)),  x <- x + mlp(norm(x))  depth times
    logits = norm(x) embed^T

No position sees what stands after it, so what a sequence is filled up with on its right changes nothing before it. With a
cache, tokens are read once: each call reads those that came after the last one's.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from spolia.core.keyvalues import KeyValues
from spolia.errors import SpoliaError

MODEL_TYPE = "spolia_tiny_lm"


class TinyLM(nn.Module):
    """Token ids [batch, length] to logits [batch, length, vocabulary]. Weights are drawn from `generator` alone.

    `context`: the longest sequence, in tokens.
    """

    def __init__(
        self,
        vocabulary: int,
        context: int = 128,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        *,
        generator: Generator,
    ):
        super().__init__()
        if width % heads:
            mend = "choose a number that divides the width"
            raise SpoliaError(f"a width of {width} does not part into {heads} heads", where="heads", mend=mend)
        self.vocabulary, self.context, self.width, self.depth, self.heads = vocabulary, context, width, depth, heads
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            self.embed = nn.Embedding(vocabulary, width)
            self.positions = nn.Embedding(context, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
            self.norm = nn.LayerNorm(width)
        self.to_empty(device="cpu")
        self._draw(generator)

    def forward(self, tokens: Tensor, cache: KeyValues | None = None) -> Tensor:
        """Of a cache: the tokens read before it stand before these, and logits are of the last alone [batch, 1, …]."""
        new = tokens.shape[1]
        length = new if cache is None else cache.length + new
        if length > self.context:
            what = f"a sequence of {length} tokens, for a context of {self.context}"
            raise SpoliaError(what, where="tiny_lm", mend="cut it into windows, or make a model of longer context")
        if cache is None:
            x = self.embed(tokens) + self.positions.weight[:length]  # [batch, length, width]
            for block in self.blocks:
                x = block(x)
            return nn.functional.linear(self.norm(x), self.embed.weight)
        cache.reserve(new)
        mask = cache.mask(new, tokens.device)
        x = self.embed(tokens) + self.positions(cache.places(new, tokens.device))  # [batch, new, width]
        for layer, block in enumerate(self.blocks):
            x = block(x, cache, layer, mask)
        return nn.functional.linear(self.norm(x[:, -1:]), self.embed.weight)

    def cache(self, rows: int, positions: int) -> KeyValues:
        """An empty cache for `rows` sequences of up to `positions` tokens."""
        size = self.width // self.heads
        return KeyValues(positions, self.depth, rows, self.heads, size, self.embed.weight.detach())

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        sizes: dict[str, int | str] = {"vocab_size": self.vocabulary, "max_position_embeddings": self.context}
        counts: dict[str, int | str] = {"num_hidden_layers": self.depth, "num_attention_heads": self.heads}
        return {"model_type": MODEL_TYPE, "hidden_size": self.width, **sizes, **counts}

    @torch.no_grad()
    def _draw(self, generator: Generator) -> None:
        """Matrices normal with 0.02, those that end a shortcut smaller by sqrt(2 depth); norms and biases as usual."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                ends = name.endswith(("proj.weight", "fc2.weight"))
                parameter.normal_(std=0.02 / (2 * self.depth) ** 0.5 if ends else 0.02, generator=generator)


class Block(nn.Module):
    """Causal attention and two linear layers, each beside a shortcut: [batch, length, width] to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, cache: KeyValues | None = None, layer: int = 0, mask: Tensor | None = None) -> Tensor:
        x = x + self._attention(self.norm1(x), cache, layer, mask)
        return x + self.fc2(nn.functional.gelu(self.fc1(self.norm2(x))))

    def _attention(self, x: Tensor, cache: KeyValues | None, layer: int, mask: Tensor | None) -> Tensor:
        batch, length, width = x.shape
        parts = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()  # [batch, heads, length, width / heads]
        if cache is not None:
            key, value = cache.write(layer, key, value)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=cache is None)
        return self.proj(mixed.transpose(1, 2).reshape(batch, length, width))
