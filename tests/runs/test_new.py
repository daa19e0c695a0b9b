"""Recipes that spolia writes: packaged ones, `new`, and the schema for editors."""

from __future__ import annotations

import json
from typing import get_args

import pytest
import yaml

from spolia import catalog
from spolia.errors import SpoliaError
from spolia.runs.editors import json_schema
from spolia.runs.fields import describe
from spolia.runs.new import recipe_text, write_recipe
from spolia.runs.packaged import FOLDER, packaged
from spolia.runs.recipe import load_recipe
from spolia.runs.schema import Domain

pytestmark = pytest.mark.sampled(3)  # of many cases alike


def test_every_method_has_its_two_recipes():
    expected = {f"{m.family}/{m.name}{end}" for m in catalog.METHODS for end in ("", "-tiny")}
    assert set(packaged()) == expected


@pytest.mark.parametrize("name", packaged())
def test_a_packaged_recipe_is_current_and_says_the_defaults(name):
    method = catalog.find(name.partition("/")[2].removesuffix("-tiny"))
    text = (FOLDER / f"{name}.yaml").read_text()
    assert text == recipe_text(method, tiny=name.endswith("-tiny")), "write them again: python -m spolia.runs.new"
    recipe = load_recipe(name, check_paths=False)
    assert recipe.settings == method.settings_class()()
    assert recipe.name == name
    written_out = yaml.safe_load(text)["method"]
    assert set(written_out) == {"name", *method.settings_class().model_fields}


@pytest.mark.parametrize("method", catalog.METHODS, ids=lambda m: m.name)
def test_every_setting_of_a_new_recipe_has_a_comment_with_its_source(method):
    lines = recipe_text(method, file="my.yaml").splitlines()
    lines = lines[lines.index("method:") :]  # a problem may have a setting of the same name
    for field in describe(method.settings_class()):
        assert field.source, f"{method.name}.{field.name} does not say where its default comes from"
        at = next(i for i, line in enumerate(lines) if line.startswith(f"  {field.name}: "))
        assert lines[at - 1].lstrip().startswith("#")


def test_new_does_not_overwrite(tmp_path):
    method = catalog.find("ties")
    file = write_recipe(method, tmp_path / "my.yaml", tiny=True)
    assert load_recipe(file).settings == method.settings_class()()
    with pytest.raises(SpoliaError, match="exists"):
        write_recipe(method, file)


@pytest.mark.parametrize(
    ("name", "mend"),
    [
        ("merge/tis", "`merge/ties`"),
        ("ties-tiny", "`merge/ties-tiny`"),
        ("merge/dare-ties", "`merge/dare_ties`"),
        ("my.yml", "`my.yaml`"),
    ],
)
def test_an_unknown_recipe_is_answered_with_the_nearest(tmp_path, monkeypatch, name, mend):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.yaml").write_text("spolia: 1\n")
    with pytest.raises(SpoliaError) as caught:
        load_recipe(name)
    assert mend in caught.value.problems[0].mend


def test_a_packaged_recipe_without_models_says_how_to_name_them():
    with pytest.raises(SpoliaError, match=r"pool\.base=PATH"):
        load_recipe("merge/ties")


def test_domains_are_those_of_the_data():
    import spolia.data.digits as digits  # imports no torch

    assert get_args(Domain) == digits.DOMAINS


def test_the_schema_knows_every_method_and_setting():
    schema = json_schema()
    json.dumps(schema)
    assert schema["additionalProperties"] is False
    for method in catalog.METHODS:
        room = schema["$defs"][f"{method.family}/{method.name}"]
        assert set(room["properties"]) == {"name", *method.settings_class().model_fields}
        assert room["additionalProperties"] is False
    pointers = [ref["$ref"] for ref in schema["properties"]["method"]["anyOf"]]
    assert all(p.removeprefix("#/$defs/").replace("~1", "/") in schema["$defs"] for p in pointers)
