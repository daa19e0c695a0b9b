"""Merges in processes of their own: killed at any moment they go on to equal bytes; hash seeds and size change nothing."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from subprocess import PIPE
from typing import Any

import pytest
import torch

import spolia
from spolia.errors import SpoliaError

pytestmark = pytest.mark.slow
Write, Fork = Callable[..., Path], Callable[..., Any]

MERGE = """
import sys, spolia
method, out, base, *experts = sys.argv[1:]
def merge():
    spolia.merge(experts, base=None if method == "average" else base, method=method, out=out,
                 threads=2, chunk_memory=64_000_000, max_shard_size=40_000_000)
"""
NOW = MERGE + "merge()\n"
# Dies at the n-th call of one function of the system, before or after it: every step between the last byte and the end.
STEP = (
    MERGE
    + """
import os, pathlib, shutil, signal
name, number, when = os.environ["DIE"].split()
owner = next(o for o in (os, shutil, pathlib.Path) if hasattr(o, name))
true, calls = getattr(owner, name), []
def dies(*args, **options):
    calls.append(name)
    if len(calls) == int(number) and when == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    result = true(*args, **options)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(owner, name, dies)
merge()
"""
)
# Not getrusage: its peak is that of whoever started the process, too.
MEMORY = NOW + "import re; print(int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1]) / 1024)\n"


def run(child: Any) -> str:
    told, complaint = child.communicate()
    assert child.returncode == 0, complaint[-2000:]
    return told


def digest(folder: Path) -> dict[str, str]:
    return {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in sorted(folder.iterdir())}


def tensors(seed: int, count: int, size: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    return {f"layers.{i}.w": torch.randn(size // 1000, 1000, generator=noise).bfloat16() for i in range(count)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> list[Path]:
    """A base and two experts of 150 MB each."""
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"m{i}", tensors(i, 15, 5_000_000), {"model_type": "x"}, shards=3) for i in range(3)]


def merged(parent: Path, method: str, models: list[Path]) -> dict[str, str]:
    """What an uninterrupted merge writes."""
    call = {"method": method, "out": parent / "out", "max_shard_size": 40_000_000}
    spolia.merge(models[1:], base=models[0], **call)
    return digest(parent / "out")


def again(method: str, out: Path, models: list[Path], overwrite: bool = False) -> None:
    """The same call once more, as a user would; a folder that stands already is no failure."""
    with contextlib.suppress(SpoliaError):
        call = {"method": method, "out": out, "max_shard_size": 40_000_000, "overwrite": overwrite}
        spolia.merge(models[1:], base=models[0], threads=2, **call)


def test_killed_anywhere_it_goes_on_to_equal_bytes(models: list[Path], tmp_path: Path, fork: Fork) -> None:
    chance, out, log = random.Random(0), tmp_path / "out", tmp_path / "out.partial" / ".spolia-progress"
    lines = 0
    for wait in (True, True, True, False, False):
        child = fork(NOW, "dare", out, *models)
        # Wait until a few more of some thirty parts are done, or for a moment of pure chance.
        goal, end = lines + chance.randint(1, 6), time.monotonic() + (60 if wait else chance.uniform(0, 4))
        while child.poll() is None and time.monotonic() < end and (not wait or lines < goal):
            time.sleep(0.002)
            with contextlib.suppress(OSError):
                lines = log.read_text().count("\n")
        assert not out.exists() or not wait
        child.kill()
        child.communicate()
    assert out.exists() or lines > 3  # the kills met interesting moments
    again("dare", out, models)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    found = digest(out)
    assert found == merged(tmp_path / "whole", "dare", models)


STEPS = [(name, n, when) for name, n in (("fsync", 1), ("fsync", 3), ("rename", 1)) for when in ("before", "after")]
STEPS += [("unlink", 1, "before"), ("unlink", 2, "after"), ("write_text", 1, "after"), ("write_text", 2, "before")]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> list[Path]:
    folder = tmp_path_factory.mktemp("small")
    return [write_model(folder / f"m{i}", tensors(i, 3, 10_000), {"model_type": "x"}) for i in range(3)]


@pytest.mark.parametrize(("name", "number", "when"), STEPS)
def test_killed_between_the_last_steps_nothing_looks_whole(
    name: str, number: int, when: str, tmp_path: Path, small: list[Path], fork: Fork
) -> None:
    expected, out = merged(tmp_path / "a", "ties", small), tmp_path / "b" / "out"
    child = fork(STEP, "ties", out, *small, DIE=f"{name} {number} {when}")
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    if out.exists():
        assert expected.items() <= digest(out).items()  # every byte was there when the name appeared
    again("ties", out, small)
    assert digest(out) == expected and [p.name for p in out.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_while_overwriting_one_of_the_two_stands(
    number: int, when: str, tmp_path: Path, small: list[Path], write_model: Write, fork: Fork
) -> None:
    expected = merged(tmp_path / "a", "ties", small)
    out = write_model(tmp_path / "b" / "out", tensors(9, 3, 10_000))
    old = digest(out)
    forced = STEP.replace("threads=2", "overwrite=True, threads=2")
    child = fork(forced, "ties", out, *small, DIE=f"rename {number} {when}")
    child.communicate()
    assert child.returncode == -signal.SIGKILL
    standing = [digest(p) for p in out.parent.iterdir()]
    assert old in standing or any(expected.items() <= found.items() for found in standing)
    again("ties", out, small, overwrite=True)
    assert digest(out) == expected
    # The replaced model may be left beside it, whole; half of one may not.
    assert all(digest(p) == old for p in out.parent.iterdir() if p != out)


def test_hash_seeds_change_nothing(tmp_path: Path, write_model: Write) -> None:
    """Names that sort alike (`w.1` and `w.01`) must not fall back on the order of a set."""
    odd = {f"w.{zeros}{i}": torch.ones(40) for i in range(9) for zeros in ("", "0", "00")}
    models = [
        write_model(tmp_path / f"m{i}", tensors(i, 3, 10_000) | {n: t * i for n, t in odd.items()}, {"model_type": "x"})
        for i in range(3)
    ]
    code = NOW.replace("40_000_000", "1000") + f"print({{*{list(odd)!r}}})\n"
    orders = []
    for seed in ("0", "77"):
        words = [sys.executable, "-c", code, "dare", str(tmp_path / seed / "out"), *map(str, models)]
        child = subprocess.Popen(words, env=os.environ | {"PYTHONHASHSEED": seed}, stdout=PIPE, stderr=PIPE, text=True)
        orders.append(run(child))
    assert orders[0] != orders[1]
    found = [digest(tmp_path / seed / "out") for seed in ("0", "77")]
    assert found[0] == found[1]
    assert {"spolia.json", "README.md", "config.json"} <= found[0].keys()


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> list[list[Path]]:
    """Three models of 40 MB, and three of 160 MB."""
    folder = tmp_path_factory.mktemp("sizes")
    return [[write_model(folder / f"{count}-{i}", tensors(i, count, 5_000_000)) for i in range(3)] for count in (4, 16)]


@pytest.mark.parametrize("method", ["average", "ties"])
def test_memory_does_not_grow_with_the_model(method: str, sizes: list[list[Path]], tmp_path: Path, fork: Fork) -> None:
    """What may grow is a few headers; one model held whole would be 120 MB more."""
    peaks = [float(run(fork(MEMORY, method, tmp_path / f"out-{i}", *models))) for i, models in enumerate(sizes)]
    assert peaks[1] - peaks[0] < 60  # MB; the allocator varies by less
