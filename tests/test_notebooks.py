"""Notebooks run from top to bottom, each in a folder of its own, and show what a notebook would show.

The last expression of a cell is shown as Jupyter does it: by `_repr_html_` where it has one, else by `repr`. Jupyter is not
needed.
"""

from __future__ import annotations

import ast
import json
from pathlib import Path
from typing import Any

import pytest

from spolia.runs.describe import FAMILIES

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))


def book(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text(encoding="utf-8"))


def name_of(file: Path) -> str:
    return file.stem


def test_every_family_has_one() -> None:
    assert [file.stem for file in NOTEBOOKS] == sorted(FAMILIES)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_nothing_is_stored_but_what_was_written(file: Path) -> None:
    """No outputs, counts or traces of an editor: differences between versions are differences of the text."""
    held = book(file)
    assert (held["nbformat"], held["nbformat_minor"]) == (4, 5)
    assert set(held["metadata"]) == {"kernelspec", "language_info"}
    assert [cell["id"] for cell in held["cells"]] == [f"c{number}" for number in range(len(held["cells"]))]
    assert held["cells"][0]["cell_type"] == "markdown" and held["cells"][0]["source"][0].startswith("# ")
    for cell in held["cells"]:
        assert cell["metadata"] == {}
        assert cell["cell_type"] == "markdown" or (cell["outputs"], cell["execution_count"]) == ([], None)


@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_pool_plan_and_run_are_shown(file: Path) -> None:
    last = {"".join(cell["source"]).rstrip().rpartition("\n")[2] for cell in book(file)["cells"]}
    assert {"plan", "run"} <= last


@pytest.mark.slow
@pytest.mark.parametrize("file", NOTEBOOKS, ids=name_of)
def test_notebooks_run(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "__main__"}
    for cell in book(file)["cells"]:
        if cell["cell_type"] == "code":
            show("".join(cell["source"]), f"{file.stem} {cell['id']}", names)
    assert (tmp_path / "run" / "report.html").is_file()


def show(source: str, where: str, names: dict[str, Any]) -> None:
    """Run a cell, and show its last expression."""
    tree = ast.parse(source, where)
    last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, where, "exec"), names)
    value = eval(compile(last, where, "eval"), names) if last is not None else None
    if value is not None:
        assert getattr(value, "_repr_html_", value.__repr__)()
