"""YAML whose values know their line: whatever the text, plain Python values or a SpoliaError with file, line and cure."""

from __future__ import annotations

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.errors import SpoliaError
from spolia.runs.yamlmarks import Marked, dotted, load, load_all

TEXT = """\
# a comment
spolia: 1
method:
  name: ties
  density: 3e-4
models:
  - {model: ./a, weight: 0.5}
  - model: ./b
    weight:
      - 1
      - .5
"""


def test_values_and_lines() -> None:
    found = load(TEXT, "recipe.yaml")
    assert found.value == yaml.safe_load(TEXT) | {"method": {"name": "ties", "density": 3e-4}}
    places = {
        ("spolia",): 2, ("method",): 3, ("method", "density"): 5, ("models",): 6, ("models", 0): 7,
        ("models", 0, "weight"): 7, ("models", 1): 8, ("models", 1, "weight"): 9, ("models", 1, "weight", 1): 11,
    }  # fmt: skip
    assert {path: found.lines[path] for path in places} == places
    assert found.where(("models", 1, "weight", 1)) == "recipe.yaml:11 models[1].weight[1]"
    assert found.where(("method", "scale", "x")) == "recipe.yaml:3 method.scale.x"  # nearest known line
    assert found.where() == "recipe.yaml:2" and Marked("r", None).where(("a",)) == "r a"
    assert dotted(("models", 0, "parameters", "t", 1, 2)) == "models[0].parameters.t[1][2]"


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-4", 3e-4), ("1E5", 1e5), ("-2e3", -2000.0), ("1_0e2", 1000.0), (".5e1", 5.0), ("1.5e+3", 1500.0),
        ("'3e-4'", "3e-4"), ('"1e5"', "1e5"), ("1e", "1e"), ("e5", "e5"), ("0.5", 0.5), ("7", 7), ("0x1F", 31),
        ("true", True), ("null", None), ("~", None), (".nan", math.nan), ("-.inf", -math.inf), ("2024-01-01", "2024-01-01"),
        ("08", "08"), ("v1.2.3", "v1.2.3"), ("|\n  a\n  b\n", "a\nb\n"), ("=", "="), ("''", ""),
    ],
)  # fmt: skip
def test_scalars(text: str, value: Any) -> None:
    found = load(f"a: {text}").value["a"]
    assert type(found) is type(value) and (found == value or (value != value and found != found))


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        ("1: a", ["1"]),
        ("true: a", ["true"]),
        ("~: a", ["~"]),
        ("1.50: a", ["1.50"]),
        ("on: a", ["on"]),
        ("'': a", [""]),
    ],
)
def test_keys_are_text_as_written(text: str, keys: list[str]) -> None:
    assert list(load(text).value) == keys


def test_documents() -> None:
    assert [d.value for d in load_all("--- 1\n--- [2]\n---\n")] == [1, [2], None]
    assert load("").value is None and load("# nothing").value is None


def test_aliases_are_values() -> None:
    assert load("a: &x {b: 1}\nc: *x\nd: [*x, *x]").value == {"a": {"b": 1}, "c": {"b": 1}, "d": [{"b": 1}, {"b": 1}]}


LAUGHS = "\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 10))])
BAD = {
    "duplicate": ("a: 1\nb: 2\na: 3", "r.yaml:3 a"),
    "duplicate below": ("m:\n  a: 1\n  a: 1", "r.yaml:3 m.a"),
    "duplicate by another spelling": ("1: a\n'1': b", "r.yaml:2 1"),
    "two documents": ("--- 1\n--- 2", "2 documents"),
    "tab": ("a:\n\tb: 1", "spaces, not tabs"),
    "open bracket": ("a: [1, 2", "r.yaml:"),
    "open quote": ("a: 'x", "r.yaml:"),
    "bad indent": ("a: 1\n  b: 2", "r.yaml:2"),
    "unknown alias": ("a: *b", "r.yaml:1"),
    "null byte": ("a: \x00", "r.yaml"),
    "bad escape": ('a: "\\x"', "r.yaml:1"),
    "other version": ("%YAML 9.9\n--- a", "r.yaml"),
    "itself": ("a: &a [*a]", "r.yaml"),
    "itself below": ("a: &a {b: {c: *a}}", "r.yaml"),
    "a billion laughs": (LAUGHS, "r.yaml"),
    "deep lists": ("[" * 600, "r.yaml"),
    "deep closed lists": ("[" * 200 + "]" * 200, "r.yaml"),
    "deep mappings": ("{a: " * 600, "r.yaml"),
    "python scalar": ("a: !!python/name:os.system", "r.yaml:1 a"),
    "python list": ("x: 1\na: !!python/object/apply:os.system [echo]", "r.yaml:2 a"),
    "python mapping": ("a: !!python/object:os.x {b: 1}", "r.yaml:1 a"),
    "own tag": ("a: !vault x", "r.yaml:1 a"),
    "own tag on a list": ("a: !ref [x]", "r.yaml:1 a"),
    "own tag on a mapping": ("a: !ref {x: 1}", "r.yaml:1 a"),
    "merge key": ("a: &x {b: 1}\nc: {<<: *x}", "r.yaml:2"),
    "no integer": ("a: !!int foo", "r.yaml:1 a"),
    "no float": ("a: !!float foo", "r.yaml:1 a"),
    "no boolean": ("a: !!bool foo", "r.yaml:1 a"),
    "empty hexadecimal": ("a: 0x_", "r.yaml:1 a"),
    "integer of 5000 digits": ("a: " + "9" * 5000, "r.yaml:1 a"),
    "binary": ("a: !!binary zzz", "r.yaml:1 a"),
    "list as key": ("[a]: b", "r.yaml:1"),
    "mapping as key": ("? {a: 1}\n: 2", "r.yaml:1"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_documents_name_file_line_and_cure(case: str) -> None:
    text, word = BAD[case]
    with pytest.raises(SpoliaError) as caught:
        load(text, "r.yaml")
    assert word in str(caught.value) and len(str(caught.value)) < 1000
    assert all(
        problem.where.startswith("r.yaml") and problem.what and problem.mend for problem in caught.value.problems
    )


def test_every_duplicate_is_told_at_once() -> None:
    with pytest.raises(SpoliaError) as caught:
        load("a: 1\na: 2\nb: {c: 1, c: 2}")
    assert len(caught.value.problems) == 2


WORDS = st.text("ab:1.-~ #'\"{}[],&*é²\n", max_size=8)  # not the odd line breaks that PyYAML folds, nor 1e5 in quotes
PLAIN = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | WORDS
TREES = st.recursive(
    PLAIN,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(WORDS, inner, max_size=4),
    max_leaves=15,
)


@settings(max_examples=100, deadline=None)
@given(TREES)
def test_what_is_dumped_is_read(tree: Any) -> None:
    for text in (yaml.safe_dump(tree), yaml.safe_dump(tree, default_flow_style=True, allow_unicode=True)):
        found = load(text)
        assert found.value == tree
        assert all(1 <= line <= text.count("\n") + 1 for line in found.lines.values())


@settings(max_examples=300, deadline=None)
@given(st.text(st.sampled_from("ab01e.-+_:#,?!&*|>%@'\"[]{}<= \t\n~xn\x00\ud800é²"), max_size=40))
def test_any_text_is_read_or_refused(text: str) -> None:
    try:
        load_all(text, "r.yaml")
    except SpoliaError as error:
        assert all(problem.where.startswith("r.yaml") for problem in error.problems)
