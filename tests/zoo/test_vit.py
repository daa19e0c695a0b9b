from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from spolia.core.checkpoint import read_config, read_tensors, write_checkpoint
from spolia.errors import SpoliaError
from spolia.parts.network import Network
from spolia.parts.sites import find_sites
from spolia.zoo.vit import EPS, ViT


def build(seed: int = 0, pool: str = "token") -> ViT:
    return ViT(16, 8, 12, 2, 3, pool=pool, generator=torch.Generator().manual_seed(seed))


def photos(count: int = 2) -> Tensor:
    return torch.randn(count, 3, 16, 16, generator=torch.Generator().manual_seed(7))


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = build(0), build(0), build(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert all(p.isfinite().all() and not p.is_meta for p in one.parameters())
    bound = math.sqrt(6 / (12 + 36))
    assert 0.5 * bound < one.blocks[1].attn.qkv.weight.abs().max() <= bound
    assert torch.equal(one.norm.weight, torch.ones(12)) and torch.equal(one.blocks[0].mlp.fc1.bias, torch.zeros(48))


def test_the_names_are_timms():
    own = {f"norm{i}.{p}" for i in (1, 2) for p in ("weight", "bias")}
    own |= {f"{m}.{p}" for m in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2") for p in ("weight", "bias")}
    loose = {"cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
    shapes = {name: tuple(t.shape) for name, t in build().state_dict().items()}
    assert shapes.keys() == loose | {f"blocks.{i}.{name}" for i in range(2) for name in own}
    assert shapes["pos_embed"] == (1, 5, 12) and shapes["patch_embed.proj.weight"] == (12, 3, 8, 8)
    mean = build(pool="mean").state_dict()
    assert "cls_token" not in mean and mean["pos_embed"].shape == (1, 4, 12)


@pytest.mark.parametrize("pool", ["token", "mean"])
def test_the_formula(pool: str):
    """The same written out, token by token and head by head, in fp64."""
    model = build(3, pool).double()
    with torch.no_grad():
        for parameter in model.parameters():  # norms and biases other than one and zero
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel()))
    w = model.state_dict()
    x = photos().double()

    def norm(v: Tensor, name: str) -> Tensor:
        centred = v - v.mean()
        return centred / (centred.square().mean() + EPS).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]

    def dense(v: Tensor, name: str) -> Tensor:
        return w[f"{name}.weight"] @ v + w[f"{name}.bias"]

    def feature(image: Tensor) -> Tensor:
        corners = [(r, c) for r in (0, 8) for c in (0, 8)]
        kernel, bias = w["patch_embed.proj.weight"].flatten(1), w["patch_embed.proj.bias"]
        tokens = [kernel @ image[:, r : r + 8, c : c + 8].flatten() + bias for r, c in corners]
        tokens = [w["cls_token"][0, 0], *tokens] if pool == "token" else tokens
        tokens = [token + place for token, place in zip(tokens, w["pos_embed"][0], strict=True)]
        for block in ("blocks.0", "blocks.1"):
            asked = [dense(norm(t, f"{block}.norm1"), f"{block}.attn.qkv").view(3, 3, 4) for t in tokens]  # part, head
            mixed = []
            for query in asked:
                heads = []
                for h in range(3):
                    weights = torch.stack([query[0, h] @ key[1, h] / 2 for key in asked]).softmax(0)  # 2: root of 4
                    heads.append(sum(p * value[2, h] for p, value in zip(weights, asked, strict=True)))
                mixed.append(dense(torch.cat(heads), f"{block}.attn.proj"))
            tokens = [t + m for t, m in zip(tokens, mixed, strict=True)]
            inner = [dense(norm(t, f"{block}.norm2"), f"{block}.mlp.fc1") for t in tokens]
            gelu = [v * 0.5 * (1 + torch.erf(v / math.sqrt(2))) for v in inner]
            tokens = [t + dense(v, f"{block}.mlp.fc2") for t, v in zip(tokens, gelu, strict=True)]
        done = [norm(t, "norm") for t in tokens]
        return done[0] if pool == "token" else torch.stack(done).mean(0)

    wanted = torch.stack([feature(image) for image in x])
    torch.testing.assert_close(model(x), wanted, rtol=0, atol=1e-12)  # fp64, a few hundred sums


def test_every_weight_has_a_gradient():
    model = build()
    (model(photos()) @ torch.arange(12.0)).sum().backward()  # their squares add up to a constant
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_saved_model_comes_back(tmp_path: Path):
    model, other = build(0), build(1)
    folder = write_checkpoint(tmp_path / "vit", model.state_dict(), model.config())
    other.load_state_dict(read_tensors(folder))
    assert torch.equal(other(photos()), model(photos()))
    told = {"image_size": 16, "patch_size": 8, "hidden_size": 12, "num_hidden_layers": 2, "num_attention_heads": 3}
    assert read_config(folder) == {"model_type": "spolia_vit", **told, "pool": "token"}


def test_surgery_finds_its_blocks():
    sites = find_sites(Network(build()), photos(), "blocks")
    assert [(site.name, site.width, site.axis, site.inputs) for site in sites] == [
        ("blocks.0", 12, -1, 0),
        ("blocks.1", 12, -1, 0),
        ("", 12, -1, 0),
    ]


def test_sizes_that_do_not_part_are_told():
    with pytest.raises(SpoliaError, match="images of 30 have no whole patches of 8"):
        ViT(30, 8, generator=torch.Generator())
    with pytest.raises(SpoliaError, match="a width of 10 does not part into 3 heads"):
        ViT(16, 8, 10, 1, 3, generator=torch.Generator())
