"""The folder that appears only when whole: refusals, resuming, full disks, and nothing of the user's ever deleted."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import spolia
from spolia.core import staging as module
from spolia.core.checkpoint import DTYPES, read_tensors, write_checkpoint
from spolia.core.layout import Layout, Slot
from spolia.core.staging import LOG, Staging
from spolia.errors import SpoliaError

F32 = DTYPES["F32"]


def slots(*names: str) -> list[Slot]:
    return [Slot(name, F32, (2, 2)) for name in names]


LAYOUT = Layout.of(slots("a", "b", "c"), 32)  # two shards: a and b, then c


def fill(staging: Staging, names: str = "abc") -> None:
    for name in names:
        staging.write(name, 0, memoryview(bytes([ord(name)]) * 16))
        staging.mark(name)


def whole(folder: Path) -> bool:
    expected = {name: torch.frombuffer(bytearray([ord(name)]) * 16, dtype=torch.float32).view(2, 2) for name in "abc"}
    found = read_tensors(folder)
    names = {*LAYOUT.sizes, "model.safetensors.index.json"}
    return (
        found.keys() == expected.keys()
        and all(torch.equal(found[n], expected[n]) for n in expected)
        and {f.name for f in folder.iterdir()} == names
    )


def refused(make: Callable[[], object], *words: str) -> None:
    with pytest.raises(SpoliaError) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert all(problem.where and problem.mend for problem in caught.value.problems)


def enter(target: Path, key: str = "k", overwrite: bool = False) -> set[str]:
    """What a new staging takes for done."""
    with Staging(target, LAYOUT, key, overwrite=overwrite) as staging:
        return set(staging.done)


def test_layout_places_do_not_overlap_and_are_aligned() -> None:
    kinds = [DTYPES[code] for code in ("BOOL", "F64", "U8", "BF16", "F32", "I64")]
    made = [Slot(f"t.{i}", kinds[i % 6], (i % 4, 3)) for i in range(24)]
    layout = Layout.of(made, 200)
    for file, header in layout.headers.items():
        inside = sorted(
            ((p.start, p.slot) for p in layout.places.values() if p.file == file), key=lambda i: (i[0], i[1].nbytes)
        )
        assert len(header) % 8 == 0 and json.loads(header[8:])["__metadata__"] == {"format": "pt"}
        at = len(header)
        for start, slot in inside:
            assert start == at and start % slot.dtype.size == 0
            at += slot.nbytes
        assert at == layout.sizes[file]
    assert [p.slot.name for p in layout.places.values()] == [f"t.{i}" for i in range(24)]  # 2 before 10
    assert layout.nbytes == sum(layout.sizes.values())


def test_nothing_at_the_target_until_finish(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "er" / "m"
    with Staging(target, LAYOUT, "k") as staging:
        fill(staging)
        assert not target.exists()
        staging.finish()
        assert whole(target)
    assert whole(target) and [p.name for p in target.parent.iterdir()] == ["m"]


def test_two_writers(tmp_path: Path) -> None:
    code = (
        "import sys, pathlib; from spolia.core.staging import *; from spolia.errors import SpoliaError\n"
        "try: Staging(pathlib.Path(sys.argv[1]), Layout.of([], 99), 'other').__enter__()\n"
        "except SpoliaError as error: print(error)"
    )
    with Staging(tmp_path / "m", LAYOUT, "k") as staging:
        fill(staging, "a")
        refused(lambda: enter(tmp_path / "m"), "another process", "m.partial")
        words = [sys.executable, "-c", code, str(tmp_path / "m")]
        told = subprocess.run(words, capture_output=True, text=True, check=True).stdout
        assert "another process" in told and "mend" in told
        fill(staging, "bc")
        staging.finish()
    assert whole(tmp_path / "m")


@pytest.mark.parametrize("change", ["nothing", "key", "boot", "layout", "missing shard", "short shard", "empty log"])
def test_what_is_kept_after_a_stop(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, partial = tmp_path / "m", tmp_path / "m.partial"
    with Staging(target, LAYOUT, "k") as staging:
        fill(staging, "ab")
    shard = partial / "model-00001-of-00002.safetensors"
    if change == "boot":
        monkeypatch.setattr(module, "_boot_id", lambda: "another boot")
    elif change == "missing shard":
        shard.unlink()
    elif change == "short shard":
        os.truncate(shard, 50)
    elif change == "empty log":
        os.truncate(partial / LOG, 0)
    plan = Layout.of(slots("a", "b", "c"), 16) if change == "layout" else LAYOUT
    with Staging(target, plan, "k2" if change == "key" else "k") as staging:
        assert staging.done == ({"a", "b"} if change == "nothing" else set())
        fill(staging, "c" if change == "nothing" else "abc")
        staging.finish()
    assert change == "layout" or whole(target)
    assert len(read_tensors(target)) == 3


def test_a_half_written_log_line_counts_for_nothing(tmp_path: Path) -> None:
    target, log = tmp_path / "m", tmp_path / "m.partial" / LOG
    with Staging(target, LAYOUT, "k") as staging:
        staging.mark("7:0")
    with log.open("a") as stream:
        stream.write("1")
    with Staging(target, LAYOUT, "k") as staging:
        assert staging.done == {"7:0"}
        staging.mark("2:0")
    assert enter(target) == {"7:0", "2:0"}  # not 12:0


def test_leftovers_of_a_stopped_attempt_do_not_reach_the_result(tmp_path: Path) -> None:
    with Staging(tmp_path / "m", LAYOUT, "k") as staging:
        fill(staging)
        staging.write_text("tokenizer.json", "of another donor")
    with Staging(tmp_path / "m", LAYOUT, "k") as staging:
        assert staging.done == {"a", "b", "c"}
        staging.finish()
    assert whole(tmp_path / "m")


def test_writing_again_after_a_kill_writes_the_new_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(staging: Staging) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Staging, "finish", killed)
        write_checkpoint(tmp_path / "m", {"old": torch.zeros(3)}, {"model_type": "old"})
    write_checkpoint(tmp_path / "m", {"new": torch.ones(3)})
    assert read_tensors(tmp_path / "m").keys() == {"new"}
    assert [f.name for f in (tmp_path / "m").iterdir()] == ["model.safetensors"]


def put(target: Path, kind: str) -> None:
    """Something of the user's at the target."""
    if kind == "file":
        target.write_text("x")
    elif kind.endswith("link"):
        target.symlink_to(target.with_name("nowhere" if kind == "broken link" else "elsewhere"))
    else:
        target.mkdir()
        (target / "thesis.tex").write_text("x")


