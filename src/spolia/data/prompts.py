"""Class names and templates of image tasks: what a zero-shot head is made of.

Names come, in this order, from the user's file, from the data set itself (the names of its ClassLabel), or from the few
lists here that are plain facts. Templates come from the user's file, else the one plain sentence here. The papers use
templates of their own for every set, which these are not: heads made with other words give other numbers.

A file is YAML or JSON, one entry a task, classes in the order of their labels:

    mnist:
      classes: ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]
      templates: ["a photo of the digit {}."]
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spolia.core.files import read_whole
from spolia.errors import Problems, SpoliaError, did_you_mean

PLAIN = ("a photo of {}.",)
_DIGITS = tuple("0123456789")
_DIGIT = ("a photo of the digit {}.",)
_CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
_EUROSAT = ("annual crop", "forest", "herbaceous vegetation", "highway", "industrial area", "pasture", "permanent crop",
            "residential area", "river", "sea or lake")  # fmt: skip
KEYS = ("classes", "templates")


@dataclass(frozen=True)
class Prompts:
    """Class names in the order of their labels, and templates with one `{}` each. `source`: where the names come from."""

    classes: tuple[str, ...]
    templates: tuple[str, ...] = PLAIN
    source: str = "given"

    def texts(self) -> list[str]:
        """Every template of the first class, then of the next."""
        return [template.replace("{}", name) for name in self.classes for template in self.templates]


KNOWN = {
    "mnist": Prompts(_DIGITS, _DIGIT, "built in"),
    "svhn": Prompts(_DIGITS, _DIGIT, "built in"),
    "cifar10": Prompts(_CIFAR10, PLAIN, "built in"),
    "eurosat": Prompts(_EUROSAT, ("a satellite photo of {}.",), "built in"),
}


def prompts_of(task: str, names: Sequence[str] | None = None, given: Mapping[str, Prompts] | None = None) -> Prompts:
    """The prompts of `task`: its entry in `given`, else the data set's `names`, else the list here.

    Names of a data set that are bare numbers say nothing of what is seen, unless the task is to read digits: then the list
    here is taken, where its length is theirs. SpoliaError where nothing tells the classes, or counts disagree.
    """
    known = KNOWN.get(task)
    mend = "give them in a file: `classes` and `templates` under the task's name"
    if given is not None and task in given:
        found = given[task]
        if names is not None and len(found.classes) != len(names):
            what = f"{len(found.classes)} classes in the file, {len(names)} in the data set"
            raise SpoliaError(what, where=task, mend="list them in the order of their labels")
        return found
    if names is not None and not all(re.fullmatch(r"\d+", name.strip()) for name in names):
        return Prompts(tuple(map(words, names)), known.templates if known else PLAIN, "data set")
    if known is None:
        what = "its data set names no classes" if names is None else "its data set numbers the classes only"
        raise SpoliaError(what, where=task, mend=mend)
    if names is not None and len(names) != len(known.classes):
        what = f"{len(names)} classes in the data set, {len(known.classes)} known here"
        raise SpoliaError(what, where=task, mend=mend)
    return known


def class_names(features: Mapping[str, Any], column: str) -> list[str] | None:
    """Names of the ClassLabel `column` of a data set of `datasets`; None where it is a plain number."""
    if column not in features:
        raise SpoliaError(f"there is no column `{column}`", where="features", mend=did_you_mean(column, features))
    names = getattr(features[column], "names", None)
    return [str(name) for name in names] if names else None


def words(name: str) -> str:
    """A label as one would say it: `/a/airport_terminal` and `AirportTerminal` become `airport terminal`."""
    text = re.sub(r"^/[a-z]/", "", name.strip())
    if " " not in text:
        text = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", text)
        text = text if text.isupper() else text.lower()
    return " ".join(re.sub(r"[_/]+", " ", text).split())


def read_prompts(file: str | os.PathLike[str]) -> dict[str, Prompts]:
    """The prompts in a YAML or JSON file by task. SpoliaError with everything that is wrong in it."""
    where = str(file)
    try:
        text = read_whole(Path(file)).decode()
        raw = json.loads(text) if Path(file).suffix == ".json" else yaml.safe_load(text)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        said = " ".join(str(error).split())[:160]
        raise SpoliaError(f"cannot be read: {said}", where=where, mend="write YAML or JSON in UTF-8") from None
    if not isinstance(raw, dict) or not raw:
        raise SpoliaError("holds no tasks", where=where, mend="write `TASK: {classes: [...], templates: [...]}`")
    problems, found = Problems(), dict[str, Prompts]()
    for task, entry in raw.items():
        if isinstance(task, str) and isinstance(entry, dict):
            found[task] = _entry(entry, f"{where} {task}", problems)
        else:
            problems.add(f"{where} {task}", "is no task with classes", "write `classes: [...]` below its name")
    problems.raise_if_any()
    return found


def _entry(entry: dict[Any, Any], where: str, problems: Problems) -> Prompts:
    for key in entry:
        if key not in KEYS:
            problems.add(f"{where}.{key}", "is no key of a task", did_you_mean(str(key), KEYS))
    lists: dict[str, tuple[str, ...]] = {}
    for key in KEYS:
        value = entry.get(key, list(PLAIN) if key == "templates" else None)
        if not isinstance(value, list) or not value:
            problems.add(f"{where}.{key}", "is no list, or an empty one", f"write `{key}: [...]`")
            value = []
        for number, text in enumerate(value):
            if not isinstance(text, str) or not text.strip():
                mend = f'write it in quotes: "{text}"'  # YAML reads 3 and no as something else
                problems.add(f"{where}.{key}[{number}]", f"{text!r} is no text", mend)
            elif key == "templates" and text.count("{}") != 1:
                mend = "write `{}` once, where the class goes"
                problems.add(f"{where}.{key}[{number}]", f"{text!r} has not one `{{}}`", mend)
        lists[key] = tuple(text for text in value if isinstance(text, str))
    twice = sorted({name for name in lists["classes"] if lists["classes"].count(name) > 1})
    if twice:
        problems.add(f"{where}.classes", f"`{twice[0]}` stands twice", "give every class words of its own")
    return Prompts(lists["classes"], lists["templates"], "file")
