"""Sites are found in the encoders people have, with widths, channel axes and orders seen in a dry run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia.errors import SpoliaError
from spolia.parts.network import Network
from spolia.parts.sites import Site, find_sites, run_through
from spolia.zoo.mlp import ResidualMLP

Case = tuple[nn.Module, Any]


def stage(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, 2, 1), nn.BatchNorm2d(outputs), nn.ReLU())


class StagedCNN(nn.Module):
    """Named as torchvision's and timm's residual networks are."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.layer1, self.layer2, self.layer3 = stage(4, 6), stage(6, 8), stage(8, 10)
        self.fc = nn.Linear(10, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layer3(self.layer2(self.layer1(self.bn1(self.conv1(x)))))
        return self.fc(x.mean((2, 3)))


class ChannelsLast(nn.Module):
    """A block on maps [inputs, height, width, channels], as Swin's are."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mix = nn.LayerNorm(width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mix(self.norm(x))


class TokensFirst(nn.Module):
    """An encoder whose states are [tokens, inputs, width], as open_clip's were; blocks return tuples."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> tuple[Tensor, None]:
            return x + self.mix(x), None

    def __init__(self) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(self.Layer() for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(0, 1)
        for block in self.resblocks:
            x, _ = block(x)
        return x[0]


def hugging_face(kind: str) -> Case:
    import transformers as hf

    size = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2}
    image = {"image_size": 8, "patch_size": 4, "num_channels": 1}
    pixels, ids = {"pixel_values": torch.randn(3, 1, 8, 8)}, {"input_ids": torch.arange(15).reshape(3, 5)}
    if kind == "vit":
        return hf.ViTModel(hf.ViTConfig(**size, **image)), pixels
    if kind == "clip vision":
        return hf.CLIPVisionModelWithProjection(hf.CLIPVisionConfig(**size, **image, projection_dim=16)), pixels
    if kind == "clip text":
        config = hf.CLIPTextConfig(**size, vocab_size=30, projection_dim=16, max_position_embeddings=8, eos_token_id=14)
        return hf.CLIPTextModelWithProjection(config), ids
    if kind == "bert":
        return hf.BertModel(hf.BertConfig(**size, vocab_size=30)), ids | {"attention_mask": torch.ones(3, 5).long()}
    if kind == "roberta":
        return hf.RobertaModel(hf.RobertaConfig(**size, vocab_size=30)), {"input_ids": ids["input_ids"] + 2}
    if kind == "distilbert":
        return hf.DistilBertModel(hf.DistilBertConfig(dim=24, hidden_dim=32, n_layers=3, n_heads=2, vocab_size=30)), ids
    if kind == "gpt2":
        return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=24, n_layer=3, n_head=2, n_positions=8, vocab_size=30)), ids
    if kind == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**size, vocab_size=30, num_key_value_heads=2)), ids
    if kind == "dinov2":
        return hf.Dinov2Model(hf.Dinov2Config(**(size | {"mlp_ratio": 1}), **image)), pixels
    if kind == "resnet":
        config = hf.ResNetConfig(
            num_channels=1, embedding_size=4, hidden_sizes=[4, 6, 8], depths=[1, 1, 1], layer_type="basic"
        )
        return hf.ResNetModel(config), {"pixel_values": torch.randn(3, 1, 16, 16)}
    raise ValueError(kind)


