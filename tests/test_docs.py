"""Pages that cannot lie: their Python runs, their commands parse, their recipes load, their links lead somewhere.

```python    the blocks of a page run one after the other, in a folder that holds a tiny base, its fine-tunes math, code
             and chat, and recipe.yml, a recipe of mergekit. A comment `<!-- not run: reason -->` just before a block
             leaves it out.
```console   lines that begin with `spolia` or `$ spolia` must parse and name methods, recipes and settings that exist;
             `make` targets must exist. Words in CAPITALS and … stand for something of the reader's.
```yaml      a block with `spolia:` or `merge_method:` on top is a recipe and must load. A first line `# my.yaml` names
             it for the commands of the page; so does `spolia new METHOD -o my.yaml`.
"""

from __future__ import annotations

import itertools
import re
import runpy
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer

from spolia import cli
from spolia.catalog import METHODS, find
from spolia.errors import SpoliaError
from spolia.runs.mergekit import read_mergekit
from spolia.runs.new import write_recipe
from spolia.runs.packaged import packaged
from spolia.runs.recipe import check_recipe, read_source

HOUSE = Path(__file__).parents[1]
PAGES = sorted(
    page
    for page in [*HOUSE.glob("*.md"), *HOUSE.glob("docs/**/*.md"), *HOUSE.glob("benchmarks/*.md")]
    if page.name != "LICENSE.md"
)
METHOD_PAGES = sorted(HOUSE.glob("docs/methods/*/*.md"))
HEADINGS = [
    *("What it does", "For whom", "Formula", "Settings", "Data touched", "Where we depart", "Published meanings"),
    *("Command", "Python", "Oracles", "What it costs", "Source"),
]
OPTIONAL = {"What it costs"}
MODELS = ("base", "math", "code", "chat")
THEIRS = "merge_method: linear\nmodels:\n" + "".join(
    f"  - {{model: ./{name}, parameters: {{weight: 1}}}}\n" for name in MODELS[1:]
)


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, text, first line number, and the reason not to run it."""

    language: str
    body: str
    line: int
    skipped: str


def blocks(text: str) -> Iterator[Block]:
    lines, i = text.split("\n"), 0
    while i < len(lines):
        if opened := re.fullmatch(r"(\s*)```(\w*).*", lines[i]):
            indent, start = opened[1], i + 1
            i = next((j for j in range(start, len(lines)) if lines[j].strip() == "```"), len(lines))
            before = next((line for line in reversed(lines[: start - 1]) if line.strip()), "")
            reason = re.fullmatch(r"\s*<!-- not run: (.+) -->", before)
            body = "\n".join(line.removeprefix(indent) for line in lines[start:i]) + "\n"
            yield Block(opened[2], body, start + 1, reason[1] if reason else "")
        i += 1


def commands(block: Block) -> Iterator[tuple[int, str]]:
    """Line number and text of every command in a console block; output and comments are left out."""
    lines = block.body.split("\n")
    for i, line in enumerate(lines):
        text, j = line.strip().removeprefix("$ "), i
        while text.endswith("\\"):
            j += 1
            text = text[:-1] + lines[j].strip()
        if re.match(r"(spolia|make)( |$)", text) and (i == 0 or not lines[i - 1].rstrip().endswith("\\")):
            yield block.line + i, text


def is_open(word: str) -> bool:
    """A word that stands for something of the reader's: METHOD, PATH, RUN …"""
    return "…" in word or re.fullmatch(r"[A-Z][A-Z_-]*", word) is not None


