"""Slices: which layer comes from where, which value it gets, what the config becomes, and what is refused with its line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spolia.errors import SpoliaError
from spolia.parts.align import Wire
from spolia.parts.layers import Layers, before, restacked
from spolia.runs.mergekit import read_mergekit
from spolia.runs.merging import plan_merge, prepare, run_merge
from spolia.runs.yamlmarks import load

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
PARTS = ("mlp.up_proj", "self_attn.q_proj")


def layer(i: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{i}.{part}.weight"


def tensors(layers: int, offset: float) -> dict[str, torch.Tensor]:
    """Every tensor is constant: `offset`, plus its layer + 1; embeddings add 0.25, norm 0.5, head 0.75."""
    named = {EMBED: 0.25, NORM: 0.5, HEAD: 0.75} | {layer(i, p): i + 1.0 for i in range(layers) for p in PARTS}
    return {name: torch.full((4, 2), offset + value) for name, value in named.items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name, layers, offset in (
        ("base", 4, 0.0),
        ("A", 4, 100.0),
        ("B", 4, 200.0),
        ("C", 4, 300.0),
        ("deep", 6, 400.0),
    ):
        config = {"num_hidden_layers": layers, "model_type": "llama", "vocab_size": 4, "torch_dtype": "float32"}
        config["layer_types"] = [f"{name}{i}" for i in range(layers)]
        write_model(root / name, tensors(layers, offset), config)
    return root


@pytest.fixture
def read(folder: Path):
    return lambda text, **options: read_mergekit(load(text, "r.yml"), folder=folder, **options)


@pytest.fixture
def refusal(read):
    def refusal(text: str) -> str:
        with pytest.raises(SpoliaError) as caught:
            read(text)
        return str(caught.value)

    return refusal


@pytest.fixture
def merged(read, tmp_path: Path):
    """The merged tensors' first elements and the config."""

    def merged(text: str) -> tuple[dict[str, float], dict]:
        out = run_merge(read(text), tmp_path / "out")
        values = load_file(out / "model.safetensors")
        assert all((tensor == tensor.flatten()[0]).all() for tensor in values.values())
        return {n: float(t.flatten()[0]) for n, t in values.items()}, json.loads((out / "config.json").read_text())

    return merged


def one(model: str, span: str, weight: str = "1") -> str:
    return f"  - sources: [{{model: {model}, layer_range: {span}, parameters: {{weight: {weight}}}}}]\n"


LINEAR = "merge_method: linear\nparameters: {normalize: false}\nslices:\n"
TWO = LINEAR + one("A", "[0, 1]") + one("A", "[1, 4]")


# positions: the verified numbers


def test_gradients_start_anew_in_each_slice(read):
    request = read(LINEAR + one("A", "[0, 1]", "[.2, .8]") + one("A", "[1, 4]", "[.2, .4, .8]"))
    names = [*(layer(i) for i in range(4)), EMBED, NORM, HEAD]
    # a slice of one layer has the last value, embeddings the first slice's first, norm and head the last slice's first
    assert [request.settings_for(name).weight[0] for name in names] == [0.8, 0.2, 0.4, 0.8, 0.2, 0.2, 0.2]


def test_whole_models_as_a_slice_are_whole_models(merged, read):
    sliced = read(LINEAR + one("A", "[0, 4]", "[0, 1]"))
    plain = read(
        "merge_method: linear\nparameters: {normalize: false}\nmodels: [{model: A, parameters: {weight: [0, 1]}}]"
    )
    for name in tensors(4, 0):
        assert sliced.settings_for(name) == plain.settings_for(name)
    assert prepare(sliced).aligned == prepare(plain).aligned


def test_a_filter_of_a_model_sees_its_own_name_a_shared_one_the_results(read):
    request = read(
        "merge_method: ties\nbase_model: base\nparameters:\n"
        "  weight: 1\n  normalize: [{filter: layers.1., value: 0}, {value: 1}]\n"
        "slices:\n  - sources:\n"
        "      - {model: base, layer_range: [1, 3]}\n"
        "      - {model: A, layer_range: [2, 4], parameters: {density: [{filter: layers.2., value: .1}, {value: .9}]}}\n"
    )
    first, second = request.settings_for(layer(0)), request.settings_for(layer(1))
    assert first.density == (0.1,) and second.density == (0.9,)  # A's layer 2 has become layer 0
    assert first.normalize and not second.normalize  # layer 1 of the result
    assert not any("no tensor's name" in str(problem) for problem in request.check_tensors(list(request.wiring)))


