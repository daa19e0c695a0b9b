"""Recipes: every mistake told at once with its place; what is written loads back; sizes in words."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spolia.errors import Problems, SpoliaError
from spolia.runs.overrides import apply_overrides, parse_path
from spolia.runs.recipe import load_recipe

GOOD = """\
spolia: 1
seed: 0
pool:
  base: ./base
  experts:
    - ./math
    - {name: code, path: ./code}
method:
  name: ties
  density: 0.2
output: {dtype: bfloat16}
"""
DIGITS = "spolia: 1\npool:\n  source: digits\n  domains: [upright, turned]\nmethod:\n  name: ties\n  weight: [1, 2]\n"


@pytest.fixture
def folder(tmp_path):
    for name in ("base", "math", "code"):
        (tmp_path / name).mkdir()
    return tmp_path


def written(folder: Path, text: str) -> Path:
    file = folder / "my.yaml"
    file.write_text(text)
    return file


def problems_of(folder: Path, text: str, *overrides: str) -> list:
    with pytest.raises(SpoliaError) as caught:
        load_recipe(written(folder, text), overrides)
    return caught.value.problems


def test_a_recipe_is_read_whole(folder):
    recipe = load_recipe(written(folder, GOOD))
    assert (recipe.name, recipe.family, recipe.method.name, recipe.seed) == ("my", "merge", "ties", 0)
    assert recipe.settings.density == 0.2
    assert recipe.pool.base.path == folder / "base"  # relative to the recipe, not to the current folder
    assert [(e.name, e.path) for e in recipe.pool.experts] == [("math", folder / "math"), ("code", folder / "code")]
    assert recipe.output.dtype == "bfloat16"
    assert recipe.output.max_shard_size == 5 * 10**9


TYPOS = [  # (in the good recipe, written instead, place, what, mend)
    ("spolia: 1\n", "", "my.yaml:1", "does not say which version", "add `spolia: 1`"),
    ("spolia: 1", "spolia: 2", "my.yaml:1 spolia", "version 2", "upgrade"),
    ("spolia: 1", "spolia: 0", "my.yaml:1 spolia", "no version 0", "write `spolia: 1`"),
    ("spolia: 1", "spolia: one", "my.yaml:1 spolia", "`one`", "whole number"),
    ("seed: 0", "sede: 0", "my.yaml:2 sede", "no `sede`", "`seed`"),
    ("seed: 0", "seed: -1", "my.yaml:2 seed", "-1 is too small", "at least 0"),
    ("seed: 0", "seeds: 3", "my.yaml:2 seeds", "merged once", "seeds: 1"),
    ("pool:", "pols:", "my.yaml:3 pols", "no `pols`", "`pool`"),
    ("  base:", "  bse:", "my.yaml:4 pool.bse", "no `bse`", "`base`"),
    ("  base: ./base\n", "", "my.yaml:3 pool", "ties needs a base", "base: PATH"),
    ("./base", "./bass", "my.yaml:4 pool.base", "/bass", "`base`"),
    ("./math", "./maht", "my.yaml:6 pool.experts[0]", "/maht", "`math`"),
    ("path: ./code", "pth: ./code", "my.yaml:7 pool.experts[1].pth", "no `pth`", "`path`"),
    ("name: code", "name: math", "my.yaml:3 pool", "two models are called `math`", "another"),
    ("    - ./math\n    - {name: code, path: ./code}\n", "    []\n", "my.yaml:5 pool.experts", "empty", "one item"),
    ("base: ./base", "source: folder", "my.yaml:4 pool.source", "`folder`", "`folders`"),
    ("name: ties", "name: tis", "my.yaml:9 method.name", "`tis`", "`ties`"),
    ("name: ties", "name: dare-ties", "my.yaml:9 method.name", "`dare-ties`", "`dare_ties`"),
    ("  name: ties\n", "", "my.yaml:8 method", "`name` is missing", "add `name`"),
    ("density:", "densty:", "my.yaml:10 method.densty", "no `densty`", "`density`"),
    ("density: 0.2", "density: 1.7", "my.yaml:10 method.density", "", "Yadav"),
    ("density: 0.2", "density: much", "my.yaml:10 method.density", "`much`", "expected: number"),
    ("density: 0.2", "density: [0.1, 0.2, 0.3]", "my.yaml:10 method.density", "3 values for 2", "give 2 numbers"),
    ("density: 0.2", "density: [0.1, x]", "my.yaml:10 method.density[1]", "`x`", "expected"),
    ("density: 0.2", "scope: modle", "my.yaml:10 method.scope", "`modle`", "`model`"),
    ("dtype: bfloat16", "dtype: bfloat61", "my.yaml:11 output.dtype", "`bfloat61`", "`bfloat16`"),
    ("dtype: bfloat16", "dtpe: bfloat16", "my.yaml:11 output.dtpe", "no `dtpe`", "`dtype`"),
    ("dtype: bfloat16", "max_shard_size: 5X", "my.yaml:11 output.max_shard_size", "`5X`", "5GB"),
]  # fmt: skip


@pytest.mark.parametrize(("right", "wrong", "where", "what", "mend"), TYPOS, ids=[t[1][:24] for t in TYPOS])
def test_a_typo_is_answered_with_place_and_cure(folder, right, wrong, where, what, mend):
    assert right in GOOD
    found = problems_of(folder, GOOD.replace(right, wrong, 1))
    hits = [p for p in found if p.where == f"{folder}/{where}"]
    assert hits, [str(p) for p in found]
    assert what in hits[0].what
    assert mend in hits[0].mend


def test_every_mistake_is_told_at_once(folder):
    text = GOOD.replace("seed: 0", "sede: 0").replace("./math", "./maht").replace("density", "densty")
    text = text.replace("bfloat16", "bf16")
    places = [p.where.removeprefix(f"{folder}/") for p in problems_of(folder, text, "method.scal=2", "seed=-1")]
    expected = {"my.yaml:2 sede", "my.yaml:6 pool.experts[0]", "my.yaml:10 method.densty", "my.yaml:11 output.dtype"}
    assert set(places) == expected | {"override method.scal", "override seed"}
    assert len(places) == len(set(places))


def test_a_wrong_domain_is_told(folder):
    (problem,) = problems_of(folder, DIGITS.replace("turned", "turnd"))
    assert problem.where.endswith("my.yaml:4 pool.domains[1]")
    assert "`turned`" in problem.mend
    assert "twice" in problems_of(folder, DIGITS.replace("turned", "upright"))[0].what


def test_more_experts_than_the_method_takes(folder):
    text = DIGITS.replace("turned]", "turned, inverted]").replace("ties", "slerp").replace("  weight: [1, 2]\n", "")
    (problem,) = problems_of(folder, text)
    assert problem.what == "3 experts; slerp takes 1 to 2"


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "mapping"),
        ("- a\n", "mapping"),
        ("spolia: [1\n", "not valid YAML"),
        ("spolia: 1\nspolia: 1\n", "twice"),
        ("merge_method: ties\n", "mergekit recipe"),
        ("spolia: 1\npool: x\nmethod: ties\n", "not what belongs"),
        ("spolia: 1\n", "`pool` is missing"),
    ],
)
def test_what_is_no_recipe_is_refused(folder, text, what):
    assert what in str(SpoliaError(problems=problems_of(folder, text)))


OVERRIDES = [  # (override, place, what, mend)
    ("method.lrr=3", "override method.lrr", "no `lrr`", ""),
    ("method.densty=0.3", "override method.densty", "no `densty`", "`density`"),
    ("metod.density=0.3", "override metod.density", "no `metod`", "`method`"),
    ("method.density=high", "override method.density", "`high`", "number"),
    ("method.name=tiess", "override method.name", "`tiess`", "`ties`"),
    ("pool.experts[5]=x", "override pool.experts[5]", "out of range", "pool.experts="),
    ("pool.experts.last=x", "override pool.experts.last", "not an index", "[0]"),
    ("seed.x=1", "override seed.x", "nothing can stand below", "seed="),
    ("method[0]=1", "override method[0]", "not a list", ""),
    ("method.density", "override method.density", "not of the form key=value", "key=value"),
    ("a..b=1", "override a..b=1", "not of the form key=value", "key=value"),
    ("pool.experts=[a", "override pool.experts", "not valid YAML", "quote"),
    ("pool.base=./bas", "override pool.base", "/bas", ""),
]


@pytest.mark.parametrize(("override", "where", "what", "mend"), OVERRIDES, ids=[o[0] for o in OVERRIDES])
def test_a_wrong_override_is_told_by_its_path(folder, override, where, what, mend):
    (problem,) = problems_of(folder, GOOD, override)
    assert problem.where == where
    assert what in problem.what
    assert mend in problem.mend


def test_overrides_reach_every_depth(folder, monkeypatch):
    monkeypatch.chdir(folder)
    (folder / "sub").mkdir()
    (folder / "sub" / "poem").mkdir()
    overrides = [
        "method.density=[1e-1, 0.3]",
        "pool.experts[0]=sub/poem",
        "pool.experts.1.name=C",
        "output.max_shard_size=1GiB",
    ]
    recipe = load_recipe(written(folder, GOOD), [*overrides, "seed=7", "output.dtype="])
    assert recipe.settings.density == (0.1, 0.3)
    assert [e.name for e in recipe.pool.experts] == ["poem", "C"]
    assert recipe.pool.experts[0].path == folder / "sub" / "poem"
    assert (recipe.seed, recipe.output.dtype, recipe.output.max_shard_size) == (7, None, 2**30)


def test_paths_of_a_recipe_start_at_it_and_those_typed_start_here(folder, monkeypatch):
    here = folder / "here"
    (here / "mine").mkdir(parents=True)
    monkeypatch.chdir(here)
    recipe = load_recipe(written(folder, GOOD), ["pool.base=mine"])
    assert recipe.pool.base.path == here / "mine"
    assert recipe.pool.experts[0].path == folder / "math"


@given(st.lists(st.one_of(st.from_regex(r"[a-z_]+", fullmatch=True), st.integers(0, 99)), min_size=1, max_size=5))
def test_a_written_path_is_read_back(parts):
    path = ("a", *parts)
    text = "a" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    assert parse_path(text) == path


@given(st.text(max_size=30))
def test_no_override_text_escapes_as_another_error(text):
    value = {"seed": 0, "pool": {"experts": ["a"]}}
    apply_overrides(value, [text], Problems())
    assert value == {"seed": 0, "pool": {"experts": ["a"]}}  # the given value is not changed


def test_the_resolved_recipe_loads_to_itself(folder):
    first = load_recipe(written(folder, GOOD), ["method.weight=[1, 2.5]", "output.chunk_memory=123456789"])
    again = load_recipe(written(folder, first.to_yaml()))
    assert again.to_yaml() == first.to_yaml()
    assert (again.settings, again.pool, again.output) == (first.settings, first.pool, first.output)
