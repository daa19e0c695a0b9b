from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from spolia.core.checkpoint import write_checkpoint
from spolia.errors import SpoliaError
from spolia.zoo.resnet import Block, ResNet, fitting, read
from spolia.zoo.small import SmallNet

DATA = Path(os.environ.get("SPOLIA_DATA", "nowhere"))


def build(depth: int = 8, width: int = 4, seed: int = 0) -> ResNet:
    return ResNet(depth, width, 5, generator=torch.Generator().manual_seed(seed))


def photos(size: int = 32) -> Tensor:
    return torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(7))


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = build(), build(), build(seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), same.state_dict().values(), strict=True))
    assert not torch.equal(one.layer1[0].conv1.weight, other.layer1[0].conv1.weight)
    assert all(t.isfinite().all() and not t.is_meta for t in one.state_dict().values())
    one(photos()).square().sum().backward()
    assert [name for name, p in one.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize(("depth", "millions"), [(20, 0.27), (32, 0.46), (56, 0.85)])
def test_the_published_sizes(depth: int, millions: float):
    """He et al. 2016, table 6."""
    net = ResNet(depth, generator=torch.Generator())
    assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(millions, abs=0.006)
    layers = [m for m in net.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == depth


def test_sizes_and_features():
    net = build().eval()
    assert net(photos()).shape == (3, 5) and net.features(photos()).shape == (3, 16)
    assert net.layer3(net.layer2(net.layer1(torch.zeros(1, 4, 32, 32)))).shape == (1, 16, 8, 8)
    assert torch.equal(net.linear(net.features(photos())), net(photos()))
    assert net(photos(28)).shape == (3, 5)


def test_a_shortcut_without_weights():
    """What the convolutions add is switched off: every second place stays, new channels are zero on both sides."""
    block = Block(2, 6, 2).eval()
    nn.init.zeros_(block.bn2.weight)
    x = torch.rand(1, 2, 6, 6)
    made = block(x)
    assert torch.equal(made[:, 2:4], x[:, :, ::2, ::2])
    assert not made[:, :2].any() and not made[:, 4:].any()


def test_weights_are_read_back(tmp_path: Path):
    net = build().eval()
    write_checkpoint(tmp_path / "net", net.state_dict(), net.config())
    again = read(tmp_path / "net", classes=5)
    assert (again.depth, again.width, again.training) == (8, 4, False)
    assert torch.equal(again(photos()), net(photos()))
    with pytest.raises(SpoliaError, match="5 classes, 10"):
        read(tmp_path / "net", classes=10)


def test_other_weights_are_refused():
    state = dict(build().state_dict())
    with pytest.raises(SpoliaError, match="not the weights of a CIFAR ResNet"):
        fitting({"weight": torch.zeros(2)}, "file")
    with pytest.raises(SpoliaError, match=r"`layer1\.0\.bn1\.bias`"):
        fitting({name: t for name, t in state.items() if name != "layer1.0.bn1.bias"}, "file")
    with pytest.raises(SpoliaError, match="`extra`"):
        fitting(state | {"extra": torch.zeros(1)}, "file")
    without = {name: t for name, t in state.items() if not name.endswith("num_batches_tracked")}
    assert fitting(without, "file").depth == 8  # older files do not count batches
    with pytest.raises(SpoliaError, match="6 n"):
        ResNet(18, generator=torch.Generator())
    with pytest.raises(SpoliaError, match="even"):
        ResNet(8, 3, generator=torch.Generator())


@pytest.mark.slow
@pytest.mark.skipif(not (DATA / "cifar10.npz").is_file(), reason="SPOLIA_DATA names no folder with cifar10.npz")
@pytest.mark.parametrize("depth", [20, 56])
def test_published_weights_do_what_they_did(depth: int):
    """On 100 lossless test images: 91.5 and 92.6 % of all 1,000; three deviations of 100 draws are 8 points."""
    from spolia.data.images import normalised, packed_file, read_part

    part = read_part(packed_file("cifar10", DATA), "test", 100)
    net = read(DATA / f"resnet{depth}_cifar10.safetensors", classes=10)
    with torch.no_grad():
        found = net(normalised(torch.from_numpy(part.pixels))).argmax(1)
    assert float((found == torch.from_numpy(part.labels)).double().mean()) > 0.83


@pytest.mark.parametrize("kind", ["mlp", "conv"])
def test_small_nets(kind: str):
    one, same, other = (SmallNet(kind, 6, generator=torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))  # type: ignore[arg-type]
    x = torch.rand(5, 64, generator=torch.Generator().manual_seed(0))
    assert one(x).shape == (5, 10) and torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))
    features = one.blocks(x.view(-1, 1, 8, 8) if kind == "conv" else x)
    assert features.shape == ((5, 12, 2, 2) if kind == "conv" else (5, 6))
    one(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in one.parameters())