def faults_of(command: str, folder: Path) -> list[str]:
    """What a reader who types `command` in `folder` would be told, apart from the models that only we lack."""
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        targets = set(re.findall(r"^([a-z]+):", (HOUSE / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
        return [f"the Makefile has no {word}" for word in words[1:] if "=" not in word and word not in targets]
    if words[1:] and is_open(words[1]):
        return []
    app: Any = typer.main.get_command(cli.app)
    context = app.make_context("spolia", [word for word in words[1:2] if word], resilient_parsing=True)
    if not words[1:] or words[1].startswith("-"):
        known = {option for parameter in app.get_params(context) for option in parameter.opts}
        return [f"spolia has no option {word}" for word in words[1:] if word not in known]
    if (verb := app.get_command(context, words[1])) is None:
        return [f"spolia has no command `{words[1]}`"]
    try:
        given = verb.make_context(words[1], words[2:], parent=context).params
    except SystemExit:  # --help
        return []
    except Exception as error:
        return [f"{type(error).__name__}: {error}"]
    try:
        _check_names(words[1], given, folder)
    except SpoliaError as error:
        return [str(error)]
    return []


def _check_names(verb: str, given: dict[str, Any], folder: Path) -> None:
    if verb in ("show", "new") and not is_open(given["method"]):
        method = find(given["method"])
        if verb == "new" and given["out"] is not None:
            write_recipe(method, folder / given["out"], tiny=given["tiny"])
    if verb in ("plan", "run", "merge") and not is_open(given["recipe"]):
        name = given["recipe"] if given["recipe"] in packaged() else folder / given["recipe"]
        source = read_source(name)
        if source.is_mergekit:
            read_mergekit(source.marked, folder=source.folder)
        else:
            number = itertools.count(1)  # each PATH stands for another model
            overrides = [re.sub(r"\bPATH\b", lambda _: f"path-{next(number)}", o) for o in given.get("overrides") or ()]
            check_recipe(source, [text for text in overrides if not is_open(text)], check_paths=False)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_model: Callable[..., Path]) -> Path:
    """A folder with tiny models of one base, in fp32, where changes of equal magnitude do not occur."""
    import torch

    folder = tmp_path_factory.mktemp("models")
    draws = torch.Generator().manual_seed(0)
    shapes = {"embed.weight": (32, 16), "layers.0.weight": (16, 16), "layers.0.bias": (16,), "head.weight": (10, 16)}
    base = {name: torch.randn(shape, generator=draws) for name, shape in shapes.items()}
    for name in MODELS:
        change = 0.0 if name == "base" else 0.1
        tensors = {key: t + change * torch.randn(t.shape, generator=draws) for key, t in base.items()}
        write_model(folder / name, tensors, {"model_type": "llama", "num_hidden_layers": 1})
    return folder


@pytest.fixture
def reader(tmp_path: Path, models: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder in which a reader follows a page."""
    for name in MODELS:
        (tmp_path / name).symlink_to(models / name, target_is_directory=True)
    (tmp_path / "recipe.yml").write_text(THEIRS)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def name_of(page: Path) -> str:
    return str(page.relative_to(HOUSE))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_runs(page: Path, reader: Path) -> None:
    names: dict[str, Any] = {"__name__": "__page__"}
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in ("yaml", "yml"):
            written(block, reader)
        if block.language == "python" and not block.skipped:
            padded = "\n" * (block.line - 1) + block.body  # so that a traceback tells the page's own line
            exec(compile(padded, name_of(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_and_recipes_are_right(page: Path, reader: Path) -> None:
    found = []
    for block in blocks(page.read_text(encoding="utf-8")):
        if block.language in ("yaml", "yml"):
            found += [f"{name_of(page)}:{block.line}: {fault}" for fault in _recipe_faults(block, reader)]
        if block.language in ("console", "bash", "sh", "shell"):
            for line, command in commands(block):
                found += [f"{name_of(page)}:{line}: `{command}`: {fault}" for fault in faults_of(command, reader)]
    assert not found, "\n".join(found)


def written(block: Block, folder: Path) -> Path:
    """The block as a file of the name in its first line."""
    named = re.match(r"# (\S+\.ya?ml)\b", block.body)
    file = folder / (named[1] if named else "recipe-without-a-name.yaml")
    file.write_text(block.body, encoding="utf-8")
    return file


def _recipe_faults(block: Block, folder: Path) -> list[str]:
    if not re.search(r"^(spolia|merge_method):", block.body, re.MULTILINE):
        return []
    try:
        source = read_source(written(block, folder))
        if source.is_mergekit:
            read_mergekit(source.marked, folder=folder)
        else:
            check_recipe(source, check_paths=False)
    except SpoliaError as error:
        return [str(error)]
    return []


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", without_code(page.read_text(encoding="utf-8"))):
        if "://" not in target and not target.startswith("mailto:"):
            assert (page.parent / target).exists(), f"{name_of(page)}: there is no {target}."
            if target.endswith(".md") and page.is_relative_to(HOUSE / "docs"):
                inside = (page.parent / target).resolve().is_relative_to(HOUSE / "docs")
                assert inside, f"{name_of(page)}: the site ends at docs; write `{target}` as code, without a link."


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_anchors_exist(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#\s]*)#([^)\s]+)\)", without_code(page.read_text(encoding="utf-8"))):
        if "://" not in target:
            held = (page.parent / target if target else page).read_text(encoding="utf-8")
            titles = re.findall(r"^#+ (.+)$", without_code(held, spans=False), re.MULTILINE)
            known = {slug(title) for title in titles}
            assert anchor in known, f"{name_of(page)}: {target or 'it'} has no heading #{anchor}."


def without_code(text: str, spans: bool = True) -> str:
    text = re.sub(r"^\s*```.*?^\s*```$", "", text, flags=re.DOTALL | re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text) if spans else text


def slug(title: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    return re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip())


@pytest.mark.parametrize("page", METHOD_PAGES, ids=name_of)
def test_method_pages_have_the_same_headings(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    found = re.findall(r"^## (.+)$", text, re.MULTILINE)
    asked = [heading for heading in HEADINGS if heading in found or heading not in OPTIONAL]
    assert found == asked, f"{name_of(page)}: the headings are {', '.join(HEADINGS)}, in this order."


@pytest.mark.parametrize("page", METHOD_PAGES, ids=name_of)
def test_method_pages_show_all_settings(page: Path) -> None:
    """Names, defaults and sources themselves are compared in test_ledger."""
    text = page.read_text(encoding="utf-8")
    shown = {name.strip() for part in re.findall(r"<!-- settings (.*?) -->", text) for name in part.split(";")}
    asked = {m.name for m in METHODS if m.module.rpartition(".")[2] == page.stem and m.family == page.parent.name}
    assert shown == asked, f"{name_of(page)}: write `<!-- settings {'; '.join(sorted(asked))} -->` and <!-- end -->."


@pytest.mark.slow
@pytest.mark.parametrize("script", sorted(HOUSE.glob("examples/*.py")), ids=name_of)
def test_examples_run(script: Path, reader: Path) -> None:
    runpy.run_path(str(script), run_name="__main__")


@pytest.mark.parametrize(
    "command",
    [
        "spolia demmo",
        "spolia --verbose",
        "spolia show tie",
        "spolia run merge/tie-tiny",
        "spolia run merge/ties-tiny method.densty=0.3",
        "spolia run merge/ties-tiny --ot folder",
        "spolia run nowhere.yaml",
        "spolia merge merge/ties",
        "make tests",
    ],
)
def test_a_wrong_command_is_seen(command: str, reader: Path) -> None:
    assert faults_of(command, reader)


@pytest.mark.parametrize(
    "command",
    [
        "spolia --help",
        "spolia list ties --json",
        "spolia show METHOD",
        "spolia run RECIPE",
        "spolia run merge/ties pool.base=PATH 'pool.experts=[PATH, PATH]'  # yours",
        "spolia report RUN --to latex",
        "make check JOBS=4",
    ],
)
def test_a_right_command_passes(command: str, reader: Path) -> None:
    assert faults_of(command, reader) == []


def test_blocks_are_found() -> None:
    page = (
        "a\n```python\nx = 1\n```\n<!-- not run: it needs a hub -->\n\n```python\ny\n```\n"
        "  ```console\n  $ spolia \\\n    list\n  ok\n  ```\n"
    )
    found = list(blocks(page))
    assert [(b.language, b.body, b.line, b.skipped) for b in found[:2]] == [
        ("python", "x = 1\n", 3, ""),
        ("python", "y\n", 8, "it needs a hub"),
    ]
    assert list(commands(found[2])) == [(11, "spolia list")]
