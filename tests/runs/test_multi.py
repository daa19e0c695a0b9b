"""Files with several recipes: order, what is checked before any work, going on, and what is left behind."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from spolia.errors import SpoliaError
from spolia.runs import merging
from spolia.runs.mergekit_multi import arrange
from spolia.runs.verbs import merge_recipe, plan
from spolia.runs.yamlmarks import load_all

TWO = """\
name: ab
merge_method: linear
models: [{model: a, parameters: {weight: 1}}, {model: b, parameters: {weight: 1}}]
---
merge_method: linear
models: [{model: ab, parameters: {weight: 1}}, {model: c, parameters: {weight: 3}}]
"""


@pytest.fixture
def folder(tmp_path: Path, write_model: Callable[..., Path]) -> Path:
    for i, name in enumerate("abc"):
        config = {"num_hidden_layers": 2, "vocab_size": 4}
        tensors = {f"model.layers.{n}.w.weight": torch.full((4, 4), 10.0 * i + n) for n in range(2)}
        write_model(tmp_path / name, tensors | {"model.embed_tokens.weight": torch.full((4, 4), float(i))}, config)
    return tmp_path


@pytest.fixture
def merge(folder):
    def merge(text: str, **options):
        (folder / "r.yml").write_text(text)
        return merge_recipe(folder / "r.yml", folder / "out", **options)

    return merge


def first(out: Path, layer: int = 0) -> float:
    return float(load_file(out / "model.safetensors")[f"model.layers.{layer}.w.weight"][0, 0])


def ordered(text: str) -> list[str]:
    return [document.name for document in arrange(load_all(text, "r.yml"))]


def document(name: str, *models: str) -> str:
    title = f"name: {name}\n" if name else ""
    return f"{title}merge_method: linear\nmodels: [{', '.join(f'{{model: {m}}}' for m in models)}]\n"


@pytest.mark.parametrize(
    ("documents", "order"),
    [
        ([("x", "a"), ("", "x")], ["x", ""]),
        ([("", "x"), ("x", "a")], ["x", ""]),
        ([("", "y", "x"), ("x", "a"), ("y", "x")], ["x", "y", ""]),
        ([("x", "a"), ("y", "x"), ("z", "y+lora")], ["x", "y", ""]),  # all have names: the one no other uses
        ([("", "y"), ("x", "a"), ("y", "x"), ("spare", "a")], ["x", "y", ""]),  # `spare` is not asked for
    ],
)
def test_the_order_of_work(documents, order):
    assert ordered("---\n".join(document(*d) for d in documents)) == order


@pytest.mark.parametrize(
    ("documents", "word", "cure"),
    [
        ([("x", "y"), ("y", "x"), ("", "x")], "in a circle: `x` -> `y` -> `x`", "break it"),
        ([("x", "x"), ("", "x")], "in a circle: `x` -> `x`", "break it"),
        ([("x", "y"), ("y", "x")], "in a circle", "leave out the `name`"),
        ([("x", "a"), ("x", "b"), ("", "x")], "two documents are called `x`, first in r.yml:1", "rename"),
        ([("", "a"), ("", "b")], "2 documents have no name", "`name:`"),
        ([("x", "a"), ("y", "b")], "which of `x`, `y` is the result?", "leave out the `name`"),
        ([("../x", "a"), ("", "b")], "cannot be a name", "letters"),
        ([("3", "a"), ("", "b")], "cannot be a name", "letters"),
    ],
)
def test_refused(documents, word, cure):
    with pytest.raises(SpoliaError) as caught:
        arrange(load_all("---\n".join(document(*d) for d in documents), "r.yml"))
    assert word in str(caught.value) and cure in str(caught.value) and "r.yml:" in str(caught.value)


def test_a_model_in_between(merge, folder):
    out = merge(TWO)
    assert first(out) == (5 + 3 * 20) / 4 and first(out, 1) == (6 + 3 * 21) / 4
    assert not (folder / "out.parts").exists()
    assert (out / "mergekit_config.yml").read_text() == TWO


def test_slices_of_a_model_in_between(merge):
    """Its number of layers is known before it exists."""
    text = (
        "name: tall\nmerge_method: passthrough\nslices:\n  - sources: [{model: a}]\n  - sources: [{model: b}]\n---\n"
        "merge_method: passthrough\nslices: [{sources: [{model: tall, layer_range: [1, 4]}]}]\n"
    )
    out = merge(text)
    assert [first(out, n) for n in range(3)] == [1, 10, 11]
    with pytest.raises(SpoliaError, match="`tall` has 4 layers, the range ends at 5"):
        merge(text.replace("[1, 4]", "[1, 5]"))


def test_everything_is_checked_before_the_first_merge(merge, folder, monkeypatch):
    monkeypatch.setattr(merging, "merge_of", lambda *_: pytest.fail("a merge was begun"))
    with pytest.raises(SpoliaError, match=r"r\.yml:6 models\[1\]\.model: there is no model at `nowhere`"):
        merge(TWO.replace("model: c", "model: nowhere"))
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "c", "r.yml"]


def test_the_same_command_goes_on_and_leaves_out_what_is_finished(merge, folder, monkeypatch):
    begun, real, fail = [], merging.merge_of, [True]

    def watched(prepared, *rest):
        begun.append([model.name for model in prepared.pool.models])
        if prepared.pool.experts[0].name == "ab" and fail:
            raise KeyboardInterrupt
        return real(prepared, *rest)

    monkeypatch.setattr(merging, "merge_of", watched)
    with pytest.raises(KeyboardInterrupt):
        merge(TWO)
    assert (folder / "out.parts" / "ab" / "model.safetensors").is_file()
    fail.clear()
    assert first(merge(TWO)) == 16.25
    assert begun == [["a", "b"], ["ab", "c"], ["ab", "c"]]


def test_what_is_finished_but_of_another_recipe_is_made_anew(merge, folder):
    text = TWO + "x-spolia: {keep_intermediate: true}\n"
    merge(text)
    assert (folder / "out.parts" / "ab" / "config.json").is_file()
    other = text.replace("{model: b, parameters: {weight: 1}}", "{model: b, parameters: {weight: 9}}")
    assert first(merge(other, overwrite=True)) == (9 + 3 * 20) / 4


def test_the_plan_of_all_documents(merge, folder):
    made = merge(TWO, dry_run=True)
    assert [phase.name for phase in made.phases] == ["merge ab", "merge out"]
    assert [given.name for given in made.inputs] == ["a", "b", "c"]
    assert made.bytes_out == 2 * (folder / "a" / "model.safetensors").stat().st_size or made.bytes_out > 0
    assert sorted(p.name for p in folder.iterdir()) == ["a", "b", "c", "r.yml"]


def test_elsewhere_one_document_is_wanted(merge, folder):
    (folder / "r.yml").write_text(TWO)
    with pytest.raises(SpoliaError, match="2 documents in one file") as caught:
        plan(folder / "r.yml")
    assert "spolia merge" in str(caught.value)


def test_the_seed_reaches_every_document(merge, folder):
    text = (
        "name: x\nmerge_method: dare_linear\nbase_model: a\nmodels: [{model: b}]\nparameters: {weight: 1, density: .5}\n"
        "---\nmerge_method: passthrough\nmodels: [{model: x}]\n"
    )
    embeds = []
    for seed in (1, 1, 2):
        out = merge(text, seed=seed, overwrite=True)
        embeds.append(load_file(out / "model.safetensors")["model.layers.0.w.weight"])
    assert torch.equal(embeds[0], embeds[1]) and not torch.equal(embeds[0], embeds[2])
