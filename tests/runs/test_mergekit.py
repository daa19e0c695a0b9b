"""mergekit's recipes: what is read, which value wins, and that every refusal names the line, the word and the cure."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from spolia.errors import SpoliaError
from spolia.parts.layers import Layers
from spolia.runs.mergekit import is_mergekit, read_mergekit
from spolia.runs.yamlmarks import Marked, load

EMBED, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"


def layer(i: int, part: str = "mlp.up_proj") -> str:
    return f"model.layers.{i}.{part}.weight"


def tensor_names(layers: int) -> list[str]:
    return [EMBED, NORM, HEAD, *(layer(i, part) for i in range(layers) for part in ("mlp.up_proj", "self_attn.q_proj"))]


def make_model(path: Path, layers: int = 4, config: dict | None = None, vocabulary: dict | None = None) -> Path:
    path.mkdir(parents=True)
    save_file({name: np.zeros((2, 2), np.float32) for name in tensor_names(layers)}, path / "model.safetensors")
    (path / "config.json").write_text(json.dumps({"num_hidden_layers": layers} if config is None else config))
    if vocabulary is not None:
        (path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": vocabulary}, "added_tokens": []}))
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for name in ("base", "A", "B", "C"):
        make_model(root / name)
    make_model(root / "single", layers=1)
    make_model(root / "deep", layers=12)
    return root


@pytest.fixture
def read(folder: Path):
    def read(text: str, **options):
        return read_mergekit(load(text, "r.yml"), folder=folder, **options)

    return read


@pytest.fixture
def refusal(read):
    """The message of a recipe that is refused."""

    def refusal(text: str, **options) -> str:
        with pytest.raises(SpoliaError) as caught:
            read(text, **options)
        return str(caught.value)

    return refusal


def warned(request) -> str:
    return "\n".join(str(warning) for warning in request.warnings)


TIES = "merge_method: ties\nbase_model: base\nmodels:\n  - model: A\n    parameters: {weight: 1}\n"
LINEAR = "merge_method: linear\nmodels:\n  - model: A\n    parameters: {weight: 1}\n"


# values at positions


def weights(request, names: list[str]) -> list[float]:
    return [request.settings_for(name).weight[0] for name in names]


def test_a_gradient_runs_over_the_layers_and_is_first_value_outside(read):
    request = read(
        "merge_method: linear\nmodels: [{model: A, parameters: {weight: [0, 1]}}]\nparameters: {normalize: false}"
    )
    got = weights(request, [EMBED, *(layer(i) for i in range(4)), NORM, HEAD])
    assert got == pytest.approx([0, 0, 1 / 3, 2 / 3, 1, 0, 0])  # spacing 1/(n-1); default tolerance: one division


def test_one_layer_gets_the_last_value(read):
    request = read(
        "merge_method: linear\nmodels: [{model: single, parameters: {weight: [.2, .8]}}]\n"
        "parameters: {normalize: false}"
    )
    assert weights(request, [layer(0), EMBED]) == [0.8, 0.2]
    assert "the gradient of `weight` has 2 values for 1 layers" in warned(request)


@settings(max_examples=60, deadline=None)
@given(values=st.lists(st.floats(-10, 10), min_size=1, max_size=7), count=st.integers(2, 9), data=st.data())
def test_gradients_are_piecewise_linear(values, count, data):
    from spolia.runs.mergekit_settings import Entry

    t = data.draw(st.integers(0, count - 1)) / (count - 1)
    # numpy's interpolation on the same knots; 1e-12 leaves room for another order of operations
    want = np.interp(t, np.linspace(0, 1, len(values)), values) if len(values) > 1 else values[0]
    assert Entry(None, tuple(values), ()).value(t) == pytest.approx(want, abs=1e-12)


def test_filters_take_the_first_match_and_fall_through(read):
    request = read(
        "merge_method: linear\n"
        "parameters: {weight: 7, normalize: false}\n"
        "models:\n"
        "  - model: A\n"
        "    parameters:\n"
        "      weight:\n"
        "        - {filter: self_attn, value: [0, 1]}\n"
        "        - {filter: .0., value: 5}\n"
        "        - {filter: model, value: '0.5'}\n"
    )
    names = [layer(3, "self_attn.q_proj"), layer(0, "self_attn.q_proj"), layer(0), layer(1), HEAD]
    assert weights(request, names) == [1, 0, 5, 0.5, 7]  # lm_head matches nothing: the top level answers


def test_star_and_missing_filter_match_everything(read):
    for tail in ("{filter: '*', value: 2}", "{value: 2}", "{filter: null, value: 2}"):
        request = read(
            f"merge_method: linear\nmodels: [{{model: A, parameters: {{weight: [{{filter: mlp, value: 1}}, {tail}]}}}}]"
        )
        assert weights(request, [layer(0), HEAD]) == [1, 2]


def test_booleans_and_numeric_text_are_numbers(read):
    request = read(
        "merge_method: ties\nbase_model: base\nparameters: {normalize: 0, rescale: true, lambda: '1.5'}\n"
        "models: [{model: A, parameters: {weight: true, density: 5e-1}}]"
    )
    got = request.settings_for(HEAD)
    assert (got.weight, got.density, got.scale, got.normalize, got.rescale) == ((1.0,), (0.5,), 1.5, False, "l1")


def test_one_mapping_is_a_list_of_one_with_a_warning(read):
    request = read(
        "merge_method: linear\nparameters: {weight: 2}\n"
        "models: [{model: A, parameters: {weight: {filter: mlp, value: 1}}}]"
    )
    assert weights(request, [layer(0), HEAD]) == [1, 2]
    assert "read as a list of one" in warned(request)


# layers


def test_layers_follow_the_config_and_clamp_beyond_it():
    layers = Layers(tensor_names(5), {"num_hidden_layers": 4})  # layer 4 is an extra head
    assert [layers.position(layer(i)) for i in range(5)] == pytest.approx([0, 1 / 3, 2 / 3, 1, 1])
    assert Layers(["transformer.h.0.w.x", "transformer.h.2.w.x"], {"n_layer": 3}).position("transformer.h.1.w.x") == 0.5


def test_layers_from_names_when_the_config_is_silent():
    names = [f"text.layers.{i}.w" for i in range(5)] + [f"vision.encoder.layers.{i}.w" for i in range(3)]
    layers = Layers([*names, "text.layers.0.experts.7.w", "head.1.w", "norm"], {"text_config": {}})
    assert layers.count == 5
    assert layers.position("text.layers.2.experts.9.w") == 0.5  # the first number counts
    assert layers.position("vision.encoder.layers.1.w") == 0.5  # a tower has its own depth
    assert layers.position("head.1.w") == layers.position("norm") == 0
    assert Layers(["a", "b"]).count == 0


# precedence


@pytest.mark.parametrize(
    ("model", "top", "want"),
    [
        ("density: .3", "density: .6", 0.3),
        ("weight: 1", "density: .6", 0.6),
        ("weight: 1", "lambda: 2", 1.0),  # mergekit's default
        ("density: [{filter: lm_head, value: .3}]", "density: [{filter: mlp, value: .6}]", 1.0),
    ],
)
def test_model_then_top_then_default(read, model, top, want):
    request = read(
        f"merge_method: ties\nbase_model: base\nmodels: [{{model: A, parameters: {{{model}}}}}]\n"
        f"parameters: {{{top}{'' if 'weight' in model else ', weight: 1'}}}"
    )
    assert request.settings_for(NORM).density == (want,)


def test_a_required_value_set_nowhere_names_model_and_parameter(refusal):
    message = refusal(
        "merge_method: ties\nbase_model: base\nmodels:\n  - model: A\n  - model: B\n    parameters: {weight: 1}"
    )
    assert "r.yml:4 models[0]: `weight` of `A` is not set" in message
    assert "parameters: {weight: 0.5}" in message and "`B`" not in message


def test_filters_that_leave_tensors_unset(refusal):
    text = "merge_method: linear\nmodels:\n  - model: A\n    parameters: {weight: [{filter: mlp, value: 1}]}"
    message = refusal(text)
    assert "r.yml:4" in message and f"no filter sets `weight` of `A` for `{EMBED}`" not in message  # natural order
    assert f"`{HEAD}` (and of 6 more tensors)" in message and "without filter" in message


def test_slerp_needs_t(refusal):
    message = refusal("merge_method: slerp\nbase_model: A\nmodels: [{model: A}, {model: B}]")
    assert "`t` is not set" in message and "`parameters: {t: 0.5}` to the top level" in message


@pytest.mark.parametrize(
    ("name", "ours", "normalize", "rescale"),
    [
        ("ties", "ties", True, "none"),
        ("dare_ties", "dare_ties", False, "l1"),
        ("dare_linear", "dare", False, "l1"),
        ("breadcrumbs", "breadcrumbs", False, "none"),
        ("breadcrumbs_ties", "breadcrumbs_ties", False, "none"),
        ("della", "della", True, "l1"),
        ("della_linear", "della_linear", False, "l1"),
    ],
)
def test_defaults_are_mergekits(read, name, ours, normalize, rescale):
    request = read(
        f"merge_method: {name}\nbase_model: base\nmodels: [{{model: A}}, {{model: B}}]\nparameters: {{weight: .5}}"
    )
    got = request.settings_for(HEAD).model_dump()
    want = {"weight": (0.5, 0.5), "density": (1.0, 1.0), "scale": 1.0, "normalize": normalize, "rescale": rescale}
    if name in ("ties", "breadcrumbs", "breadcrumbs_ties"):
        want |= {"scope": "tensor", "count": "floor", "at_threshold": "exact"}
    if name.startswith("breadcrumbs"):
        want["gamma"] = (0.01, 0.01)
    if name.startswith("della"):
        want["epsilon"] = (0.15, 0.15)
    assert request.method.name == ours
    assert got["zero_sign"] == "+" and want.items() <= got.items()


def test_settings_are_built_once_for_each_value(read):
    request = read(TIES)
    assert request.settings_for(EMBED) is request.settings_for(layer(2))


# who takes part


def test_the_base_is_no_expert_and_its_weight_changes_nothing(read):
    request = read(TIES + "  - model: base\n    parameters: {weight: 3}\n")
    assert [e.name for e in request.experts] == ["A"] and request.base.name == "base" == request.donor.name
    assert "r.yml:6" in warned(request) and "`weight` of the base changes nothing" in warned(request)


@pytest.mark.parametrize(
    ("base", "top", "experts", "weight"),
    [
        ("  - model: base\n    parameters: {weight: 2}\n", "", ["A", "base"], (1, 2)),
        ("  - model: base\n", "parameters: {weight: 3}\n", ["A", "base"], (1, 3)),
        ("", "parameters: {weight: 3}\n", ["A", "base"], (1, 3)),  # an unlisted base is appended
        ("  - model: base\n", "", ["A"], (1,)),
        ("", "", ["A"], (1,)),
    ],
)
def test_linear_takes_a_base_with_a_weight(read, base, top, experts, weight):
    request = read(LINEAR + base + top + "base_model: base\n")
    assert [e.name for e in request.experts] == experts and request.base is None and request.donor.name == "base"
    assert request.settings_for(HEAD).weight == weight
    assert ("stays out of the merge" in warned(request)) == ("base" not in experts)


def test_slerp_starts_at_the_base_whatever_the_order(read):
    for models in ("[{model: A}, {model: B}]", "[{model: B}, {model: A}]", "[{model: B}]"):
        request = read(f"merge_method: slerp\nbase_model: A\nmodels: {models}\nparameters: {{t: .3}}")
        assert request.base.name == "A" and [e.name for e in request.experts] == ["B"]
        got = request.settings_for(HEAD)
        assert (got.t, got.dot_threshold) == (0.3, 0.9995)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "merge_method: slerp\nmodels: [{model: A}, {model: B}]\nparameters: {t: 0}",
            "`slerp` needs a base: the model at t = 0",
        ),
        ("merge_method: slerp\nbase_model: A\nmodels: [{model: B}, {model: C}]\nparameters: {t: 0}", "found 2 others"),
        ("merge_method: ties\nmodels: [{model: A}]\nparameters: {weight: 1}", "add `base_model: PATH`"),
        ("merge_method: ties\nbase_model: A\nmodels: [{model: A}]\nparameters: {weight: 1}", "only the base is listed"),
        ("merge_method: linear\nbase_model: A\nmodels: [{model: A}]", "only the base is listed"),
        ("merge_method: linear\nmodels: []", "must be a list of models"),
        ("merge_method: linear\nmodels: {model: A}", "must be a list of models"),
        ("merge_method: linear", "`models` is missing"),
        ("merge_method: linear\nmodels: [A]", "write `- model: A`"),
        ("merge_method: linear\nmodels: [{modell: A}]", "did you mean `model`?"),
        (LINEAR + "  - model: ./A", "r.yml:5 models[1]: `./A` is listed twice, first in line 3"),
        (
            "merge_method: linear\nmodels: [{model: A}, {model: B}]\n"
            "parameters: {weight: [{filter: mlp, value: 0}, {value: 1}]}",
            "sum to zero",
        ),
    ],
)
def test_who_takes_part_is_checked(refusal, text, told):
    assert told in refusal(text)


# references


def test_relative_paths_start_at_the_folder_then_here(folder, read, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    here = make_model(tmp_path / "here")
    make_model(tmp_path / "A")
    request = read("merge_method: linear\nmodels: [{model: A}, {model: here}]\nparameters: {weight: 1}")
    assert [e.path for e in request.experts] == [folder / "A", here]


def test_a_folder_may_have_a_plus_or_an_at_in_its_name(folder, read):
    make_model(folder / "C+sharp@1")
    assert (
        read("merge_method: linear\nmodels: [{model: C+sharp@1}]\nparameters: {weight: 1}").experts[0].name
        == "C+sharp@1"
    )


def test_references_as_mappings(read):
    request = read(
        "merge_method: linear\nmodels:\n  - model: {model: {path: A, revision: main}, override_architecture: Llama}\n"
        "  - model: {model: B}\nparameters: {weight: 1}"
    )
    assert [e.name for e in request.experts] == ["A", "B"]
    assert "no revision" in warned(request) and "override_architecture" in warned(request)


@pytest.mark.parametrize(
    ("model", "told", "mend"),
    [
        ("A+B", "`B` is no LoRA adapter", "adapter_config.json"),
        ("{model: A, lora: B}", "`B` is no LoRA adapter", "adapter_config.json"),
        ("adapter", "does not say what kind of adapter it is", "merge_and_unload"),
        (
            "mistralai/Mistral-7B-v0.1",
            "no folder here",
            "hf download mistralai/Mistral-7B-v0.1 --local-dir Mistral-7B-v0.1",
        ),
        ("org/name@dev", "no folder here", "hf download org/name --revision dev --local-dir name"),
        ("./bass", "there is no model at `./bass`", "did you mean `base`?"),
        ("gpt2", "there is no model at `gpt2`", "OWNER/NAME"),
        ("7", "expected the path of a model, found 7", "in quotes"),
        ("{modell: A}", "unknown key `modell`", "did you mean `model`?"),
        ("''", "expected the path of a model", "path of its folder"),
    ],
)
def test_references_that_are_no_folder(folder, refusal, model, told, mend):
    (folder / "adapter").mkdir(exist_ok=True)
    (folder / "adapter" / "adapter_config.json").write_text("{}")
    message = refusal(f"merge_method: linear\nmodels:\n  - model: {model}\n    parameters: {{weight: 1}}")
    assert "r.yml:3" in message and told in message and mend in message


def test_an_unreadable_first_model_is_told_at_its_line(tmp_path, refusal):
    (tmp_path / "empty").mkdir()
    message = refusal(f"merge_method: linear\nmodels:\n  - model: {tmp_path / 'empty'}\nparameters: {{weight: 1}}")
    assert "r.yml:3 models[0].model" in message and "safetensors" in message


# refusals by name


@pytest.mark.parametrize(
    ("text", "line", "word", "cure"),
    [
        ("merge_method: dare-ties\nmodels: [{model: A}]", 1, "dare-ties", "did you mean `dare_ties`?"),
        ("merge_method: 3\nmodels: [{model: A}]", 1, "merge_method", "linear"),
        ("merge_method: {a: 1}\nmodels: [{model: A}]", 1, "merge_method", "linear"),
        ("merge_method: linear\nslices: [{sources: []}]", 2, "`sources` must be a list", "- model: PATH"),
        ("merge_method: linear\nmodules: {default: {}}", 2, "either `models` or `slices`", "add one"),
        (LINEAR + "slices: []", 5, "`slices` and `models` exclude each other", "keep one"),
        (LINEAR + "chat_template: chat-ml", 5, "no chat template is called `chat-ml`", "did you mean `chatml`?"),
        (LINEAR + "tokenizer_source: union", 5, "`A` has no tokenizer files", "tokenizer.json"),
        (LINEAR + "tokenizer: {}", 5, "`A` has no tokenizer files", "tokenizer.json"),
        (LINEAR + "tokenizer: {tokens: 3}", 5, "`tokens` must be a mapping", "source: PATH"),
        (LINEAR + "tokenizer: {pad_to_multiple_of: 0.5}", 5, "no count of rows", "whole number"),
        (LINEAR + "tokenizer: {source: base}\ntokenizer_source: base", 5, "exclude each other", "keep one"),
        (LINEAR + "tokenizer: base", 5, "must be a mapping", "{source: base}"),
        (LINEAR + "tokenizer_source: B", 5, "`B` is none of the models", "`A`"),
        ("gate_mode: hidden\nexperts: []\nbase_model: A", 1, "mixture-of-experts recipe (`gate_mode`)", "-moe"),
        ("base_model: A\nexperts: []", 2, "mixture-of-experts recipe (`experts`)", "mergekit-moe"),
        ("genome: {models: [A]}\ntasks: []", 1, "an evolutionary search (`genome`)", "recipe that it found best"),
        (LINEAR + "dtype: int64", 5, "whole numbers", "bfloat16"),
        (LINEAR + "out_dtype: bfloat61", 5, "bfloat61", "did you mean `bfloat16`?"),
        (LINEAR + "x-spolia: {sed: 1}", 5, "`sed`", "did you mean `seed`?"),
        (LINEAR + "x-spolia: {seed: -1}", 5, "`seed` cannot be -1", "whole number"),
        (LINEAR + "x-spolia: {strict: 1}", 5, "`strict` cannot be 1", "true or false"),
        (LINEAR + "x-spolia: {on_size_mismatch: cut}", 5, "'cut'", "refuse or truncate"),
        (LINEAR + "x-spolia: {keep_padding: 1}", 5, "`keep_padding` cannot be 1", "true or false"),
        (LINEAR + "x-spolia: 3", 5, "must be a mapping", "on_size_mismatch"),
    ],
)  # fmt: skip
def test_refused_by_name_with_line_and_cure(refusal, text, line, word, cure):
    message = refusal(text)
    assert f"r.yml:{line}" in message and word in message and cure in message


def test_several_documents_are_refused():
    with pytest.raises(SpoliaError, match="2 documents in one file"):
        load(f"{LINEAR}---\n{LINEAR}", "r.yml")


@pytest.mark.parametrize(
    ("text", "place", "cure"),
    [
        (LINEAR + "paramaters: {normalize: 1}", "r.yml:5 paramaters", "did you mean `parameters`?"),
        ("merge_methods: linear\nmodels: [{model: A, parameters: {weight: 1}}]", "r.yml:1 merge_m", "`merge_method`?"),
        (LINEAR + "    wight: 1", "r.yml:5 models[0].wight", "known: model, parameters"),
        (LINEAR.replace("parameters: {weight: 1}", "weight: 1"), "r.yml:4 models[0].weight", "under `parameters:`"),
        (LINEAR + "normalize: false", "r.yml:5 normalize", "under `parameters:`"),
        (LINEAR + "parameters: {normalise: true}", "r.yml:5 parameters.normalise", "did you mean `normalize`?"),
        (TIES + "parameters: {lamda: 1}", "r.yml:6 parameters.lamda", "did you mean `lambda`?"),
        (TIES.replace("weight: 1", "weight: 1, densitty: 1"), "r.yml:5 models[0].parameters.densitty", "`density`?"),
        (TIES + "parameters: {density: [{filtre: mlp, value: 1}]}", "density[0].filtre", "did you mean `filter`?"),
        (LINEAR + "tokenizer: {sauce: base}", "r.yml:5 tokenizer.sauce", "did you mean `source`?"),
    ],
)  # fmt: skip
def test_unknown_keys_and_parameters_at_every_level(read, refusal, text, place, cure):
    message = refusal(text)
    assert place in message and cure in message
    if all(fatal not in text for fatal in ("merge_methods", "sauce", "    weight: 1")):  # these lack something too
        assert place in warned(read(text, strict=False))  # the same place, as a warning
        assert place in warned(read(text + "\nx-spolia: {strict: false}"))


def test_a_misspelt_required_key_is_told_once(refusal):
    message = refusal("merge_methods: linear\nmodles: [{model: A}]")
    assert message.count("mend:") == 2 and "is missing" not in message


@pytest.mark.parametrize("name", ["t", "normalize", "lambda", "rescale", "int8_mask"])
def test_settings_of_the_whole_merge_do_not_stand_in_a_model(refusal, name):
    message = refusal(TIES.replace("weight: 1", f"weight: 1, {name}: 1"))
    assert f"r.yml:5 models[0].parameters.{name}" in message and "move it to the top-level `parameters:`" in message


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("heavy", "found `heavy` (text)"),
        ("'true'", "without quotes"),
        (".nan", "found `nan`"),
        (".inf", "found `inf`"),
        ("", "found nothing"),
        ("[]", "the gradient is empty"),
        ("[1, x]", "weight[1]: expected a number"),
        ("[1, [2]]", "weight[1]: expected a number, found a list"),
        ("[1, {value: 2}]", "weight[1]: expected a number, found a mapping"),
        ("[{filter: mlp}]", "this entry has no `value`"),
        ("[{value: []}]", "the gradient is empty"),
        ("[{value: {a: 1}}]", "found a mapping"),
        ("[{filter: 1, value: 1}]", "`filter: 1` is not text"),
        ("[{filter: '', value: 1}]", "is not text"),
    ],
)
def test_values_that_are_no_numbers(refusal, value, told):
    message = refusal(f"merge_method: linear\nmodels:\n  - model: A\n    parameters:\n      weight: {value}")
    assert "r.yml:5" in message and told in message and "is not set" not in message


@pytest.mark.parametrize(("name", "value"), [("density", "-0.1"), ("gamma", "1.5"), ("epsilon", "[0.1, -1]")])
def test_shares_lie_between_0_and_1(refusal, name, value):
    method = {"density": "ties", "gamma": "breadcrumbs", "epsilon": "della"}[name]
    message = refusal(TIES.replace("ties", method) + f"parameters: {{{name}: {value}}}")
    assert "r.yml:6" in message and f"`{name}` is a share" in message


def test_all_errors_come_at_once_in_the_order_of_lines(refusal):
    message = refusal(
        "merge_method: teis\nbase_model: nowhere\nmodels:\n  - model: A\n    parameters: {wieght: 1}\ndtype: f99\n"
        "slices: []"
    )
    lines = [int(line.split(":")[1].split()[0]) for line in message.splitlines() if line.startswith("r.yml:")]
    assert lines == [1, 2, 5, 6, 7]


# warnings


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            LINEAR + "parameters: {int8_mask: true}",
            "r.yml:5 parameters.int8_mask: `int8_mask` changes nothing in `linear`",
        ),
        (LINEAR.replace("weight: 1", "weight: 1, density: .5"), "`density` changes nothing in `linear`"),
        (TIES + "parameters: {density: 20}", "density 20 keeps everything"),
        (TIES + "parameters: {density: [1, .9, .8, .7, .6]}", "5 values for 4 layers"),
        (TIES + "parameters: {density: [{value: 1}, {filter: mlp, value: .5}]}", "entries below it never count"),
    ],
)
def test_warnings_while_reading(read, text, told):
    assert told in warned(read(text))


def test_a_sound_recipe_has_no_warnings(read, folder):
    request = read(TIES + "parameters: {density: [{filter: mlp, value: [.1, .2]}, {value: .5}]}")
    assert request.warnings == [] and request.check_tensors(tensor_names(4)) == []


@pytest.mark.parametrize(
    ("entries", "told"),
    [
        ("{filter: self_atn, value: 1}", "no tensor's name contains `self_atn`\n  mend: did you mean `self_attn`?"),
        ("{filter: mlp, value: 1}, {filter: mlp.up, value: 1}", "`mlp.up` are taken by earlier entries"),
        ("{filter: layers.1, value: 1}", "`layers.1` matches `model.layers.10.mlp.up_proj.weight` too"),
        ("{filter: '1.', value: 1}", "to name one layer write `.1.`"),
    ],
)
def test_warnings_about_filters_once_the_tensors_are_known(read, entries, told):
    request = read(TIES.replace("model: A", "model: deep") + f"parameters: {{density: [{entries}, {{value: 1}}]}}")
    assert told in "\n".join(str(problem) for problem in request.check_tensors(tensor_names(12)))


def test_a_filter_that_names_one_layer_of_few_is_fine(read):
    request = read(TIES + "parameters: {density: [{filter: layers.1, value: 1}, {value: .5}]}")
    assert request.check_tensors(tensor_names(4)) == []


def test_dellas_window_outside_0_1(read):
    request = read(TIES.replace("ties", "della") + "parameters: {density: .1}")
    assert "density 0.1 and epsilon 0.15 of `A`" in str(request.check_tensors(tensor_names(4))[0])


def test_tensors_the_first_model_lacks_are_checked_later(read):
    request = read(LINEAR.replace("weight: 1", "weight: [{filter: model, value: 1}, {filter: lm_head, value: 1}]"))
    with pytest.raises(SpoliaError, match=r"for `visual\.proj`"):
        request.check_tensors([*tensor_names(4), "visual.proj"])
    with pytest.raises(SpoliaError, match=r"for `visual\.proj`"):
        request.settings_for("visual.proj")


# types, tokenizer, extras


@pytest.mark.parametrize(
    ("keys", "want"),
    [
        ("", None),
        ("dtype: bfloat16", "bfloat16"),
        ("dtype: torch.float16", "float16"),
        ("dtype: float32\nout_dtype: bf16", "bfloat16"),
        ("out_dtype: fp32", "float32"),
        ("out_dtype: float64", "float64"),
        ("dtype: null", None),
    ],
)
def test_dtypes(read, keys, want):
    assert read(LINEAR + keys).out_dtype == want


def test_donor_is_the_first_model_of_the_file(read):
    assert read("merge_method: linear\nmodels: [{model: C}, {model: A}]\nparameters: {weight: 1}").donor.name == "C"


def test_our_block_and_tolerated_keys(read):
    request = read(LINEAR + "name: mine\nresidual_weight: 1\nx-spolia: {seed: 7, on_size_mismatch: truncate}")
    assert (request.seed, request.on_size_mismatch, request.warnings) == (7, "truncate", [])
    assert (read(LINEAR).seed, read(LINEAR).on_size_mismatch) == (0, "refuse")


def test_the_kept_text_reads_back_to_the_same(read):
    request = read(TIES + "parameters: {density: [{filter: mlp, value: [1, .5]}, {value: 3e-1}]}\ndtype: bf16")
    again = read(request.recipe)
    assert request.recipe_name == "mergekit_config.yml" and again.recipe == request.recipe
    assert all(again.settings_for(n) == request.settings_for(n) for n in tensor_names(4))


# the examples of mergekit's repository, for the methods read here


def test_example_linear(read):
    request = read(
        "models:\n  - model: A\n    parameters:\n      weight: 1.0\n  - model: B\n    parameters:\n      weight: 0.3\n"
        "  - model: C\n    parameters:\n      weight: 0.5\nmerge_method: linear\ndtype: float16\n"
    )
    assert request.settings_for(HEAD).weight == (1.0, 0.3, 0.5) and request.settings_for(HEAD).normalize
    assert (request.method.name, request.out_dtype, request.base) == ("average", "float16", None)


def test_example_gradient_slerp(read):
    request = read(
        "models: [{model: A}, {model: B}]\nmerge_method: slerp\nbase_model: A\nparameters:\n  t:\n"
        "    - filter: self_attn\n      value: [0, 0.5, 0.3, 0.7, 1]\n"
        "    - filter: mlp\n      value: [1, 0.5, 0.7, 0.3, 0]\n"
        "    - value: 0.5 # fallback\ndtype: float16\n"
    )
    attn = [request.settings_for(layer(i, "self_attn.q_proj")).t for i in range(4)]
    # t = 1/3 of five knots lies a third of the way from .5 to .3
    assert attn == pytest.approx([0, 0.5 - 0.2 / 3, 0.3 + 0.4 * 2 / 3, 1])
    assert request.settings_for(layer(0)).t == 1 and request.settings_for(HEAD).t == 0.5


def test_example_ties(read):
    request = read(
        "models:\n  - model: A\n    parameters:\n      density: [1, 0.7, 0.1] # density gradient\n      weight: 1.0\n"
        "  - model: B\n    parameters:\n      density: 0.5\n      weight: [0, 0.3, 0.7, 1] # weight gradient\n"
        "  - model: C\n    parameters:\n      density: 0.33\n      weight:\n"
        "        - filter: mlp\n          value: 0.5\n"
        "        - value: 0\nmerge_method: ties\nbase_model: base\nparameters:\n  normalize: true\n  int8_mask: true\n"
        "dtype: float16\n"
    )
    got = request.settings_for(layer(1))
    assert got.density == pytest.approx((0.8, 0.5, 0.33)) and got.weight == pytest.approx((1, 0.3, 0.5))
    assert request.settings_for(HEAD).weight == (1, 0, 0) and request.settings_for(HEAD).density == (1, 0.5, 0.33)
    assert [str(w) for w in request.warnings] == [
        "r.yml:21 parameters.int8_mask: `int8_mask` changes nothing in `ties`\n  mend: remove it"
    ]


def test_example_ties_without_normalize(read):
    request = read(TIES + "parameters: {normalize: false, int8_mask: true}\n")
    assert not request.settings_for(HEAD).normalize


def test_task_arithmetic(read):
    request = read(TIES.replace("ties", "task_arithmetic") + "parameters: {lambda: .7, normalize: true}")
    assert request.settings_for(HEAD).model_dump() == {"weight": (1.0,), "scale": 0.7, "normalize": True}


# the door


@pytest.mark.parametrize(
    ("value", "want"),
    [
        ({"merge_method": "x"}, True),
        ({"merge_methods": "x", "models": []}, True),
        ({"slices": []}, True),
        ({"gate_mode": "hidden"}, True),
        ({"spolia": 1, "pool": {}, "method": {}}, False),
        ({"spolia": 1, "models": []}, False),
        ({"pool": {}, "method": {}}, False),
        ({}, False),
        ([], False),
        (None, False),
    ],
)
def test_is_mergekit(value, want):
    assert is_mergekit(value) is want


def test_a_document_that_is_no_mapping(folder):
    with pytest.raises(SpoliaError, match="is a mapping"):
        read_mergekit(Marked("r.yml", ["linear"]), folder=folder)


_KEYS = [
    "merge_method",
    "models",
    "base_model",
    "parameters",
    "dtype",
    "tokenizer",
    "tokenizer_source",
    "slices",
    "modules",
    "chat_template",
    "x-spolia",
    "junk",
]
_WORDS = st.sampled_from(
    [
        "linear",
        "ties",
        "slerp",
        "A",
        "B",
        "base",
        "weight",
        "t",
        "filter",
        "value",
        "model",
        "sources",
        "default",
        "slices",
    ]
)
_ANY = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | _WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_WORDS | st.just("parameters"), inner, max_size=3),
    max_leaves=8,
)


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(value=st.dictionaries(st.sampled_from(_KEYS), _ANY, min_size=1), strict=st.booleans())
def test_nonsense_is_refused_and_never_crashes(folder, value, strict):
    try:
        read_mergekit(Marked("r.yml", {"merge_method": "linear", **value}), folder=folder, strict=strict)
    except SpoliaError as error:
        assert all(problem.where.startswith("r.yml") for problem in error.problems)


def test_reading_never_imports_torch(folder):
    code = (
        "import sys; from pathlib import Path\n"
        "from spolia.runs.mergekit import read_mergekit; from spolia.runs.yamlmarks import load\n"
        f"r = read_mergekit(load({TIES!r}, 'r.yml'), folder=Path({str(folder)!r})); r.settings_for('lm_head.weight')\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
