"""Modules: parts of a model, told by tensor names, that are merged each in its own way."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spolia.errors import SpoliaError
from spolia.runs.mergekit import read_mergekit
from spolia.runs.merging import run_merge
from spolia.runs.yamlmarks import load

EMBED, NORM, PROJECTOR = "model.embed_tokens.weight", "model.norm.weight", "multi_modal_projector.linear.weight"
PATCH = "vision_tower.embeddings.patch_embedding.weight"


def text_layer(i: int) -> str:
    return f"model.layers.{i}.mlp.weight"


def sight_layer(i: int) -> str:
    return f"vision_tower.encoder.layers.{i}.mlp.weight"


def encoder(i: int) -> str:
    return f"encoder.block.{i}.layer.0.weight"


def decoder(i: int) -> str:
    return f"decoder.block.{i}.layer.0.weight"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A and B see and read (4 text layers, 2 vision layers); S and T are encoder-decoders (3 and 2 layers)."""
    root = tmp_path_factory.mktemp("models")
    for name, offset in (("A", 100.0), ("B", 200.0)):
        values = {EMBED: 0.25, NORM: 0.5, PROJECTOR: 0.75, PATCH: 0.125}
        values |= {text_layer(i): i + 1.0 for i in range(4)} | {
            f"model.layers.{i}.attn.weight": i + 1.0 for i in range(4)
        }
        values |= {sight_layer(i): i + 1.0 for i in range(2)}
        config = {
            "model_type": "llava",
            "text_config": {"num_hidden_layers": 4},
            "vision_config": {"num_hidden_layers": 2},
        }
        write_model(root / name, {n: torch.full((2, 2), offset + v) for n, v in values.items()}, config)
    for name, offset in (("S", 300.0), ("T", 400.0)):
        values = {
            "shared.weight": 0.25,
            "encoder.final_layer_norm.weight": 0.5,
            "decoder.final_layer_norm.weight": 0.75,
        }
        values |= {encoder(i): i + 1.0 for i in range(3)} | {decoder(i): i + 1.0 for i in range(2)}
        config = {"model_type": "t5", "num_layers": 3, "num_decoder_layers": 2}
        write_model(root / name, {n: torch.full((2, 2), offset + v) for n, v in values.items()}, config)
    return root


@pytest.fixture
def read(folder):
    return lambda text: read_mergekit(load(text, "r.yml"), folder=folder)


@pytest.fixture
def merged(read, tmp_path):
    def merged(text: str) -> tuple[dict[str, float], dict]:
        out = run_merge(read(text), tmp_path / "out")
        values = load_file(out / "model.safetensors")
        return {n: float(t[0, 0]) for n, t in values.items()}, json.loads((out / "config.json").read_text())

    return merged


@pytest.fixture
def refusal(read):
    def refusal(text: str) -> str:
        with pytest.raises(SpoliaError) as caught:
            read(text)
        return str(caught.value)

    return refusal


BOTH = "[{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: 1}}]"


def test_one_module_is_the_whole_model(read):
    plain = f"merge_method: linear\nmodels: {BOTH}\n"
    single = f"merge_method: linear\nmodules: {{default: {{models: {BOTH}}}}}\n"
    assert read(single).wiring is None
    for name in (EMBED, text_layer(2), sight_layer(1)):
        assert read(single).settings_for(name) == read(plain).settings_for(name)


def test_the_parameters_of_a_module_stand_above_the_files(read):
    text = "merge_method: linear\nparameters: {weight: 3, normalize: false}\nmodules:\n  default:\n"
    text += "    models: [{model: A}, {model: B, parameters: {weight: 1}}]\n    parameters: {weight: 2}\n"
    assert read(text).settings_for(EMBED).weight == (2, 1) and not read(text).settings_for(EMBED).normalize


@pytest.mark.parametrize("name", ["text_decoder", "default"])
def test_sight_from_one_text_from_both(merged, name):
    """The module without a prefix takes what no other claims."""
    values, config = merged(
        f"merge_method: linear\nmodules:\n  {name}: {{models: {BOTH}}}\n"
        "  vision_tower: {models: [{model: B, parameters: {weight: 1}}]}\n"
        "  multi_modal_projector: {models: [{model: A, parameters: {weight: 1}}]}\n"
    )
    assert [values[text_layer(i)] for i in range(4)] == [151, 152, 153, 154]
    assert [values[sight_layer(i)] for i in range(2)] == [201, 202]
    assert (values[EMBED], values[NORM], values[PATCH], values[PROJECTOR]) == (150.25, 150.5, 200.125, 100.75)
    assert config["text_config"]["num_hidden_layers"] == 4


def test_slices_of_one_module(merged):
    """Text layers are stacked, the tower stays."""
    values, config = merged(
        "merge_method: passthrough\nmodules:\n"
        "  text_decoder:\n    slices:\n      - sources: [{model: A, layer_range: [0, 3]}]\n"
        "      - sources: [{model: B, layer_range: [2, 4]}]\n"
        "  vision_tower: {models: [{model: B}]}\n  multi_modal_projector: {models: [{model: A}]}\n"
    )
    assert [values[text_layer(i)] for i in range(5)] == [101, 102, 103, 203, 204]
    assert [values[sight_layer(i)] for i in range(2)] == [201, 202] and sight_layer(2) not in values
    assert config["text_config"]["num_hidden_layers"] == 5 and config["vision_config"]["num_hidden_layers"] == 2
    assert (values[EMBED], values[NORM]) == (100.25, 200.5)


