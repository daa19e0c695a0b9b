"""The model card: metadata that parses, every section, licences inherited with care, and no path of this machine."""

from __future__ import annotations

import re

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from spolia.reports.card import public_name, render_card, without_paths

RECIPE = """\
spolia: 1
pool:
  base: /home/ann/models/base
  experts: [/data/my models/math, {name: code, path: "/data/x y/code"}]
  more:
  - ~/private/chat/
  - 'C:\\Users\\ann\\chat'   # from file:///home/ann/chat
  - ./near/by
"""


@pytest.fixture
def facts(ledger):
    return {
        "name": "/home/ann/out/ties-digits",
        "method": "ties",
        "summary": "trim small changes, elect a sign, merge what agrees",
        "paper": "Yadav et al. 2023, arXiv 2306.01708",
        "base": {"name": "base", "path": "/home/ann/models/base", "license": "apache-2.0"},
        "experts": [{"name": "ann/math", "license": "Apache-2.0"}, {"name": "code", "license": "apache-2.0"}],
        "dtype": "bfloat16",
        "parameters": 123456789,
        "tensors": 12,
        "recipe": RECIPE,
        "recipe_name": "merge/ties",
        "data": {"merge": "no data; weights only"},
        "results": ledger,
        "seed": 7,
        "versions": {"spolia": "0.1.0"},
        "warnings": ["expert code at /home/ann/code: odd dtype"],
        "limits": ["measured on digits only"],
    }


def parts(card):
    _, front, body = card.split("---\n", 2)
    return yaml.safe_load(front), body


def test_metadata(facts):
    front, _ = parts(render_card(facts))
    assert front["base_model"] == ["ann/math"]  # names without an owner are other models on a hub
    assert front["base_model_relation"] == "merge"
    assert front["tags"] == ["merge", "spolia", "ties"]
    assert front["library_name"] == "safetensors"
    assert front["license"] == "apache-2.0"
    (index,) = front["model-index"]
    assert index["name"] == "ties-digits"
    assert [r["metrics"][0]["value"] for r in index["results"]] == [80.0, 70.0, 75.0]
    assert all({"task", "dataset", "metrics"} <= set(r) for r in index["results"])


@pytest.mark.parametrize(
    "heading",
    ["What this is", "How it was made", "Results", "Data touched", "Limits", "Licence", "How to load it", "Citation"],
)
def test_sections(facts, heading):
    assert f"\n## {heading}\n" in render_card(facts)


def test_what_it_says(facts):
    card = render_card(facts)
    for part in (
        "A merge of 2 models (`ann/math`, `code`) on the base `base`, made with ties",
        "123,456,789 parameters, 12 tensors, stored as bfloat16.",
        "Recipe merge/ties, seed 7, spolia 0.1.0.",
        "- merge: no data; weights only",
        "- measured on digits only",
        "**80.0 [79.0, 82.0]**",
        "expert upright (baseline)",
        "<https://arxiv.org/abs/2306.01708>",
    ):
        assert part in card


def test_no_path_of_this_machine(facts):
    facts["results"]["rows"][0]["method"] = "/home/ann/secret/ties"
    facts["results"]["notes"] = "see /home/ann/notes.txt"
    card = render_card(facts)
    for private in (
        "/home",
        "ann/models",
        "/data",
        "my models",
        "x y",
        "private",
        "Users",
        "ann/out",
        "secret",
        "file:",
    ):
        assert private not in card
    _, body = parts(card)
    recipe = yaml.safe_load(re.search(r"```yaml\n(.*?)```", body, re.DOTALL)[1])
    assert recipe["pool"] == {
        "base": "base",
        "experts": ["math", {"name": "code", "path": "code"}],
        "more": ["chat", "chat", "./near/by"],
    }


@given(st.lists(st.from_regex(r"[A-Za-z0-9_.]*[A-Za-z0-9_]", fullmatch=True), min_size=2, max_size=5))
def test_absolute_paths_are_cut_to_their_last_part(names):
    path, last = "/" + "/".join(names), names[-1]
    for text in ("{}", "at {}, then", "({})", "'{}'", "on:{}", "{}/ and {}"):
        assert without_paths(text.replace("{}", path)) == text.replace("{}/", last).replace("{}", last)
    assert without_paths(f"~{path} C:{path} file://{path}") == f"{last} {last} {last}"


@pytest.mark.parametrize("text", ["https://a.org/b/c", "and/or", "1 / 2", "./near", "owner/name", "5 GB/s", "a <b> c"])
def test_what_is_no_path_stays(text):
    assert without_paths(text) == text


def test_public_names():
    assert public_name("owner/name") == "owner/name"
    assert public_name("/x/y/name/") == "name"
    assert public_name("./models/name") == "name"
    assert public_name("C:\\x\\name") == "name"
    assert public_name("") == "model"


def test_licences_that_differ_are_all_listed_and_none_is_claimed(facts):
    facts["experts"][0]["license"] = "llama3"
    front, body = parts(render_card(facts))
    assert "license" not in front
    assert "ann/math (expert): llama3" in body and "different licences" in body


def test_an_unknown_licence_must_be_checked(facts):
    del facts["experts"][0]["license"]
    front, body = parts(render_card(facts))
    assert "license" not in front
    assert "Check it before you share" in body and "ann/math (expert): unknown" in body


def test_without_results_nothing_is_claimed(facts):
    for results in (None, {}, {"rows": []}):
        front, body = parts(render_card(facts | {"results": results}))
        assert "model-index" not in front
        assert "This merge has not been measured." in body


def test_transformers_where_there_is_a_config(facts):
    card = render_card(facts | {"config": {"architectures": ["GPT2LMHeadModel"]}})
    assert parts(card)[0]["library_name"] == "transformers"
    assert 'AutoModelForCausalLM.from_pretrained("ties-digits")' in card
    assert "AutoModel.from_pretrained" in render_card(facts | {"config": {"model_type": "x"}})
    own = render_card(facts | {"config": {"model_type": "spolia_small"}})  # which transformers does not know
    assert "load_file" in own and parts(own)[0]["library_name"] == "safetensors"
    assert "load_file" in render_card(facts)


def test_a_card_of_nothing():
    front, body = parts(render_card({}))
    assert "base_model" not in front and "merged model" in body


def test_names_cannot_break_metadata_or_markdown(facts):
    evil = "a: b\n---\n# <script>x</script> `|`"
    facts |= {"method": evil, "summary": evil, "recipe": "```\nevil\n```", "experts": [{"name": evil, "license": evil}]}
    card = render_card(facts)
    front, body = parts(card)
    assert len(front["tags"]) == 3
    assert "<script>" not in re.sub(r"`[^`\n]*`", "", body)
    assert "````yaml" in body
