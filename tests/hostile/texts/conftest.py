"""How a hostile text is tried: files of a sound world are spoilt, a merge is asked for, and its end is judged.

A case is (recipe or None, spoilt files). A file's new content is bytes, or a mapping: keys to change in the JSON there, or
None: it is removed. Without a recipe the models a and b are averaged by a call. A case ends in one of three ways:

    refused   with place, fault and cure, and nothing written anywhere
    averaged  as if nothing were: the exact average of a and b
    whole     a model that can be read, whose layers are the average (the embedding follows an odd but lawful vocabulary)
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

import spolia
from spolia.core.checkpoint import read_tensors
from spolia.runs.verbs import merge_recipe

Files = Mapping[str, bytes | dict[str, Any] | None]
EMBED, BLOCK = "model.embed_tokens.weight", "model.layers.0.w.weight"
LONGEST = 20_000  # characters of a message; a screen or two, whatever the input is


@pytest.fixture
def models(sound: Path, tmp_path: Path) -> Path:
    """A folder with copies of a and b, to spoil."""
    world = tmp_path / "world"
    for name in "ab":
        shutil.copytree(sound / name, world / name)
    return world


@pytest.fixture
def put() -> Callable[[Path, Files], None]:
    """put(world, files) spoils them."""

    def put(world: Path, files: Files) -> None:
        for name, content in files.items():
            file = world / name
            if content is None:
                file.unlink()
            elif isinstance(content, bytes):
                file.write_bytes(content)
            else:
                file.write_text(json.dumps(json.loads(file.read_bytes()) | content))

    return put


@pytest.fixture
def ends(told: Callable[..., str | None]) -> Callable[[Path, str, Callable[[], Any]], None]:
    """ends(world, outcome, call) makes the call and judges how it ends."""

    def ends(world: Path, outcome: str, call: Callable[[], Any]) -> None:
        made, before = list[Path](), sorted(world.rglob("*"))
        message = told(lambda: made.append(Path(call())))
        assert not (world / "ran").exists()
        assert (message is not None) == (outcome == "refused"), message or "went through"
        if message is not None:
            assert sorted(world.rglob("*")) == before and len(message) < LONGEST
            return
        a, b, found = (read_tensors(folder) for folder in (world / "a", world / "b", made[0]))
        assert found.keys() == a.keys()
        assert torch.equal(found[BLOCK], (a[BLOCK] + b[BLOCK]) / 2)
        assert outcome == "whole" or torch.equal(found[EMBED], (a[EMBED] + b[EMBED]) / 2)

    return ends


@pytest.fixture
def judge_text(models: Path, put: Callable[..., None], ends: Callable[..., None]) -> Callable[..., None]:
    """judge_text(outcome, recipe, files) tries one case."""

    def judge_text(outcome: str, recipe: str | bytes | None, files: Files) -> None:
        put(models, files)
        if recipe is None:
            ends(models, outcome, lambda: spolia.merge([models / "a", models / "b"], out=models / "out", threads=1))
            return
        raw = recipe if isinstance(recipe, bytes) else recipe.encode()
        (models / "r.yaml").write_bytes(raw)
        ends(models, outcome, lambda: merge_recipe(models / "r.yaml", models / "out", threads=1))

    return judge_text
