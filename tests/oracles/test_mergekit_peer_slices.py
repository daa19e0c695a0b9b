"""mergekit, run on the same slices and tokenizers, writes the same numbers.

Needs SPOLIA_MERGEKIT: the python of an environment with mergekit. Without it these tests are left out.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spolia.runs.verbs import merge_recipe

PYTHON = os.environ.get("SPOLIA_MERGEKIT", "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PYTHON, reason="SPOLIA_MERGEKIT does not name a python with mergekit"),
]
TOKENS = {"base": "abc", "A": "bad", "B": "abe", "P": "abc", "Q": "abc"}  # P and Q have the base's vocabulary
ROWS = {"base": 5, "A": 8, "B": 6, "P": 5, "Q": 5}

RECIPES = {
    "gradients": """
merge_method: linear
parameters: {normalize: false}
slices:
  - sources: [{model: base, layer_range: [0, 1], parameters: {weight: [.2, .8]}}]
  - sources: [{model: base, layer_range: [1, 4], parameters: {weight: [.2, .4, .8]}}]
  - sources:
      - model: base
        layer_range: [1, 3]
        parameters: {weight: [{filter: layers.1., value: 3}, {filter: mlp, value: [0, 1]}, {value: 2}]}
""",
    "other layers": """
merge_method: task_arithmetic
base_model: base
parameters: {weight: [0.3, 1], normalize: [{filter: layers.3., value: 1}, {value: 0}]}
slices:
  - sources: [{model: base, layer_range: [0, 2]}, {model: P, layer_range: [1, 3]}]
  - sources: [{model: base, layer_range: [2, 4]}, {model: Q, layer_range: [0, 2], parameters: {weight: .7}}]
""",
    "stack": """
merge_method: passthrough
slices:
  - sources: [{model: base, layer_range: [0, 3]}]
  - sources: [{model: base, layer_range: [1, 4], parameters: {scale: [{filter: down_proj, value: 0}, {value: 1}]}}]
""",
    "legacy ends": """
merge_method: linear
base_model: base
slices:
  - sources: [{model: base, layer_range: [0, 2], parameters: {weight: 1}}]
  - sources:
      - {model: P, layer_range: [2, 4], parameters: {weight: 1}}
      - {model: Q, layer_range: [0, 2], parameters: {weight: 2}}
x-spolia: {legacy_post_weights: true}
""",
    "slerp": """
merge_method: slerp
base_model: base
parameters: {t: [{filter: self_attn, value: [0, .5, .3, .7, 1]}, {value: .4}]}
slices:
  - sources: [{model: P, layer_range: [0, 2]}, {model: base, layer_range: [0, 2]}]
  - sources: [{model: Q, layer_range: [2, 4]}, {model: base, layer_range: [2, 4]}]
""",
    "union": """
merge_method: linear
base_model: base
models:
  - {model: A, parameters: {weight: 1}}
  - {model: B, parameters: {weight: 3}}
  - {model: base, parameters: {weight: .5}}
tokenizer:
  source: union
  pad_to_multiple_of: 8
  tokens:
    "<new>": {source: {kind: zero}}
    d: {source: {kind: model_token, model: B, token: a}, force: true}
""",
    "another tokenizer": """
merge_method: ties
base_model: base
models: [{model: A, parameters: {weight: 1, density: .6}}, {model: B, parameters: {weight: .4, density: .5}}]
tokenizer: {source: A}
""",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny Llamas of 4 layers whose tokenizers differ."""
    import transformers as hf
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    root = tmp_path_factory.mktemp("models")
    for seed, (name, letters) in enumerate(TOKENS.items()):
        vocab = {token: i for i, token in enumerate(["<s>", "</s>", *letters])}
        made = Tokenizer(models.BPE(vocab=vocab, merges=[]))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
        tokenizer = hf.PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")
        if name in "AB":
            tokenizer.add_tokens([f"<{name}>"])
        tokenizer.save_pretrained(root / name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            config = hf.LlamaConfig(
                vocab_size=ROWS[name], hidden_size=8, intermediate_size=8, num_hidden_layers=4, num_attention_heads=2,
                num_key_value_heads=2, bos_token_id=0, eos_token_id=1,
            )  # fmt: skip
            hf.LlamaForCausalLM(config).save_pretrained(root / name)
    return root


def vocabulary(out: Path) -> dict[str, int]:
    data = json.loads((out / "tokenizer.json").read_text())
    return data["model"]["vocab"] | {entry["content"]: entry["id"] for entry in data["added_tokens"]}


@pytest.mark.parametrize("name", RECIPES)
def test_the_same_numbers(folder, tmp_path, name):
    text = RECIPES[name]
    for model in TOKENS:
        text = text.replace(f"model: {model},", f"model: {folder / model},").replace(
            f"model: {model}\n", f"model: {folder / model}\n"
        )
    text = text.replace("source: A}", f"source: {folder / 'A'}}}")
    recipe = tmp_path / "r.yml"
    recipe.write_text(text)
    command = [str(Path(PYTHON).with_name("mergekit-yaml")), str(recipe), str(tmp_path / "theirs")]
    subprocess.run(command, check=True, capture_output=True)
    ours = merge_recipe(recipe, tmp_path / "ours")
    theirs = tmp_path / "theirs"
    counts = [json.loads((out / "config.json").read_text()) for out in (ours, theirs)]
    assert all(counts[0][key] == counts[1][key] for key in ("num_hidden_layers", "vocab_size"))
    mine, wanted = vocabulary(ours), vocabulary(theirs)
    assert mine.keys() == wanted.keys()
    places = torch.arange(counts[0]["vocab_size"])
    places[list(mine.values())] = torch.tensor(
        [wanted[token] for token in mine]
    )  # ids of new tokens follow a set's order there
    got, want = load_file(ours / "model.safetensors"), load_file(theirs / "model.safetensors")
    assert got.keys() == want.keys()
    for tensor, value in want.items():
        row = value[places] if len(value) == len(places) and ("embed" in tensor or "lm_head" in tensor) else value
        # weights near 0.02 in fp32, summed in another order
        torch.testing.assert_close(got[tensor], row, rtol=0, atol=2e-8, msg=lambda text, t=tensor: f"{t}: {text}")
