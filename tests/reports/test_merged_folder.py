"""A merged model is no run folder; whoever asks for its report is told where its card is."""

from __future__ import annotations

from pathlib import Path

import pytest

from spolia.errors import SpoliaError
from spolia.reports.folder import read_run
from spolia.runs.verbs import report


@pytest.mark.parametrize("recipe", ["recipe.yaml", "mergekit_config.yml", None])
def test_a_merged_folder_is_named_with_its_card(recipe: str | None, tmp_path: Path) -> None:
    for name in ("spolia.json", "model.safetensors", "README.md", *([recipe] if recipe else [])):
        (tmp_path / name).write_text("{}")
    for ask in (read_run, report):
        with pytest.raises(SpoliaError) as caught:
            ask(tmp_path)
        assert "merged model" in str(caught.value) and str(tmp_path / "README.md") in str(caught.value)
    (tmp_path / "README.md").unlink()
    with pytest.raises(SpoliaError, match="merged model"):
        read_run(tmp_path)
    (tmp_path / "results.json").write_text('{"rows": []}')  # measured by its maker: then there is something to show
    assert read_run(tmp_path).results == {"rows": []}


def test_the_door_stays_a_function_when_reports_are_imported() -> None:
    """A package of the door's own name would take its place once it is imported."""
    import spolia.reports.html

    assert callable(spolia.report)
