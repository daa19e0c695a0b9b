"""Class names and templates: whose names are taken, how labels are said, and what is wrong in a file of them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from spolia.data.prompts import KNOWN, PLAIN, Prompts, class_names, prompts_of, read_prompts, words
from spolia.errors import SpoliaError


def test_names_come_from_the_file_then_the_data_set_then_here() -> None:
    own = {"mnist": Prompts(tuple("abcdefghij"), ("an {}",), "file")}
    digits = list("0123456789")
    assert prompts_of("mnist", digits, own) is own["mnist"]
    assert prompts_of("mnist", digits).source == "built in"
    assert prompts_of("mnist").classes == tuple(digits)
    found = prompts_of("dtd", ["banded", "polka-dotted"])
    assert (found.classes, found.templates, found.source) == (("banded", "polka-dotted"), PLAIN, "data set")
    assert prompts_of("eurosat", ["AnnualCrop", "Forest"]).templates == KNOWN["eurosat"].templates


@pytest.mark.parametrize(
    ("task", "names", "own", "said"),
    [
        ("sun397", None, None, "names no classes"),
        ("gtsrb", [str(i) for i in range(43)], None, "numbers the classes only"),
        ("mnist", ["0", "1"], None, "2 classes in the data set, 10 known here"),
        ("dtd", ["banded"], {"dtd": Prompts(("a", "b"))}, "2 classes in the file, 1 in the data set"),
    ],
)
def test_what_nobody_names_is_told(task: str, names: list[str] | None, own: dict | None, said: str) -> None:
    with pytest.raises(SpoliaError, match=said) as caught:
        prompts_of(task, names, own)
    assert caught.value.problems[0].mend and caught.value.problems[0].where == task


@pytest.mark.parametrize(
    ("label", "said"),
    [
        ("/a/airport_terminal", "airport terminal"),
        ("/b/bow_window/indoor", "bow window indoor"),
        ("AnnualCrop", "annual crop"),
        ("dense_residential", "dense residential"),
        ("AM General Hummer SUV 2000", "AM General Hummer SUV 2000"),
        ("polka-dotted", "polka-dotted"),
        ("BMW", "BMW"),
    ],
)
def test_labels_are_said_as_words(label: str, said: str) -> None:
    assert words(label) == said
    assert words(said) == said  # saying it twice changes nothing


def test_known_lists_are_whole() -> None:
    for task, known in KNOWN.items():
        assert len(known.classes) == len(set(known.classes)) == 10, task
        assert all(template.count("{}") == 1 for template in known.templates)
    assert Prompts(("a", "b"), ("x {}", "y {}")).texts() == ["x a", "y a", "x b", "y b"]


def test_class_names_of_a_data_set() -> None:
    features = {"label": SimpleNamespace(names=["cat", "dog"]), "image": object()}
    assert class_names(features, "label") == ["cat", "dog"]
    assert class_names(features, "image") is None
    with pytest.raises(SpoliaError, match="did you mean `label`"):
        class_names(features, "labels")


def test_files(tmp_path: Path) -> None:
    text = 'mnist:\n  classes: ["0", "1"]\n  templates: ["the digit {}."]\npets: {classes: [cat, dog]}\n'
    (tmp_path / "p.yaml").write_text(text)
    found = read_prompts(tmp_path / "p.yaml")
    assert found["mnist"] == Prompts(("0", "1"), ("the digit {}.",), "file") and found["pets"].templates == PLAIN
    (tmp_path / "p.json").write_text(json.dumps({"pets": {"classes": ["cat", "dog"]}}))
    assert read_prompts(tmp_path / "p.json")["pets"] == found["pets"]


def test_everything_wrong_in_a_file_is_told_at_once(tmp_path: Path) -> None:
    file = tmp_path / "p.yaml"
    file.write_text(
        "mnist: {classes: [0, no, one], templates: [a digit], template: [x]}\ndtd: {classes: [a, a]}\n"
        "cars: {templates: ['{} {}']}\nsvhn: 3\n"
    )
    with pytest.raises(SpoliaError) as caught:
        read_prompts(file)
    text = str(caught.value)
    for said in (
        "mnist.classes[0]: 0 is no text", "mnist.classes[1]: False is no text", "mnist.templates[0]",
        "did you mean `templates`?", "dtd.classes: `a` stands twice", "cars.classes: is no list", "cars.templates[0]",
        "svhn: is no task",
    ):  # fmt: skip
        assert said in text, text
    assert "mnist.classes[2]" not in text


@pytest.mark.parametrize("text", ["", "[1, 2]", "a: [", "\x00", "!!python/object/apply:os.system ['false']"])
def test_a_file_that_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text(text)
    with pytest.raises(SpoliaError):
        read_prompts(tmp_path / "p.yaml")