MODELS = {
    "vit": [24, 24, 24, 24],
    "clip vision": [24, 24, 24, 16],
    "clip text": [24, 24, 24, 16],
    "bert": [24, 24, 24, 24],
    "roberta": [24, 24, 24, 24],
    "distilbert": [24, 24, 24, 24],
    "gpt2": [24, 24, 24, 30],
    "llama": [24, 24, 24, 30],
    "dinov2": [24, 24, 24, 24],
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", MODELS)
def test_the_blocks_of_usual_encoders_are_found(kind: str) -> None:
    module, batch = hugging_face(kind)
    sites = find_sites(Network(module), batch, "blocks")
    assert [site.width for site in sites] == MODELS[kind]
    assert [int(site.name.rpartition(".")[2]) for site in sites[:-1]] == [0, 1, 2]
    assert {site.axis for site in sites} == {-1}
    shapes = states_at(module, batch, sites)
    assert all(shape[0] == 3 and shape[-1] == site.width for shape, site in zip(shapes, sites, strict=True))


@pytest.mark.slow
def test_the_stages_of_a_residual_network_are_found() -> None:
    module, batch = hugging_face("resnet")
    network = Network(module, outputs=lambda m, b: m(**b).pooler_output.flatten(1))
    sites = find_sites(network, batch, "blocks")
    assert [(site.width, site.axis) for site in sites] == [(4, 1), (6, 1), (8, 1), (8, -1)]


def states_at(module: nn.Module, batch: Any, sites: list[Site]) -> list[tuple[int, ...]]:
    """Shape of the tokens at every site."""
    shapes: list[tuple[int, ...]] = []

    def note(number: int, state: Tensor) -> Tensor:
        shapes.append(tuple(sites[number].tokens(state).shape))
        return state

    with torch.no_grad():
        run_through(Network(module), batch, sites, note)
    return shapes


def small(name: str) -> Case:
    if name == "mlp":
        return ResidualMLP(8, 3, generator=torch.Generator().manual_seed(0)), torch.randn(5, 8)
    if name == "staged":
        return StagedCNN(), torch.randn(2, 3, 16, 16)
    if name == "sequence":
        return nn.Sequential(stage(3, 4), stage(4, 6), nn.Flatten(), nn.Linear(96, 5)), torch.randn(2, 3, 16, 16)
    if name == "channels last":
        blocks = nn.Sequential(ChannelsLast(6), ChannelsLast(6))
        return nn.Sequential(blocks, nn.Flatten(), nn.Linear(54, 5)), torch.randn(2, 3, 3, 6)
    return TokensFirst(), torch.randn(4, 7, 6)


@pytest.mark.parametrize(
    ("name", "names", "shapes"),
    [
        ("mlp", ["blocks.0", "blocks.1", "blocks.2"], [(5, 1, 8)] * 3),
        ("staged", ["layer1", "layer2", "layer3"], [(2, 64, 6), (2, 16, 8), (2, 4, 10)]),
        ("sequence", ["0", "1"], [(2, 64, 4), (2, 16, 6)]),
        ("channels last", ["0.0", "0.1"], [(2, 9, 6)] * 2),
        ("tokens first", ["resblocks.0", "resblocks.1", "resblocks.2"], [(4, 7, 6)] * 3),
    ],
)
def test_layouts_are_seen(name: str, names: list[str], shapes: list[tuple[int, ...]]) -> None:
    module, batch = small(name)
    sites = find_sites(Network(module), batch, "blocks")
    assert [site.name for site in sites] == [*names, ""]
    assert states_at(module, batch, sites)[:-1] == shapes


@pytest.mark.parametrize("name", ["mlp", "staged", "tokens first"])
def test_what_is_put_in_takes_the_place_of_the_state(name: str) -> None:
    module, batch = small(name)
    network = Network(module)
    sites = find_sites(network, batch, "blocks")
    with torch.no_grad():
        same = run_through(network, batch, sites, lambda number, state: state)
        assert torch.equal(same, network.features(batch)), "a hook that gives back what it got changes no bit"
        zero = run_through(network, batch, sites, lambda number, state: state * (number == len(sites) - 1))
        assert not torch.equal(zero, same)
        assert torch.equal(network.features(batch), same), "the hooks are gone"
    if name != "staged":
        assert torch.equal(zero, torch.zeros_like(zero))


def test_sites_by_pattern_come_in_the_order_they_run() -> None:
    module, batch = small("staged")
    sites = find_sites(Network(module), batch, r"layer[31]|bn1")
    assert [(site.name, site.width) for site in sites] == [("bn1", 4), ("layer1", 6), ("layer3", 10), ("", 5)]
    named = find_sites(Network(module), batch, "last", "layer3")
    assert [(site.name, site.axis) for site in named] == [("layer3", 1)]


@pytest.mark.parametrize(
    ("where", "last", "message"),
    [
        (r"layer9", "", "no module is called `layer9`"),
        (r"layer[", "", "no regular expression"),
        (r"layer\d", "head", "there is no module `head`"),
    ],
)
def test_what_is_not_there_is_told(where: str, last: str, message: str) -> None:
    module, batch = small("staged")
    with pytest.raises(SpoliaError, match=message.replace("[", r"\[")):
        find_sites(Network(module), batch, where, last)


def test_a_module_without_blocks_asks_for_a_pattern() -> None:
    with pytest.raises(SpoliaError, match="no blocks are found"):
        find_sites(Network(nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))), torch.randn(2, 3), "blocks")


def test_a_module_that_runs_twice_is_no_site() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.block(self.block(x))

    with pytest.raises(SpoliaError, match="runs 2 times"):
        find_sites(Network(Twice()), torch.randn(2, 3), "block")
