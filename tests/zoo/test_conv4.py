from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spolia.core.checkpoint import read_config, read_tensors, write_checkpoint
from spolia.errors import SpoliaError
from spolia.zoo.conv4 import Conv4

NORMS = ["batch", "group", "layer", "instance", "none"]


def build(seed: int = 0, norm: str = "batch", size: int = 32, channels: int = 3) -> Conv4:
    generator = torch.Generator().manual_seed(seed)
    return Conv4(5, channels=channels, width=8, size=size, norm=norm, generator=generator)  # type: ignore[arg-type]


def photos(size: int = 32, channels: int = 3) -> Tensor:
    return torch.randn(4, channels, size, size, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("norm", NORMS)
def test_weights_come_from_the_generator_alone(norm: str):
    before = torch.get_rng_state()
    one, same, other = build(0, norm), build(0, norm), build(1, norm)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.blocks[0].conv.weight, other.blocks[0].conv.weight)
    assert all(t.isfinite().all() and not t.is_meta for t in one.state_dict().values())
    assert (one.blocks[0].conv.bias is None) == (norm != "none")
    one(photos()).square().sum().backward()
    assert [name for name, p in one.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("size", "places"), [(16, 1), (28, 1), (32, 4), (84, 25)])
def test_sizes(size: int, places: int):
    net = build(size=size, channels=1)
    assert net.features(photos(size, 1)).shape == (4, 8 * places) and net(photos(size, 1)).shape == (4, 5)
    assert torch.equal(net.head(net.features(photos(size, 1))), net(photos(size, 1)))


def test_the_published_size():
    """Finn et al.: 64 channels, Omniglot; convolutions without their idle biases."""
    net = Conv4(5, channels=1, width=64, size=28, generator=torch.Generator())
    assert sum(p.numel() for p in net.parameters()) == 9 * 64 + 3 * 9 * 64 * 64 + 4 * 2 * 64 + 64 * 5 + 5


def test_the_formula():
    """The first block written out in fp64, with statistics of the batch."""
    net, x = build().double(), photos().double()
    first = net.blocks[0]
    padded = nn.functional.pad(x, (1, 1, 1, 1))
    patches = padded.unfold(2, 3, 1).unfold(3, 3, 1)  # [batch, channels, h, w, 3, 3]
    made = torch.einsum("nchwij,ocij->nohw", patches, first.conv.weight)
    made = (made - made.mean((0, 2, 3), keepdim=True)) / (
        made.var((0, 2, 3), unbiased=False, keepdim=True) + 1e-5
    ).sqrt()
    wanted = made.relu().unfold(2, 2, 2).unfold(3, 2, 2).amax((-1, -2))
    torch.testing.assert_close(first(x), wanted, rtol=0, atol=1e-12)  # fp64, sums of 27


def test_one_norm_an_image_and_one_a_channel():
    x = 5 + 3 * photos()
    whole, apart = build(norm="layer").blocks[0], build(norm="instance").blocks[0]
    assert whole[:2](x).mean((1, 2, 3)).abs().max() < 1e-5  # fp32
    assert apart[:2](x).mean((2, 3)).abs().max() < 1e-5
    assert build(norm="group").blocks[0].norm.num_groups == 8


def test_a_saved_model_comes_back(tmp_path: Path):
    model, other = build(0), build(1)
    folder = write_checkpoint(tmp_path / "conv4", model.state_dict(), model.config())
    other.load_state_dict(read_tensors(folder))
    assert torch.equal(other(photos()), model(photos()))
    sizes = {"image_size": 32, "num_channels": 3, "hidden_size": 8, "num_labels": 5}
    assert read_config(folder) == {"model_type": "spolia_conv4", **sizes, "norm": "batch"}


def test_sizes_that_do_not_fit_are_told():
    with pytest.raises(SpoliaError, match="images of 15 leave nothing"):
        build(size=15)
    with pytest.raises(SpoliaError, match="did you mean `batch`"):
        build(norm="bach")
    with pytest.raises(SpoliaError, match="a width of 12 does not part into 8 groups"):
        Conv4(width=12, norm="group", generator=torch.Generator())
