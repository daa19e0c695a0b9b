"""A method is whole: its row, code, settings, two recipes, a test file and a page. What is missing is named."""

from __future__ import annotations

import ast
import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import pytest

import spolia
from spolia.catalog import METHODS, Method, find, search
from spolia.core.settings import Settings
from spolia.errors import SpoliaError
from spolia.runs.recipe import load_recipe
from spolia.runs.studies import StudyRecipe

HOUSE = Path(__file__).parents[1]
PACKAGE = Path(spolia.__file__).parent


def missing(method: Method) -> list[str]:
    """A sentence for everything a complete method has and this one lacks."""
    module = method.module.rpartition(".")[2]
    if importlib.util.find_spec(method.module) is None:
        return [f"{method.name}: there is no module {method.module}; write src/{method.module.replace('.', '/')}.py."]
    return [
        *_missing_code(method),
        *_missing_recipes(method),
        *_missing_file(method, f"tests/methods/{method.family}/test_{module}.py", "an oracle, an invariant, a limit"),
        *_missing_file(
            method, f"docs/methods/{method.family}/{module}.md", "the headings are those of the other pages"
        ),
    ]


def _missing_code(method: Method) -> list[str]:
    source = Path(importlib.util.find_spec(method.module).origin)
    tree = ast.parse(source.read_text(encoding="utf-8"))
    page, entry, place = ast.get_docstring(tree) or "", method.entry.partition(":")[2], source.name
    found = []
    if f"spolia.methods.{method.family}." not in method.module:
        found.append(f"{method.name}: {method.module} is not in the room of its family, methods/{method.family}.")
    if entry not in {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}:
        found.append(f"{method.name}: {place} has no public function `{entry}`; the row's entry names it.")
    if not re.search(r"arXiv \d{4}\.\d{4,5}|doi:10\.\d{4,}/\S+", page):
        found.append(f"{method.name}: {place} does not say its source; cite `arXiv 2306.01708` or `doi:10.…` on top.")
    if "Data touched" not in page:
        found.append(f"{method.name}: {place} does not say what it touches; add a line `Data touched: …` on top.")
    if method.settings not in {node.name for node in tree.body if isinstance(node, ast.ClassDef)}:
        return [*found, f"{method.name}: {place} has no class `{method.settings}`; the row's settings name it."]
    settings = method.settings_class()
    if not issubclass(settings, Settings) or not settings.model_config.get("frozen"):
        found.append(f"{method.name}: {method.settings} is not a frozen Settings model.")
    for name, field in settings.model_fields.items():
        extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
        if not field.description:
            found.append(
                f"{method.name}: setting `{name}` has no description; write setting(default, 'what it is', …)."
            )
        if not extra.get("source"):
            found.append(f"{method.name}: setting `{name}` does not say where its default comes from; add source=….")
    return found


def _missing_recipes(method: Method) -> list[str]:
    found = []
    for name in (f"{method.family}/{method.name}", f"{method.family}/{method.name}-tiny"):
        file = f"src/spolia/recipes/{name}.yaml"
        if not (PACKAGE / "recipes" / f"{name}.yaml").is_file():
            found.append(f"{method.name}: there is no {file}; `spolia new {method.name}` writes it.")
            continue
        try:
            recipe = load_recipe(name, check_paths=False)
        except SpoliaError as error:
            found.append(f"{method.name}: {file} does not load: {error}")
            continue
        if recipe.method is not find(method.name):
            found.append(f"{method.name}: {file} runs {recipe.method.name}; write `name: {method.name}`.")
        given = recipe.problem if isinstance(recipe, StudyRecipe) else recipe.pool
        if name.endswith("-tiny") and not re.search("digits|prose", type(given).__name__.lower()):
            found.append(f"{method.name}: {file} needs files; a tiny recipe runs on data that comes with the package.")
    return found


def _missing_file(method: Method, path: str, holds: str) -> list[str]:
    file = HOUSE / path
    if not file.is_file():
        return [f"{method.name}: there is no {path}; write it ({holds})."]
    if not re.search(rf"(?<!\w){re.escape(method.name)}(?!\w)", file.read_text(encoding="utf-8")) and "docs" in path:
        return [f"{method.name}: {path} does not name the method `{method.name}`."]
    return []


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_method_is_whole(method: Method) -> None:
    found = missing(method)
    assert not found, "\n".join(found)


def test_every_name_is_one_methods_own() -> None:
    names = [name for method in METHODS for name in (method.name, *method.aliases)]
    twice = sorted({name for name in names if names.count(name) > 1})
    assert not twice, f"catalog.py gives {', '.join(twice)} to two methods; rename one."


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_the_row_reads_well(method: Method) -> None:
    assert re.fullmatch(r"[a-z][a-z0-9_]*", method.name)
    assert method.summary and method.needs and method.cost
    assert method.summary[0].islower() and not method.summary.endswith(".")
    assert re.search(r"arXiv \d{4}\.\d{4,5}|doi:10\.", method.paper), (
        f"{method.name}: the row's paper has no arXiv or doi."
    )
    assert find(method.name) is method
    assert all(find(alias) is method for alias in method.aliases)
    assert method in search(method.name)


def test_every_recipe_belongs_to_a_method() -> None:
    known = {f"{m.family}/{m.name}{end}" for m in METHODS for end in ("", "-tiny")}
    folder = PACKAGE / "recipes"
    stray = sorted({p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob("*/*.yaml")} - known)
    assert not stray, f"recipes/{stray[0]}.yaml belongs to no row of catalog.py."


def test_every_page_belongs_to_a_method() -> None:
    known = {f"{m.family}/{m.module.rpartition('.')[2]}" for m in METHODS}
    folder = HOUSE / "docs" / "methods"
    stray = sorted({p.relative_to(folder).with_suffix("").as_posix() for p in folder.glob("*/*.md")} - known)
    assert not stray, f"docs/methods/{stray[0]}.md belongs to no row of catalog.py."


AVERAGE = find("average")


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        (replace(AVERAGE, entry="spolia.methods.merge.nowhere:average"), "there is no module"),
        (replace(AVERAGE, entry="spolia.methods.merge.average:avg"), "no public function `avg`"),
        (replace(AVERAGE, settings="Mean"), "no class `Mean`"),
        (replace(AVERAGE, family="surgery"), "not in the room"),
        (replace(AVERAGE, name="midpoint"), "recipes/merge/midpoint.yaml"),
        (replace(AVERAGE, name="midpoint"), "does not name the method `midpoint`"),
        (replace(AVERAGE, entry="spolia.core.seeds:entropy"), "does not say its source"),
        (replace(AVERAGE, entry="spolia.core.seeds:entropy"), "tests/methods/merge/test_seeds.py"),
        (replace(AVERAGE, entry="spolia.core.seeds:entropy"), "docs/methods/merge/seeds.md"),
    ],
)
def test_what_is_missing_is_named(broken: Method, word: str) -> None:
    assert word in "\n".join(missing(broken))