@pytest.mark.parametrize("method", ["ties", "linear"])
def test_levels_of_precedence(read, method):
    """One parameter at each of the four levels: model, slice, module, file."""

    def ask(model: str, slice: str, module: str, top: str) -> float:
        text = f"merge_method: {method}\nbase_model: base\n" + (f"parameters: {{{top}}}\n" if top else "")
        text += "modules:\n  default:\n" + (f"    parameters: {{{module}}}\n" if module else "") + "    slices:\n"
        text += "      - sources:\n          - {model: base}\n          - model: A\n"
        text += f"            parameters: {{{model}}}\n" if model else ""
        text += f"        parameters: {{{slice}}}\n" if slice else ""
        return read(text).settings_for(layer(2)).weight[-1]

    levels = ["weight: .1", "weight: .2", "weight: .3", "weight: .4"]
    for first in range(4):
        given = ["" if i < first else value for i, value in enumerate(levels)]
        assert ask(*given) == pytest.approx((first + 1) / 10)
    assert ask("weight: [{filter: lm_head, value: 9}]", "", "weight: .3", "weight: .4") == 0.3  # a filter passes on


# stacking


def test_layers_are_numbered_on_and_the_ends_come_from_first_and_last_slice(merged):
    values, config = merged(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: A, layer_range: [0, 3]}]\n  - sources: [{model: deep, layer_range: [2, 6]}]\n"
    )
    assert [values[layer(i)] for i in range(7)] == [101, 102, 103, 403, 404, 405, 406]
    assert layer(7) not in values and config["num_hidden_layers"] == 7
    assert (values[EMBED], values[NORM], values[HEAD]) == (100.25, 400.5, 400.75)
    assert config["layer_types"] == ["A0", "A1", "A2", "deep2", "deep3", "deep4", "deep5"]


def test_the_plan_tells_where_layers_come_from(read):
    text = (
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: A, layer_range: [0, 3]}]\n  - sources: [{model: deep, layer_range: [5, 6]}]\n"
    )
    assert plan_merge(read(text)).notes[:4] == [
        "`model.layers` 0-2: A 0-2",
        "`model.layers` 3: deep 5",
        f"before the layers `{EMBED}`: A",
        f"after the layers `{HEAD}`, `{NORM}`: deep",
    ]


def test_the_same_model_in_several_slices_with_scale(merged):
    values, config = merged(
        "merge_method: passthrough\nslices:\n"
        "  - sources: [{model: A, layer_range: [0, 3]}]\n"
        "  - sources:\n      - model: A\n        layer_range: [1, 4]\n"
        "        parameters: {scale: [{filter: up_proj, value: 0}, {value: 1}]}\n"
    )
    assert [values[layer(i)] for i in range(6)] == [101, 102, 103, 0, 0, 0]
    assert [values[layer(i, "self_attn.q_proj")] for i in range(6)] == [101, 102, 103, 102, 103, 104]
    assert config["num_hidden_layers"] == 6


def test_slices_may_differ_in_models_and_their_number(merged):
    values, _ = merged(
        "merge_method: linear\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]\n"
        "  - sources: [{model: C, layer_range: [3, 4]}]\n"
        "  - sources: [{model: B, layer_range: [2, 4]}, {model: A, layer_range: [2, 4], parameters: {weight: 3}}]\n"
    )
    assert [values[layer(i)] for i in range(5)] == [151, 152, 304, 128, 129]
    assert (values[EMBED], values[NORM]) == (150.25, 125.5)


@pytest.mark.parametrize(("legacy", "norm"), [(False, 150.5), (True, 100.5)])
def test_models_after_the_layers(merged, legacy, norm):
    """mergekit cuts the last slice's list to as many models as the first slice has; here all take part unless asked."""
    values, _ = merged(
        LINEAR.replace("normalize: false", "normalize: true")
        + one("C", "[0, 2]")
        + "  - sources:\n      - {model: A, layer_range: [2, 4], parameters: {weight: 1}}\n"
        "      - {model: B, layer_range: [2, 4], parameters: {weight: 1}}\n"
        f"x-spolia: {{legacy_post_weights: {str(legacy).lower()}}}\n"
    )
    assert values[NORM] == norm and values[HEAD] == norm + 0.25 and values[layer(2)] == 153


