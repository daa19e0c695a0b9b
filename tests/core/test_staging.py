"""A result that replaces another: whatever moment it is killed at, one of both stands whole, and the next call tidies up."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from spolia.core import staging as module
from spolia.core.checkpoint import DTYPES, read_tensors
from spolia.core.layout import Layout, Slot
from spolia.core.staging import GRID, LOG, PROBE, Staging
from spolia.errors import SpoliaError

LAYOUT = Layout.of([Slot("w", DTYPES["F32"], (4,))], 10**9)


class Killed(BaseException):
    """No handler in the code may catch it, as none can catch the end of the process."""


def replace(target: Path, value: float, overwrite: bool = True) -> None:
    with Staging(target, LAYOUT, "k", overwrite=overwrite) as staging:
        staging.write("w", 0, memoryview(torch.full((4,), value).numpy()).cast("B"))
        staging.finish()


def killed_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, count: int, act: Callable[[], None]) -> None:
    """`act`, killed when `owner.name` is called for the `count`-th time."""
    real, calls = getattr(owner, name), list[object]()

    def call(*given: Any, **named: Any) -> Any:
        calls.append(given)
        if len(calls) == count:
            raise Killed
        return real(*given, **named)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(owner, name, call)
        act()


MOMENTS = [(os, "rename", 1), (os, "rename", 2), (module, "_remove", 1), (shutil, "rmtree", 1), (Path, "unlink", 1)]


@pytest.fixture
def target(tmp_path: Path) -> Path:
    replace(tmp_path / "m", 1.0)
    return tmp_path / "m"


@pytest.mark.parametrize(("owner", "name", "count"), MOMENTS)
def test_the_same_call_puts_it_right(
    owner: Any, name: str, count: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, owner, name, count, lambda: replace(target, 2.0))
    replace(target, 2.0)
    assert read_tensors(target)["w"].tolist() == [2.0] * 4
    assert [f.name for f in target.parent.iterdir()] == ["m"] and [f.name for f in target.iterdir()] == [
        "model.safetensors"
    ]


@pytest.mark.parametrize(("owner", "name", "count"), MOMENTS)
def test_a_call_that_may_not_replace_finds_one_of_both_whole(
    owner: Any, name: str, count: int, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    killed_at(monkeypatch, owner, name, count, lambda: replace(target, 2.0))
    with pytest.raises(SpoliaError, match="exists already"):
        replace(target, 3.0, overwrite=False)
    done = (owner, name, count) not in MOMENTS[:2]  # the second rename makes the new one stand
    assert read_tensors(target)["w"].tolist() == [2.0 if done else 1.0] * 4
    assert {f.name for f in target.parent.iterdir()} == ({"m"} if done else {"m", "m.partial"})


@pytest.mark.parametrize("name", ["../thesis", "/etc", "m", "m.replaced-", "m.replaced-1/..", "", "x" * 999])
def test_a_note_that_names_anything_else_harms_nothing(name: str, target: Path) -> None:
    """It might lie in a folder that came from elsewhere."""
    (thesis := target.parent / "thesis").write_text("x")
    for mark, text in ((LOG, "x"), (".spolia-replaced", name)):
        (target / mark).write_text(text)
    with pytest.raises(SpoliaError, match="exists already"):
        replace(target, 3.0, overwrite=False)
    assert thesis.read_text() == "x" and read_tensors(target)["w"].tolist() == [1.0] * 4


def test_a_living_process_is_not_tidied_up_after(target: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second call comes between the renames of the first, which still runs."""
    real, seen = os.rename, list[str]()

    def rename(*given: Any) -> None:
        real(*given)
        if len(seen) == 0:
            seen.append("")
            with pytest.raises(SpoliaError) as caught:
                replace(target, 3.0)
            seen[0] = str(caught.value)

    monkeypatch.setattr(os, "rename", rename)
    replace(target, 2.0)
    assert "another process" in seen[0] and read_tensors(target)["w"].tolist() == [2.0] * 4


@pytest.mark.parametrize("place", ["first", "last", "between"])
def test_bytes_that_the_disk_did_not_keep_are_noticed(place: str, tmp_path: Path) -> None:
    """What was written is compared with the file before the folder exists; the next call takes nothing of it for done."""
    made, layout = tmp_path / "made", Layout.of([Slot("w", DTYPES["F32"], (500_000,))], 10**9)
    values, begin = memoryview(torch.arange(500_000.0).numpy()).cast("B"), layout.places["w"].start
    with Staging(made, layout, "k") as staging:
        for at in range(0, len(values), 600_000):
            staging.write("w", at, values[at : at + 600_000])
        staging.mark("all")
        where = {"first": begin, "last": begin + len(values) - 1, "between": GRID + PROBE - 1}[place]
        with (staging.folder / "model.safetensors").open("r+b") as stream:
            stream.seek(where)
            held = stream.read(1)
            stream.seek(where)
            stream.write(bytes([held[0] ^ 1]))
        with pytest.raises(SpoliaError, match=r"holds other bytes at \d+ than were written there"):
            staging.finish()
    assert not made.exists()
    with Staging(made, layout, "k") as again:
        assert not again.done
        again.write("w", 0, values)
        again.finish()
    assert torch.equal(read_tensors(made)["w"], torch.arange(500_000.0))