def test_each_module_has_its_own_gradient(read):
    request = read(
        "merge_method: linear\nparameters: {normalize: false}\nmodules:\n"
        "  text_decoder: {models: [{model: A, parameters: {weight: [0, 1]}}]}\n"
        "  vision_tower: {models: [{model: A, parameters: {weight: [4, 6]}}]}\n"
        "  multi_modal_projector: {models: [{model: A, parameters: {weight: [7, 8]}}]}\n"
    )
    got = [request.settings_for(n).weight[0] for n in (text_layer(0), text_layer(3), sight_layer(0), sight_layer(1))]
    assert got == [0, 1, 4, 6] and request.settings_for(PROJECTOR).weight == (7,)  # no layers: the first value


def test_encoder_and_decoder(merged):
    """As inferred from names: a stack of layers each, and `default` for the rest."""
    values, config = merged(
        "merge_method: passthrough\nmodules:\n  default: {models: [{model: S}]}\n"
        "  encoder.block:\n    slices:\n      - sources: [{model: S, layer_range: [0, 2]}]\n"
        "      - sources: [{model: T, layer_range: [0, 3]}]\n"
        "  decoder.block: {slices: [{sources: [{model: T, layer_range: [1, 2]}]}]}\n"
    )
    assert [values[encoder(i)] for i in range(5)] == [301, 302, 401, 402, 403] and values[decoder(0)] == 402
    assert values["shared.weight"] == 300.25 and values["decoder.final_layer_norm.weight"] == 300.75
    assert (config["num_layers"], config["num_decoder_layers"]) == (5, 1)


def test_a_wider_module_takes_its_loose_tensors_along(merged):
    values, _ = merged(
        "merge_method: passthrough\nmodules:\n  encoder: {models: [{model: S}]}\n  decoder: {models: [{model: T}]}\n"
        "  shared: {models: [{model: T}]}\n"
    )
    assert values["encoder.final_layer_norm.weight"] == 300.5 and values["decoder.final_layer_norm.weight"] == 400.75
    assert values["shared.weight"] == 400.25


def test_an_unlisted_base_joins_every_module_of_models(merged):
    values, _ = merged(
        "merge_method: task_arithmetic\nbase_model: A\nparameters: {weight: .5}\nmodules:\n"
        "  text_decoder: {models: [{model: B}]}\n  vision_tower: {models: [{model: B, parameters: {weight: 1}}]}\n"
        "  multi_modal_projector: {models: [{model: B, parameters: {weight: 0}}]}\n"
    )
    assert (values[text_layer(0)], values[sight_layer(0)], values[PROJECTOR]) == (151, 201, 100.75)


@pytest.mark.parametrize(
    ("text", "line", "word", "cure"),
    [
        ("merge_method: passthrough\nslices: [{sources: [{model: A, layer_range: [0, 2]}]}]", 2,
         "`model.layers`, `vision_tower.encoder.layers`", "slice each apart"),
        ("merge_method: passthrough\nmodules: {default: {slices: [{sources: [{model: S}]}]}}", 2,
         "`decoder.block`, `encoder.block`", "slice each apart"),
        ("merge_method: passthrough\nmodules:\n  vision: {models: [{model: A}]}\n  default: {models: [{model: A}]}", 3,
         "no tensor belongs to the module `vision`", "`vision_tower`"),
        ("merge_method: passthrough\nmodules:\n  vision_tower: {models: [{model: A}]}", 2, "belongs to no module", "`default`"),
        ("merge_method: passthrough\nmodules: []", 2, "`modules` must be a mapping", "default"),
        ("merge_method: passthrough\nmodules: {default: 3}", 2, "says nothing", "`models:`"),
        ("merge_method: passthrough\nmodules: {default: {models: [{model: A}], slices: []}}", 2, "either", "keep one"),
        ("merge_method: passthrough\nmodules: {default: {model: A}}", 2, "`model`", "did you mean `models`?"),
        ("merge_method: passthrough\nmodules: {default: {models: [{model: A}]}}\nmodels: [{model: A}]", 2, "exclude", "keep"),
        ("merge_method: linear\nmodules:\n  default: {models: [{model: A}]}", 3, "`weight` of `A` is not set", "weight"),
        ("merge_method: passthrough\nmodules:\n  default: {models: [{model: S}]}\n"
         "  encoder.block: {slices: [{sources: [{model: S, layer_range: [0, 4]}]}]}\n"
         "  decoder.block: {slices: [{sources: [{model: S, layer_range: [0, 3]}]}]}", 5,
         "`S` has 2 layers, the range ends at 3", "at most 2"),
    ],
)  # fmt: skip
def test_refused_with_line_and_cure(refusal, text, line, word, cure):
    message = refusal(text)
    assert f"r.yml:{line}" in message and word in message and cure in message


def test_a_modules_name_is_let_pass(read):
    assert not read(f"merge_method: linear\nmodules: {{default: {{name: x, models: {BOTH}}}}}").warnings