def test_a_base_of_its_own_in_a_slice(merged, read):
    text = (
        "merge_method: task_arithmetic\nbase_model: base\nparameters: {weight: 1}\nslices:\n"
        "  - sources: [{model: base, layer_range: [0, 2]}, {model: A, layer_range: [1, 3]}]\n"
        "  - base_model: B\n"
        "    sources: [{model: A, layer_range: [2, 4]}, {model: B, layer_range: [2, 4]}, {model: C, layer_range: [0, 2]}]\n"
    )
    request = read(text)
    assert request.base is None and [e.name for e in request.experts] == ["base", "A", "B", "C"]
    assert request.wiring[layer(3)] == Wire((2, layer(3)), ((1, layer(3)), (3, layer(1))))
    values, config = merged(text)
    assert values[layer(0)] == 102  # base 1 + (A 102 - 1)
    assert values[layer(2)] == 203 + (103 - 203) + (301 - 203)
    assert (values[EMBED], values[HEAD], config["num_hidden_layers"]) == (100.25, 200.75, 4)


def test_slerp_in_slices_starts_at_the_base(merged):
    values, _ = merged(
        "merge_method: slerp\nbase_model: B\nparameters: {t: [0, 1]}\nslices:\n"
        "  - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]\n"
    )
    assert [values[layer(i)] for i in range(2)] == [201, 102] and values[EMBED] == 200.25


def test_random_coins_follow_the_model_not_its_place(read, tmp_path):
    """DARE draws by expert: a slice that lists fewer of them must not shift the others' coins."""
    text = (
        "merge_method: dare_linear\nbase_model: base\nparameters: {weight: 1, density: .5, rescale: false}\nslices:\n"
        "  - sources: [{model: base, layer_range: [0, 2]}, {model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 2]}]\n"
        "  - sources: [{model: base, layer_range: [2, 4]}, {model: B, layer_range: [2, 4]}]\n"
    )
    prepared = prepare(read(text))
    places = {tensor.name: tensor.places for tensor in prepared.aligned}
    assert places[layer(1)] == (0, 1) and places[layer(3)] == places[NORM] == (1,)


# configs and names


@pytest.mark.parametrize(
    ("config", "stack", "want"),
    [
        ({"num_hidden_layers": 2}, "model.layers", {"num_hidden_layers": 3}),
        ({"n_layer": 2}, "transformer.h", {"n_layer": 3}),
        ({"num_layers": 2, "num_decoder_layers": 5}, "encoder.block", {"num_layers": 3, "num_decoder_layers": 5}),
        ({"num_layers": 5, "num_decoder_layers": 2}, "decoder.block", {"num_layers": 5, "num_decoder_layers": 3}),
        ({"encoder_layers": 2, "decoder_layers": 5}, "model.encoder.layers", {"encoder_layers": 3, "decoder_layers": 5}),
        ({"text_config": {"num_hidden_layers": 2}}, "m.layers", {"text_config": {"num_hidden_layers": 3}}),
        (
            {"num_hidden_layers": 2, "text_config": {"num_hidden_layers": 2}},
            "m.layers",
            {"num_hidden_layers": 3, "text_config": {"num_hidden_layers": 3}},
        ),
        (
            {"vision_config": {"num_hidden_layers": 2}, "text_config": {"num_hidden_layers": 2}},
            "vision_tower.encoder.layers",
            {"vision_config": {"num_hidden_layers": 3}, "text_config": {"num_hidden_layers": 2}},
        ),
        ({"hidden_size": 2}, "model.layers", {"hidden_size": 2}),
    ],
)  # fmt: skip
def test_the_count_of_layers_stands_in_many_places(config, stack, want):
    given = json.loads(json.dumps(config))
    assert restacked(config, stack, [(config, 0), (config, 1), (config, 0)]) == want and config == given


def test_lists_with_one_entry_a_layer_are_cut_along():
    a = {"num_hidden_layers": 3, "layer_types": ["x", "y", "z"], "mlp_only_layers": [1], "sizes": [1, 2, 3]}
    b = {"num_hidden_layers": 2, "layer_types": ["p", "q"], "mlp_only_layers": [0, 1]}
    made = restacked(a, "model.layers", [(a, 2), (a, 1), (b, 1), (None, 0)])
    assert made["layer_types"] == ["z", "y", "q", "x"] and made["mlp_only_layers"] == [1, 2]
    assert made["num_hidden_layers"] == 4 and made["sizes"] == [1, 2, 3]


def test_what_stands_before_the_layers():
    early = ("model.embed_tokens.weight", "transformer.wte.weight", "wpe.weight", "bert.embeddings.LayerNorm.bias")
    late = (
        "lm_head.weight",
        "model.norm.weight",
        "embed_out.weight",
        "transformer.ln_f.bias",
        "bert.pooler.dense.weight",
    )
    assert all(map(before, early)) and not any(map(before, late))


def test_numbers_that_are_no_layers():
    layers = Layers(
        [layer(i, p) for i in range(3) for p in PARTS] + ["classifier.0.weight", "visual.merger.mlp.2.bias"]
    )
    assert layers.main == "model.layers" and layers.count == 3 and layers.of("classifier.0.weight") is None


