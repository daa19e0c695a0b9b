"""A vision transformer small enough to train on a processor, its tensors called as timm calls them.

Dosovitskiy et al., An image is worth 16x16 words, ICLR 2021, arXiv 2010.11929; normalisation before each part.

    x <- [class token, patches] + positions,    x <- x + attention(norm(x)),  x <- x + mlp(norm(x))  depth times
    feature = norm(x) of the class token, or its mean over the patches
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Generator, Tensor, nn

from spolia.errors import SpoliaError

MODEL_TYPE = "spolia_vit"
EPS = 1e-6  # of the norms, as in the paper's code


class ViT(nn.Module):
    """The encoder: images [batch, 3, size, size] to features [batch, width]. Weights are drawn from `generator` alone.

    `size` and `patch` in pixels. `pool`: the class token, or the mean over patches, without a class token.
    """

    def __init__(
        self,
        size: int = 32,
        patch: int = 8,
        width: int = 192,
        depth: int = 6,
        heads: int = 3,
        *,
        pool: Literal["token", "mean"] = "token",
        generator: Generator,
    ):
        super().__init__()
        if size % patch:
            mend = "choose a patch that divides the size"
            raise SpoliaError(f"images of {size} have no whole patches of {patch}", where="patch", mend=mend)
        if width % heads:
            mend = "choose a number that divides the width"
            raise SpoliaError(f"a width of {width} does not part into {heads} heads", where="heads", mend=mend)
        self.size, self.patch, self.width, self.depth, self.heads, self.pool = size, patch, width, depth, heads, pool
        patches = (size // patch) ** 2
        with torch.device("meta"):  # drawn below: the layers' own start would use the global generator
            if pool == "token":
                self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            self.pos_embed = nn.Parameter(torch.empty(1, patches + (pool == "token"), width))
            self.patch_embed = PatchEmbed(patch, width)
            self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
            self.norm = nn.LayerNorm(width, eps=EPS)
        self.to_empty(device="cpu")
        self._draw(generator)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)  # [batch, patches, width]
        if self.pool == "token":
            x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        x = x + self.pos_embed
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        return x[:, 0] if self.pool == "token" else x.mean(1)

    def config(self) -> dict[str, int | str]:
        """What config.json says beside the weights."""
        sizes: dict[str, int | str] = {"image_size": self.size, "patch_size": self.patch, "hidden_size": self.width}
        counts: dict[str, int | str] = {"num_hidden_layers": self.depth, "num_attention_heads": self.heads}
        return {"model_type": MODEL_TYPE, **sizes, **counts, "pool": self.pool}

    @torch.no_grad()
    def _draw(self, generator: Generator) -> None:
        """Matrices uniform as Glorot's, the token and the positions normal with 0.02, norms and biases as usual."""
        for name, parameter in self.named_parameters():
            if name in ("cls_token", "pos_embed"):
                parameter.normal_(std=0.02, generator=generator)
            elif parameter.dim() == 1:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            else:
                bound = math.sqrt(6 / (parameter.shape[0] + parameter[0].numel()))
                parameter.uniform_(-bound, bound, generator=generator)


class PatchEmbed(nn.Module):
    """Images [batch, 3, size, size] to patches [batch, patches, width], row by row."""

    def __init__(self, patch: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(3, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Block(nn.Module):
    """Attention and two linear layers, each beside a shortcut: [batch, tokens, width] to the same."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=EPS), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=EPS), Mlp(width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        parts = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        query, key, value = parts.permute(2, 0, 3, 1, 4).unbind()  # [batch, heads, tokens, width / heads]
        mixed = nn.functional.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).reshape(batch, tokens, width))


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(nn.functional.gelu(self.fc1(x)))
