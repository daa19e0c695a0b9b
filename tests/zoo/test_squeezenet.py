from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from spolia.core.checkpoint import read_config, read_tensors, write_checkpoint
from spolia.errors import SpoliaError
from spolia.parts.network import Network
from spolia.parts.sites import find_sites
from spolia.zoo.squeezenet import Fire, SqueezeNet, read_npz

DATA = Path(os.environ.get("SPOLIA_DATA", "nowhere"))
FIRES = (3, 4, 5, 7, 8, 9, 10, 12)  # as torchvision numbers them


def build(seed: int = 0) -> SqueezeNet:
    return SqueezeNet(generator=torch.Generator().manual_seed(seed))


def photos(side: int = 32) -> torch.Tensor:
    return torch.randn(2, 3, side, side, generator=torch.Generator().manual_seed(7))


def test_weights_come_from_the_generator_alone():
    before = torch.get_rng_state()
    one, same, other = build(0), build(0), build(1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
    assert not torch.equal(one.features[0].weight, other.features[0].weight)
    assert all(p.isfinite().all() and not p.is_meta for p in one.parameters())


def test_the_names_and_sizes_are_torchvisions():
    shapes = {name: tuple(t.shape) for name, t in build().state_dict().items()}
    layers = ["features.0"]
    layers += [f"features.{i}.{part}" for i in FIRES for part in ("squeeze", "expand1x1", "expand3x3")]
    assert list(shapes) == [f"{layer}.{part}" for layer in layers for part in ("weight", "bias")]
    assert shapes["features.0.weight"] == (96, 3, 7, 7) and shapes["features.12.expand3x3.weight"] == (256, 64, 3, 3)
    # 1,248,424 in torchvision's page, less the classifier's 512 x 1000 + 1000
    assert sum(p.numel() for p in build().parameters()) == 735_424


def test_a_fire_lays_two_convolutions_side_by_side():
    fire = Fire(4, 2, 3)
    x = torch.randn(2, 4, 5, 5, generator=torch.Generator().manual_seed(1))
    squeezed = torch.einsum("oi,nihw->nohw", fire.squeeze.weight[:, :, 0, 0], x) + fire.squeeze.bias[:, None, None]
    one = torch.einsum("oi,nihw->nohw", fire.expand1x1.weight[:, :, 0, 0], squeezed.clamp(min=0))
    made = fire(x)
    assert made.shape == (2, 6, 5, 5) and made.min() >= 0
    torch.testing.assert_close(made[:, :3], (one + fire.expand1x1.bias[:, None, None]).clamp(min=0))


def test_features_are_means_over_all_places():
    net = build()
    assert net(photos(64)).shape == (2, 512) and net(photos(21)).shape == (2, 512)
    assert torch.equal(net(photos(64)), net.features(photos(64)).mean((2, 3)))
    assert net.features(photos(224)).shape == (2, 512, 13, 13)  # as its paper has it


def test_every_weight_has_a_gradient():
    net = build()
    net(photos()).square().sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_a_saved_model_comes_back(tmp_path: Path):
    net, other = build(0), build(1)
    folder = write_checkpoint(tmp_path / "net", net.state_dict(), net.config())
    other.load_state_dict(read_tensors(folder))
    assert torch.equal(other(photos()), net(photos()))
    assert read_config(folder) == {"model_type": "spolia_squeezenet", "version": "1.0", "hidden_size": 512}


def test_surgery_finds_its_fires():
    sites = find_sites(Network(build()), photos(), "blocks")
    widths = (128, 128, 256, 256, 384, 384, 512, 512)
    wanted = [(f"features.{i}", width, 1) for i, width in zip(FIRES, widths, strict=True)]
    assert [(site.name, site.width, site.axis) for site in sites] == [*wanted, ("", 512, -1)]


def test_an_npz_of_the_whole_network_is_read_without_its_classifier(tmp_path: Path):
    state = {name: t.numpy() for name, t in build(5).state_dict().items()}
    np.savez(
        tmp_path / "whole.npz", **{"classifier.1.bias": np.zeros(1000, np.float32)}, **dict(reversed(state.items()))
    )
    found = read_npz(tmp_path / "whole.npz")
    assert list(found) == list(state) and all(torch.equal(found[n], torch.from_numpy(a)) for n, a in state.items())


def test_another_network_is_told(tmp_path: Path):
    state = {name: t.numpy() for name, t in build().state_dict().items()}
    np.savez(tmp_path / "less.npz", **{n: a for n, a in state.items() if n != "features.7.squeeze.bias"})
    with pytest.raises(SpoliaError, match=r"`features\.7\.squeeze\.bias` is not SqueezeNet 1\.0's"):
        read_npz(tmp_path / "less.npz")
    np.savez(tmp_path / "other.npz", **state | {"features.0.weight": np.zeros((64, 3, 3, 3), np.float32)})
    with pytest.raises(SpoliaError, match=r"`features\.0\.weight` is not"):
        read_npz(tmp_path / "other.npz")
    with pytest.raises(SpoliaError, match="cannot be read"):
        read_npz(tmp_path / "nothing.npz")


@pytest.mark.skipif(not (DATA / "squeezenet1_0_imagenet.npz").is_file(), reason="SPOLIA_DATA holds no SqueezeNet")
def test_the_real_weights_fit():
    net = build()
    net.load_state_dict(read_npz(DATA / "squeezenet1_0_imagenet.npz"))
    for name, tensor in net.state_dict().items():
        if name.endswith("weight"):  # deep compression: at most 256 values a layer; the first is scaled by colour
            assert len(tensor.unique()) <= (3 * 256 if name == "features.0.weight" else 256), name
    assert net(photos(64)).isfinite().all()