# refusals


@pytest.mark.parametrize(
    ("text", "line", "word", "cure"),
    [
        (LINEAR + one("A", "[0, 5]"), 4, "`A` has 4 layers, the range ends at 5", "at most 4"),
        (LINEAR + one("A", "[-1, 2]"), 4, "starts below 0", "count from 0"),
        (LINEAR + one("A", "[2, 2]"), 4, "holds no layer", "not included"),
        (LINEAR + one("A", "[0]"), 4, "no pair of whole numbers", "[start, end]"),
        (LINEAR + one("A", "[0, 1.5]"), 4, "no pair of whole numbers", "[start, end]"),
        (LINEAR + one("A", "4"), 4, "no pair of whole numbers", "[start, end]"),
        (LINEAR + "  - sources: [{model: A, layer_range: [0, 2]}, {model: B, layer_range: [0, 3]}]\nparameters_: 1", 4,
         "2 of `A`, 3 of `B`", "layer_range"),
        (LINEAR + "  - sources: [{model: A}, {model: deep}]", 4, "4 of `A`, 6 of `deep`", "layer_range"),
        (LINEAR + "  - sources: [{model: A}, {model: ./A}]", 4, "`./A` is listed twice", "keep one"),
        (LINEAR + "  - {model: A}", 4, "names no `sources`", "layer_range: [0, 16]"),
        (LINEAR + "  - sources: A", 4, "`sources` must be a list", "- model: PATH"),
        (LINEAR + "  - A", 4, "names no `sources`", "layer_range"),
        ("merge_method: linear\nslices: {sources: []}", 2, "`slices` must be a list", "- sources:"),
        (LINEAR + "  - sorces: []", 4, "names no `sources`", "write"),
        (LINEAR + "  - sources: [{model: A, layer_rang: [0, 1]}]", 4, "layer_rang", "did you mean `layer_range`?"),
        ("merge_method: linear\nmodels: [{model: A, layer_range: [0, 1]}]\nparameters: {weight: 1}", 2,
         "`layer_range` has no place under `models`", "`slices:`"),
        ("merge_method: passthrough\nslices:\n  - sources: [{model: A}, {model: B}]", 3, "`passthrough` takes 1; found 2",
         "keep 1"),
        ("merge_method: ties\nbase_model: base\nslices:\n  - sources: [{model: A, parameters: {weight: 1}}]", 4,
         "needs its base `base` in every slice", "`- model: base`"),
        ("merge_method: ties\nslices:\n  - sources: [{model: A, parameters: {weight: 1}}]", 1, "`ties` needs a base",
         "base_model"),
        ("merge_method: linear\nslices:\n  - sources: [{model: A}]", 3, "`weight` of `A` is not set", "weight: 0.5"),
        ("merge_method: linear\nslices:\n  - sources: [{model: A, parameters: {normalize: 1}}]", 3,
         "`normalize` belongs to the whole merge", "top-level"),
        (LINEAR + "  - sources: [{model: nowhere}]", 4, "no model at `nowhere`", "write the path"),
    ],
)  # fmt: skip
def test_refused_with_line_and_cure(refusal, text, line, word, cure):
    message = refusal(text)
    assert f"r.yml:{line}" in message and word in message and cure in message


def test_all_bounds_are_told_at_once(refusal):
    message = refusal(LINEAR + one("A", "[0, 9]") + one("B", "[3, 7]") + one("deep", "[5, 8]"))
    assert [f"r.yml:{n}" in message for n in (4, 5, 6)] == [True] * 3 and "6 layers" in message


def test_residual_weight_is_let_pass(read):
    request = read(LINEAR + "  - sources: [{model: A, parameters: {weight: 1}}]\n    residual_weight: 0.5\n")
    assert not request.warnings and len(request.wiring) == len(tensors(4, 0))


def test_a_missing_layer_tensor_is_told_before_reading(folder, write_model):
    part = {name: value for name, value in tensors(4, 0).items() if name != layer(3)}
    write_model(folder / "torn", part, {"num_hidden_layers": 4, "model_type": "llama"})
    text = LINEAR + "  - sources: [{model: A, layer_range: [0, 2]}, {model: torn, layer_range: [2, 4]}]\n"
    request = read_mergekit(load(text.replace("normalize: false", "weight: 1"), "r.yml"), folder=folder)
    with pytest.raises(SpoliaError, match=r"torn: lacks tensor `model\.layers\.3\.mlp\.up_proj\.weight`, which A has"):
        prepare(request)


# the published examples, larger


