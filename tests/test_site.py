"""The site: every page is in its navigation, it is built with warnings as errors, and asks nothing of any other server."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest
import yaml

import spolia

HOUSE = Path(__file__).parents[1]
DOCS = HOUSE / "docs"
CONFIG = HOUSE / "zensical.toml"
PAGES = sorted(page.relative_to(DOCS) for page in DOCS.rglob("*.md"))
_spec = spec_from_file_location("fill", DOCS / "fill.py")
assert _spec is not None and _spec.loader is not None
fill = module_from_spec(_spec)
_spec.loader.exec_module(fill)


def entries(nav: list[Any]) -> Iterator[str]:
    """Pages and folders that .nav.yml names; patterns name none."""
    for entry in nav:
        if not isinstance(entry, dict):
            yield entry
        elif "glob" not in entry:
            for held in entry.values():
                yield from entries(held) if isinstance(held, list) else [held]


def test_the_navigation_names_what_exists() -> None:
    held = yaml.safe_load((DOCS / ".nav.yml").read_text(encoding="utf-8"))
    named = list(entries(held["nav"]))
    assert held["append_unmatched"] is True  # a new page is never lost
    assert [name for name in named if not (DOCS / name).exists()] == []
    assert sorted(named) == sorted(set(named))


def test_the_site_asks_nothing_of_others() -> None:
    project = tomllib.loads(CONFIG.read_text(encoding="utf-8"))["project"]
    assert project["theme"]["font"] is False
    assert not {"repo_url", "extra_javascript", "extra_css"} & project.keys()


def test_every_public_name_has_its_place() -> None:
    page = (DOCS / "api.md").read_text(encoding="utf-8")
    shown = re.findall(r"^### (\w+)$", page, re.MULTILINE)
    missing = sorted(set(spolia.__all__) - {"__version__", *shown})
    assert not missing, f"name {', '.join(missing)} in a part `api` of docs/api.md, and run: make docs"
    assert len(shown) == len(set(shown))


def test_signatures_are_those_of_the_code() -> None:
    text = fill.public_names(["report", "TaskVector", "Network"])
    assert "    report(folder: str | os.PathLike[str]) -> Path\n" in text
    assert "- `dot(other: TaskVector) -> float`: Inner product" in text
    assert "- `TaskVector.between(base: " in text and "- `norm -> float`" in text
    assert "- `outputs(" not in text  # a field, though its default is a function
    with pytest.raises(ValueError, match="no `merg`"):
        fill.public_names(["merg"])


def test_no_number_begins_a_line() -> None:
    value = "<!-- value demo; average; average; accuracy -->0<!-- end -->"
    filled = re.sub(r"-->\d+<", "-->0<", fill.filled(f"from\n  {value}, to\n  {value} {value} %\n\n{value}\n"))
    assert filled == f"from {value},\n  to {value} {value}\n  %\n\n{value}\n"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built strictly from a copy, for the builder leaves a cache beside its configuration."""
    if find_spec("zensical") is None:
        pytest.skip("zensical is not installed")
    home = tmp_path_factory.mktemp("house")
    shutil.copytree(DOCS, home / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(CONFIG, home)
    command = [sys.executable, "-m", "zensical", "build", "--strict"]
    done = subprocess.run(command, cwd=home, capture_output=True, text=True, timeout=300)
    told = done.stdout + done.stderr
    assert done.returncode == 0, told
    assert not re.search(r"^(Warning|Error)", told, re.MULTILINE), told  # some errors have left the exit code at 0
    return home / "build" / "site"


@pytest.mark.slow
def test_every_page_is_built(site: Path) -> None:
    for page in PAGES:
        built = site / page.with_suffix(".html")
        built = built.with_name("index.html") if page.name == "README.md" else built
        assert built.is_file(), f"{page} is not on the site."


@pytest.mark.slow
def test_the_site_can_be_searched(site: Path) -> None:
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    text = json.dumps(index)
    for word in ("task vector", "AdaMerging", "merge_adapters", "channel use"):
        assert word in text


@pytest.mark.slow
def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    loads = re.compile(
        r"<(?:script|img|iframe|source)[^>]*\ssrc=[\"']?(https?:|//)|<link[^>]*\shref=[\"']?(https?:|//)"
    )
    for file in site.rglob("*.html"):
        text = file.read_text(encoding="utf-8")
        # diagrams would fetch a script when they are drawn
        assert not loads.search(text) and 'class="mermaid"' not in text, f"{file.name} loads from elsewhere"
    for file in site.rglob("*.css"):
        assert not re.search(r"url\([\"']?(https?:)?//|@import", file.read_text(encoding="utf-8")), file.name
    assert not list(site.rglob("*.py"))
