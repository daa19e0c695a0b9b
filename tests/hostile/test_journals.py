"""The hostile corpus: run folders. A damaged checkpoint counts for nothing, and the loop is made again, right."""

from __future__ import annotations

import errno
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from spolia.core import kept
from spolia.core.journal import Journal

Told = Callable[..., str | None]


def run(folder: Path) -> tuple[list[int], float]:
    """The steps made, and the sum of 0 to 3 that they should give."""
    journal, total, made = Journal(folder, save_every=0), torch.zeros(1), list[int]()
    with journal.phase("count"):
        for step in journal.steps(4, keep={"total": total}):
            total += step
            made.append(step)
            journal.log(total=total)
    return made, float(total)


def flipped(part: float) -> Callable[[Path], object]:
    def spoil(file: Path) -> None:
        raw = bytearray(file.read_bytes())
        raw[int(part * (len(raw) - 1))] ^= 4
        file.write_bytes(raw)

    return spoil


def instead(act: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda file: (file.unlink(), act(file))[1]


CHECKPOINTS: dict[str, Callable[[Path], object]] = {
    **{f"cut to {n} of 8 parts": lambda f, n=n: os.truncate(f, f.stat().st_size * n // 8) for n in range(8)},
    **{f"a bit flipped at {n} of 10 parts": flipped(n / 10) for n in range(11)},
    "a byte more": lambda f: f.write_bytes(f.read_bytes() + b"x"),
    "a pipe": instead(os.mkfifo),
    "a link to itself": instead(lambda f: f.symlink_to(f.name)),
    "an endless device": instead(lambda f: f.symlink_to("/dev/zero")),
    "a model": lambda f: save_file({"w": torch.ones(2)}, f),
    "a list": lambda f: kept.save(f, [1]),
    "of another kind": lambda f: kept.save(f, {"n": 4}),
}
METRICS: dict[str, bytes] = {
    "empty": b"", "no end of line": b'{"time": 1', "deep": b"[" * 100_000 + b"\n",
    "bytes": bytes(range(256)) * 9, "lists": b"[]\n[1]\n7\nnull\n", "no time": b"{}\n",
    "odd time": b'{"time": "x", "phase": [], "step": {}}\n', "a long number": b"9" * 5000 + b"\n",
}  # fmt: skip


@pytest.mark.sampled(8)
@pytest.mark.parametrize("case", CHECKPOINTS)
def test_damaged_checkpoints_count_for_nothing(case: str, tmp_path: Path, told: Told) -> None:
    assert run(tmp_path) == ([0, 1, 2, 3], 6.0)
    for file in (tmp_path / "checkpoints").rglob("step-*"):
        CHECKPOINTS[case](file)
    ended: list[tuple[list[int], float]] = []
    assert told(lambda: ended.append(run(tmp_path))) is None
    assert ended == [([0, 1, 2, 3], 6.0)]


@pytest.mark.parametrize("case", METRICS)
def test_damaged_metrics_are_gone_on_from(case: str, tmp_path: Path, told: Told) -> None:
    (tmp_path / "metrics.jsonl").write_bytes(METRICS[case])
    assert told(lambda: run(tmp_path)) is None
    assert b'"total": 6.0' in (tmp_path / "metrics.jsonl").read_bytes().splitlines()[-1]


@pytest.mark.parametrize("name", ["mkstemp", "fsync", "replace", "mkdir"])
def test_disks_that_fail_are_told(name: str, tmp_path: Path, told: Told, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(tempfile if name == "mkstemp" else os, name, fail)
        assert "free some space" in (told(lambda: run(tmp_path)) or "")
    assert run(tmp_path)[1] == 6.0


def test_a_checkpoint_that_is_a_folder_is_refused(tmp_path: Path, told: Told) -> None:
    run(tmp_path)
    for file in (tmp_path / "checkpoints").rglob("step-*"):
        file.unlink()
        file.mkdir()
    assert "cannot be written" in (told(lambda: run(tmp_path)) or "")


def test_metrics_that_are_a_folder_are_refused(tmp_path: Path, told: Told) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    assert "metrics.jsonl" in (told(lambda: run(tmp_path)) or "")