def test_example_stacking(read, tmp_path, write_model):
    for name in ("one", "two"):
        write_model(tmp_path / name, tensors(40, 0), {"num_hidden_layers": 40})
    text = (
        "slices:\n  - sources:\n    - model: one\n      layer_range: [0, 24]\n"
        "  - sources:\n    - model: two\n      layer_range: [20, 40]\n"
        "merge_method: passthrough\ndtype: float16\n"
    )
    request = read_mergekit(load(text, "r.yml"), folder=tmp_path)
    assert len(request.wiring) == 44 * len(PARTS) + 3 and request.out_dtype == "float16"
    assert request.wiring[layer(43)].experts == ((1, layer(39)),) and request.wiring[layer(24)].experts[0][1] == layer(
        20
    )
    assert request.reshape({"num_hidden_layers": 40}) == {"num_hidden_layers": 44}


def test_example_gradient_slerp_in_slices(read):
    text = (
        "slices:\n  - sources:\n      - model: A\n        layer_range: [0, 4]\n"
        "      - model: B\n        layer_range: [0, 4]\n"
        "merge_method: slerp\nbase_model: A\nparameters:\n  t:\n"
        "    - filter: self_attn\n      value: [0, 0.5, 0.3, 0.7, 1]\n"
        "    - filter: mlp\n      value: [1, 0.5, 0.7, 0.3, 0]\n    - value: 0.5\ndtype: bfloat16\n"
    )
    request = read(text)
    got = [request.settings_for(layer(i, "self_attn.q_proj")).t for i in range(4)]
    assert got == pytest.approx([0, 0.5 - 0.2 / 3, 0.3 + 0.4 * 2 / 3, 1])  # t = i/3 of five knots
    assert request.settings_for(HEAD).t == 0.5 and request.base.name == "A"


@pytest.mark.parametrize(
    ("text", "method", "experts"),
    [
        ("models: [{model: base}, {model: A}]\nmerge_method: arcee_fusion\nbase_model: base", "arcee_fusion", 1),
        ("models: [{model: A, parameters: {weight: 1}}, {model: B, parameters: {weight: .3}}, "
         "{model: C, parameters: {weight: .5}}]\nmerge_method: linear\ndtype: float16", "average", 3),
        ("models: [{model: A, parameters: {weight: .5, density: [1, .7, .1]}}, "
         "{model: B, parameters: {weight: [0, .3, .7, 1]}}]\nmerge_method: ties\nbase_model: base\n"
         "parameters: {normalize: false, int8_mask: true}\ndtype: float16", "ties", 2),
    ],
)  # fmt: skip
def test_examples_with_whole_models(read, text, method, experts):
    request = read(text)
    assert request.method.name == method and len(request.experts) == experts and request.wiring is None
    prepare(request)


@pytest.mark.slow
def test_a_stack_of_llamas_loads_and_generates(make_pool, tmp_path):
    """In transformers: a longer model whose logits are those of the layers it was told to have."""
    import transformers as hf

    _, (one_path, two_path) = make_pool("llama", 2, tmp_path / "pool")
    recipe = tmp_path / "stack.yml"
    recipe.write_text(
        f"merge_method: passthrough\nslices:\n  - sources: [{{model: {one_path}, layer_range: [0, 3]}}]\n"
        f"  - sources: [{{model: {two_path}, layer_range: [1, 4]}}]\n"
    )
    out = run_merge(read_mergekit(load(recipe.read_text(), "r.yml"), folder=tmp_path), tmp_path / "out")
    model = hf.AutoModelForCausalLM.from_pretrained(out)
    parts = [hf.AutoModelForCausalLM.from_pretrained(path) for path in (one_path, two_path)]
    assert len(model.model.layers) == 6 == model.config.num_hidden_layers
    want = hf.AutoModelForCausalLM.from_pretrained(two_path)
    want.model.embed_tokens = parts[0].model.embed_tokens
    want.model.layers = torch.nn.ModuleList([*parts[0].model.layers[:3], *parts[1].model.layers[1:4]])
    for number, block in enumerate(want.model.layers):
        block.self_attn.layer_idx = number
    want.config.num_hidden_layers = 6
    ids = torch.arange(2, 12).unsqueeze(0)
    with torch.no_grad():
        assert torch.equal(model(ids, use_cache=False).logits, want(ids, use_cache=False).logits)  # the same weights
    tokenizer = hf.AutoTokenizer.from_pretrained(out)
    prompt = tokenizer("The stones", return_tensors="pt")
    assert model.generate(**prompt, max_new_tokens=4, do_sample=False).shape[1] == prompt["input_ids"].shape[1] + 4
