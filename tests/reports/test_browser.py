"""Reports in a real browser: nothing said or asked for, nothing wider than the page or on top of another, in four looks."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest

from spolia.reports.html import write_report

HOUSE = Path(__file__).parents[2]
_spec = spec_from_file_location("browser", HOUSE / "docs" / "pictures" / "browser.py")
assert _spec is not None and _spec.loader is not None
sys.modules["browser"] = browser = module_from_spec(_spec)
_spec.loader.exec_module(browser)

pytestmark = [pytest.mark.slow, pytest.mark.skipif(browser.program() is None, reason="there is no Chromium")]
VIEWS = {"light": {}, "dark": {"dark": True}, "phone": {"width": 390}, "paper": {"width": 794, "printed": True}}


@pytest.fixture(scope="module")
def window():
    with browser.Browser() as opened:
        yield opened


@pytest.mark.parametrize("look", list(VIEWS.values()), ids=list(VIEWS))
def test_a_report_is_quiet_and_in_order(window, sound_run, look) -> None:
    seen = window.open(write_report(sound_run), **look)
    assert (seen.requests, seen.said, seen.faults) == ([], [], [])
    assert seen.png.startswith(b"\x89PNG")


def test_what_is_wrong_is_seen(window, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    texts = "".join(f'<text x="{x}" y="20">overlapping</text>' for x in (5, 15))
    page.write_text(
        "<!doctype html><meta name=viewport content='width=device-width'><body>"
        "<div style='width:2000px'>wide</div><img src='nowhere.png'><script>console.log('hello')</script>"
        f"<svg role=img width=300 height=40><title>drawing</title>{texts}</svg>"
    )
    seen = window.open(page, width=800)
    assert seen.requests == [(tmp_path / "nowhere.png").as_uri()] and "hello" in seen.said
    for fault in ("the page is", "lies on", "without words"):
        assert any(fault in told for told in seen.faults), seen.faults
