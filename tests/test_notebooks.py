"""Notebooks run from top to bottom, each in a process and a folder of its own, and show what a notebook would show.

The last expression of a cell is shown as Jupyter does it: by `_repr_html_` where it has one, else by `repr`. Jupyter is not
needed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import spolia
from spolia.runs.describe import FAMILIES

NOTEBOOKS = sorted((Path(__file__).parents[1] / "examples" / "notebooks").glob("*.ipynb"))

READER = """
import ast, json, sys

names = {"__name__": "__main__"}
for number, cell in enumerate(json.load(open(sys.argv[1], encoding="utf-8"))["cells"]):
    if cell["cell_type"] != "code":
        continue
    tree = ast.parse("".join(cell["source"]), f"cell {number}")
    shown = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
    exec(compile(tree, f"cell {number}", "exec"), names)
    if shown is not None:
        value = eval(compile(shown, f"cell {number}", "eval"), names)
        if value is not None:
            html = getattr(value, "_repr_html_", None)
            print(html() if html is not None else repr(value))
"""


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
def test_notebooks_run(file: Path, tmp_path: Path) -> None:
    home = {"HF_HUB_OFFLINE": "1", "MPLBACKEND": "Agg", "PYTHONPATH": str(Path(spolia.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-W", "error::DeprecationWarning:spolia", "-c", READER, str(file)],
        cwd=tmp_path,
        env=os.environ | home,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert (tmp_path / "run" / "report.html").is_file()
