"""Fuzzed texts: recipes with characters changed, JSON with any value at any place. Each is refused or read, never a crash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.runs.mergekit import is_mergekit, read_mergekit
from spolia.runs.recipe import Source, check_recipe
from spolia.runs.verbs import merge_recipe
from spolia.runs.yamlmarks import load_all

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")]

NATIVE = """spolia: 1
seed: 7
pool:
  base: {name: o, path: ./base}
  experts: [./a, {name: bee, path: ./b}]
method: {name: ties, density: [0.2, 0.5], scale: 1e-1, normalize: true, zero_sign: "+"}
output: {dtype: bfloat16, max_shard_size: 5GB}
"""
MERGEKIT = """merge_method: dare_ties
base_model: ./base
models:
- {model: ./a, parameters: {weight: [0.1, 0.5], density: 0.5}}
- {model: {model: {path: ./b}}, parameters: {weight: [{filter: embed, value: 1}, {value: 0.3}]}}
parameters: {normalize: true, lambda: 1.0}
tokenizer: {source: union, tokens: {"<x>": {source: ./a, force: true}}, pad_to_multiple_of: 8}
chat_template: chatml
dtype: float32
x-spolia: {seed: 3, strict: true}
"""
SIGNS = "{}[]:,-&*!?|>%@`'\"#\n \t\\~<=0129.eE+_xnNyaTf\0\x1b\x85\ud800\udfff\ufeff\u2028\u202e\u0663\U0001f5ff"
EDITS = st.lists(
    st.tuples(st.floats(0, 1), st.integers(0, 8), st.text(st.sampled_from(SIGNS), max_size=6)), min_size=1, max_size=4
)
LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(st.sampled_from(SIGNS), max_size=4)
    | st.sampled_from(["a", "b", "ab", "<x>", "a b", "BPE", "Unigram", "llama", ""])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "content", "a", "\ud800", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)
PLACES = {
    "tokenizer.json": [
        ["model"], ["model", "vocab"], ["model", "merges"], ["model", "type"], ["model", "vocab", "a"], ["model",
        "vocab", "zz"],
        ["model", "merges", 0], ["added_tokens"], ["added_tokens", 0], ["added_tokens", 0, "id"], ["added_tokens", 0,
        "content"],
        ["added_tokens", 0, "special"], ["normalizer"],
    ],
    "config.json": [
        ["model_type"], ["architectures"], ["vocab_size"], ["eos_token_id"], ["num_hidden_layers"], ["text_config"],
        ["torch_dtype"],
        ["tie_word_embeddings"], ["layer_types"],
    ],
    "tokenizer_config.json": [["chat_template"], ["added_tokens_decoder"], ["model_max_length"]],
    "generation_config.json": [["eos_token_id"], ["bos_token_id"], ["x"]],
}  # fmt: skip
SPOT = st.sampled_from([(file, tuple(place)) for file, places in PLACES.items() for place in places])


def edited(text: str, edits: list[tuple[float, int, str]]) -> str:
    """Each edit: (where, how many characters go, what comes in their place)."""
    for share, cut, new in edits:
        at = int(share * len(text))
        text = text[:at] + new + text[at + cut :]
    return text


def read(text: str, folder: Path) -> None:
    for marked in load_all(text, "r.yaml"):
        if is_mergekit(marked.value):
            read_mergekit(marked, folder=folder)
        else:
            check_recipe(Source("r", text, marked, folder))


@pytest.mark.parametrize("form", [NATIVE, MERGEKIT], ids=["native", "mergekit"])
@settings(max_examples=150, deadline=None)
@given(edits=EDITS)
def test_recipes_with_characters_changed(
    form: str, edits: list[tuple[float, int, str]], sound: Path, told: Callable[..., str | None]
) -> None:
    told(lambda: read(edited(form, edits), sound))


def test_the_recipes_are_sound_before(sound: Path, told: Callable[..., str | None]) -> None:
    for form in (NATIVE, MERGEKIT):
        assert told(lambda form=form: read(form, sound)) is None


@pytest.mark.parametrize("template", ["", "chat_template: chatml\n"], ids=["plain", "template"])
@settings(max_examples=40, deadline=None)
@given(who=st.sampled_from("ab"), spots=st.lists(st.tuples(SPOT, VALUES), min_size=1, max_size=3))
def test_json_with_any_value_anywhere(
    template: str,
    who: str,
    spots: list[tuple[tuple[str, tuple[Any, ...]], Any]],
    sound: Path,
    tmp_path_factory: pytest.TempPathFactory,
    told: Callable[..., str | None],
) -> None:
    world = tmp_path_factory.mktemp("fuzz")
    for name in "ab":
        shutil.copytree(sound / name, world / name)
    for (file, place), value in spots:
        data = json.loads((world / who / file).read_bytes())
        here = data
        try:
            for part in place[:-1]:
                here = here[part]
            here[place[-1]] = value
        except (TypeError, IndexError, KeyError):  # an earlier spot has taken this place away
            continue
        (world / who / file).write_text(json.dumps(data))
    models = "".join(f"- {{model: ./{m}, parameters: {{weight: 1}}}}\n" for m in "ab")
    text = f"merge_method: linear\nmodels:\n{models}tokenizer: {{source: union}}\n{template}"
    (world / "r.yaml").write_text(text)
    if told(lambda: merge_recipe(world / "r.yaml", world / "out", threads=1)) is not None:
        assert not (world / "out").exists() and not (world / "out.partial").exists()
    else:
        for file in (world / "out").glob("*.json"):
            json.loads(file.read_bytes())
    shutil.rmtree(world)
