"""Hostile names: of models, of the recipe, of the folder to write; and how the command ends."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spolia
from spolia.cli import main
from spolia.runs.verbs import merge_recipe, plan, read_request

pytestmark = pytest.mark.filterwarnings("ignore::spolia.errors.SpoliaWarning")

NATIVE = "spolia: 1\npool: {experts: [./a, %s]}\nmethod: {name: average}\n"
LINEAR = "merge_method: linear\nmodels: [{model: ./a, parameters: {weight: 1}}, {model: %s, parameters: {weight: 1}}]\n"
NAMES = (
    "", ".", "..", "/", "//", "./r.yaml", "/dev/zero", "/dev/null", "/dev/stdin", "/proc/self/mem", "/etc/passwd",
    "a\0b", "\0", "\ud800",
    "\udcff", "x" * 256, "x" * 300, "\u00e4" * 200, "./" + "x" * 5000, "o/" + "x" * 200, "o/" + "x" * 5000,
    "x/" * 3000, "~", "~/",
    "~nobody-of-this-name/x", "~nobody-of-this-name", "+", "++", "a+", "+a", "./a+./b", "./a+", "a+b+c", "./a+./a",
    "nobody", "nobody/here",
    "nobody/here@", "nobody/here@main", "nobody/here@@", "@main", "https://example.com/x", "file:///etc/passwd",
    "./a/../nobody", "./A ",
    "a\nb", "\x1b[2J", "$HOME/x", "`id`", "$(touch ran)", "; touch ran", "| touch ran", "%s", "{0}", "{{7*7}}", "*",
    "?", "./a/*", "-", "--help",
    "./a/model-00001-of-00002.safetensors/x", "./a/config.json", "./a/tokenizer.json", "CON", "./b\u202e", "\u2024/b",
    "..\\b",
)  # fmt: skip
OUTS = (
    "", ".", "/", "a", "./a", "a\0b", "\ud800", "x" * 256, "x" * 248, "\u00e4" * 128, "/proc/x", "/dev/null/x",
    "r.yaml", "r.yaml/x",
)  # fmt: skip
FINE_OUTS = (
    "out", "x" * 240, "\u00e4" * 110, "a b", "-", "--help", "new/folder/out", "a/x", "out.partial.x", "$HOME",
    "\udcff", "\x1b[2J", "a\nb",
)  # fmt: skip


@pytest.fixture
def there(models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The models' folder, made the current one: names are relative to it."""
    monkeypatch.chdir(models)
    monkeypatch.setenv("HOME", str(models))
    return models


def ids(names: tuple[str, ...]) -> list[Any]:
    return [pytest.param(name, id=f"{len(name)} {ascii(name)[:24]}") for name in names]


@pytest.mark.sampled(8)
@pytest.mark.parametrize("form", [NATIVE, LINEAR], ids=["native", "mergekit"])
@pytest.mark.parametrize("name", ids(NAMES))
def test_models(name: str, form: str, there: Path, ends: Callable[..., None]) -> None:
    (there / "r.yaml").write_text(form % json.dumps(name))
    ends(there, "refused", lambda: merge_recipe("r.yaml", "out", threads=1))
    ends(there, "refused", lambda: plan("r.yaml"))


@pytest.mark.slow  # three seconds
@pytest.mark.parametrize("name", ids(tuple(name for name in NAMES if not name.startswith("~"))))
def test_models_of_a_call(name: str, there: Path, ends: Callable[..., None]) -> None:
    ends(there, "refused", lambda: spolia.merge(["a", name], out="out", threads=1))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", ids(NAMES))
def test_recipes(name: str, there: Path, ends: Callable[..., None]) -> None:
    (there / "r.yaml").write_text(NATIVE % "./nobody")
    ends(there, "refused", lambda: read_request(name))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", ids(OUTS))
def test_folders_that_cannot_be_written(name: str, there: Path, ends: Callable[..., None]) -> None:
    (there / "r.yaml").write_text(NATIVE % "./b")
    ends(there, "refused", lambda: merge_recipe("r.yaml", name, threads=1))


@pytest.mark.sampled(8)
@pytest.mark.parametrize("name", ids(FINE_OUTS))
def test_odd_folders_that_can_be_written(name: str, there: Path, ends: Callable[..., None]) -> None:
    (there / "r.yaml").write_text(NATIVE % "./b")
    ends(there, "averaged", lambda: merge_recipe("r.yaml", name, threads=1))


@pytest.mark.parametrize(
    "name", ids(("\udcff", "\x1b[2J", "a\nb", "<script>", "---\nlicense: mit\n---", "$HOME", "x" * 255, "%s{0}"))
)
def test_odd_folders_that_can_be_read(name: str, there: Path, ends: Callable[..., None]) -> None:
    os.rename("b", name)
    made = list[Path]()

    def call() -> Path:
        made.append(spolia.merge(["a", name], out="out", threads=1))
        os.rename(name, "b")  # where `ends` looks for it
        return made[0]

    ends(there, "averaged", call)
    card = (made[0] / "README.md").read_text(encoding="utf-8")
    assert card.count("\n---\n") == 1 and "\x1b" not in card


COMMANDS = {
    "no recipe": ["merge", "nobody.yaml", "out"],
    "a recipe that is a folder": ["merge", "a", "out"],
    "a recipe that is a model": ["merge", "a/model-00001-of-00002.safetensors", "out"],
    "a recipe without end": ["merge", "/dev/zero", "out"],
    "a recipe half written": ["merge", "half.yaml", "out"],
    "a size that is none": ["merge", "r.yaml", "out", "--max-shard-size", "9" * 5000],
    "a folder that stands": ["merge", "r.yaml", "a"],
    "an override without end": ["run", "r.yaml", "seed=" + "9" * 5000],
    "an override that is a tag": ["run", "r.yaml", "method.name=!!python/name:os.system"],
    "an unknown option": ["merge", "r.yaml", "out", "--fast"],
    "an unknown command": ["destroy"],
    "models that are none, inspected": ["inspect", "nobody", "a"],
    "models that are none, compared": ["compare", "nobody", "a"],
    "a file of the system, compared": ["compare", "/dev/zero", "a"],
    "a run that is none": ["report", "nobody"],
    "a method that is none": ["show", "\x1b[2J"],
    "a name of half a letter": ["show", "\udcff"],
    "a page where no folder is": ["inspect", "a", "b", "--html", "nobody/x.html"],
    "a plan of nothing": ["plan", ""],
}


@pytest.mark.parametrize("given", COMMANDS.values(), ids=COMMANDS)
def test_commands(given: list[str], there: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (there / "r.yaml").write_text(NATIVE % "./b")
    (there / "half.yaml").write_text("spolia: [")
    before = sorted(there.rglob("*"))
    with pytest.raises(SystemExit) as end:
        main(given)
    told = capsys.readouterr().err
    assert end.value.code == 2 and told.strip() and "Traceback" not in told and "\x1b" not in told
    assert sorted(there.rglob("*")) == before


def test_there_are_enough() -> None:
    assert len(set(NAMES)) == len(NAMES) and 4 * len(NAMES) + len(OUTS) + len(FINE_OUTS) + len(COMMANDS) >= 250