@pytest.mark.parametrize("kind", ["folder", "file", "broken link"])
def test_an_existing_target_is_refused_at_once(kind: str, tmp_path: Path) -> None:
    put(tmp_path / "m", kind)
    refused(lambda: enter(tmp_path / "m"), str(tmp_path / "m"))
    assert not (tmp_path / "m.partial").exists()


@pytest.mark.parametrize("kind", ["empty folder", "link to an empty folder"])
def test_an_empty_folder_is_accepted_but_no_link_to_one(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "m"
    (tmp_path / "big-disk").mkdir()
    target.symlink_to(tmp_path / "big-disk") if "link" in kind else target.mkdir()
    if "link" in kind:
        refused(lambda: enter(target), str(target))
        return
    with Staging(target, LAYOUT, "k") as staging:
        fill(staging)
        staging.finish()
    assert whole(target)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_overwrite(kind: str, tmp_path: Path) -> None:
    put(elsewhere := tmp_path / "elsewhere", "folder")
    put(target := tmp_path / "m", kind)
    with Staging(target, LAYOUT, "k", overwrite=True) as staging:
        fill(staging)
        assert target.exists()  # the old one stands until the new one is whole
        staging.finish()
    assert whole(target) and {p.name for p in tmp_path.iterdir()} == {"m", "elsewhere"}
    assert (elsewhere / "thesis.tex").read_text() == "x"


def test_a_target_that_appears_meanwhile_is_not_replaced(tmp_path: Path) -> None:
    target = tmp_path / "m"
    with Staging(target, LAYOUT, "k") as staging:
        fill(staging)
        put(target, "folder")
        refused(staging.finish, str(target))
    assert (target / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize("name", ["m.partial", "m.replaced"])
def test_folders_that_happen_to_have_our_names_survive(name: str, tmp_path: Path) -> None:
    put(mine := tmp_path / name, "folder")
    try:
        with Staging(tmp_path / "m", LAYOUT, "k") as staging:
            fill(staging)
            staging.finish()
    except SpoliaError:
        pass
    assert (mine / "thesis.tex").read_text() == "x"


@pytest.mark.parametrize(
    ("name", "number", "word"),
    [
        ("posix_fallocate", errno.ENOSPC, "free some space"), ("pwrite", errno.ENOSPC, "free some space"),
        ("pwrite", errno.EDQUOT, "free some space"), ("pwrite", errno.EIO, "check the disk"),
        ("write", errno.ENOSPC, "free some space"), ("fsync", errno.EIO, "check the disk"),
        ("rename", errno.EIO, "check the disk"), ("mkdir", errno.EACCES, "may write"),
        ("mkdir", errno.EROFS, "read-only"),
    ],
)  # fmt: skip
def test_disk_errors_are_told_and_gone_on_from(
    name: str, number: int, word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def work() -> None:
        with Staging(tmp_path / "m", LAYOUT, "k") as staging:
            fill(staging)
            staging.write_text("README.md", "x")
            staging.finish()

    def fail(*args: object, **others: object) -> None:
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(os, name, fail)
        refused(work, word)
        assert not (tmp_path / "m").exists()
    work()
    assert len(read_tensors(tmp_path / "m")) == 3


@pytest.mark.parametrize("act", ["mark", "write_text", "copy"])
def test_a_full_disk_beside_the_weights(act: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **others: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    (tmp_path / "vocab.json").write_text("{}")
    with Staging(tmp_path / "m", LAYOUT, "k") as staging, monkeypatch.context() as patched:
        for owner, name in ((os, "write"), (shutil, "copyfile"), (Path, "write_text")):
            patched.setattr(owner, name, fail)
        acts = {
            "mark": lambda: staging.mark("a"),
            "write_text": lambda: staging.write_text("x", "x"),
            "copy": lambda: staging.copy(tmp_path / "vocab.json"),
        }
        refused(acts[act], "space")
    assert enter(tmp_path / "m") == set()


@pytest.mark.parametrize("odd", ["short writes", "no allocation"])
def test_odd_disks_are_fine(odd: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    pwrite = os.pwrite
    if odd == "no allocation":
        monkeypatch.setattr(os, "posix_fallocate", never)
    else:
        monkeypatch.setattr(os, "pwrite", lambda fd, data, at: pwrite(fd, data[:3] if len(data) <= 16 else data, at))
    test_nothing_at_the_target_until_finish(tmp_path)


@pytest.mark.parametrize("name", [".", "..", "x" * 300, "x" * 250, "file/below", "/proc/m"])
def test_impossible_targets_are_refused(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write_model: Callable[..., Path]
) -> None:
    model = write_model(tmp_path / "models" / "a", {"w": torch.ones(2)})
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "file").write_text("x")
    monkeypatch.chdir(tmp_path / "empty")
    refused(lambda: spolia.merge([model, model], out=name))
