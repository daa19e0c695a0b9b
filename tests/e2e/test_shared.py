"""One merge by several processes: whoever dies, joins or comes late, the bytes are those of one process alone."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import spolia
from spolia.core.claims import Claims, Gone
from spolia.errors import SpoliaError

Write, Fork = Callable[..., Path], Callable[..., Any]
MERGE = """
import json, sys, spolia
call = json.loads(sys.argv[1])
spolia.merge(call.pop("experts"), share=True, **call)
"""
# Dies at the n-th file that it makes or renames, after it: between any two steps of claiming, publishing and finishing.
STEP = (
    """
import os, signal
name, number = os.environ["DIE"].split()
true, calls = getattr(os, name), []
def dies(*args, **options):
    result = true(*args, **options)
    if name == "fsync" or ".partial" in str(args):
        calls.append(name)
        if len(calls) == int(number):
            os.kill(os.getpid(), signal.SIGKILL)
    return result
setattr(os, name, dies)
"""
    + MERGE
)
METHODS = [
    ("average", {}), ("dare", {}), ("ties", {}), ("ties", {"at_threshold": "exact"}), ("breadcrumbs", {}), ("pcb", {}),
    ("ramplus", {}), ("tsv", {}), ("emr", {}), ("della", {"rescale": "l1"}),
]  # fmt: skip


def digest(folder: Path) -> dict[str, str]:
    return {
        str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.rglob("*") if f.is_file()
    }


def tensors(seed: int, count: int, size: int) -> dict[str, torch.Tensor]:
    noise = torch.Generator().manual_seed(seed)
    found = {f"layers.{i}.w": torch.randn(size // 100, 100, generator=noise).bfloat16() for i in range(count)}
    return found | {"norm": torch.randn(7, generator=noise), "ids": torch.arange(5)}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> list[Path]:
    """A base and two experts, small, of many units."""
    folder = tmp_path_factory.mktemp("models")
    return [write_model(folder / f"m{i}", tensors(i, 40, 10_000), {"model_type": "x"}) for i in range(3)]


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory, write_model: Write) -> list[Path]:
    """The same, of 60 MB each: a merge takes long enough to be killed in the middle."""
    folder = tmp_path_factory.mktemp("large")
    return [write_model(folder / f"m{i}", tensors(i, 60, 500_000), {"model_type": "x"}) for i in range(3)]


def call(models: list[Path], method: str, out: Path, **others: object) -> dict[str, object]:
    base = None if method == "average" else str(models[0])
    return {
        "experts": [str(m) for m in models[1:]], "base": base, "method": method, "out": str(out), "threads": 1,
        "max_shard_size": 300_000,
    } | others  # fmt: skip


def merge(asked: dict[str, object], **others: object) -> None:
    options = asked | others
    spolia.merge(options.pop("experts"), **options)  # type: ignore[arg-type]


def end(child: Any) -> str:
    _, complaint = child.communicate()
    assert child.returncode == 0, complaint[-2000:]
    return complaint


@pytest.mark.slow
@pytest.mark.parametrize(("method", "settings"), METHODS)
def test_shared_bytes_are_those_of_one_process(
    method: str, settings: dict[str, object], models: list[Path], tmp_path: Path, fork: Fork
) -> None:
    merge(call(models, method, tmp_path / "one" / "out", settings=settings))
    asked = call(models, method, tmp_path / "two" / "out", settings=settings)
    first, second = (fork(MERGE, json.dumps(asked | {"threads": threads})) for threads in (1, 3))
    end(first), end(second)
    assert digest(tmp_path / "two" / "out") == digest(tmp_path / "one" / "out")
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["out"]


@pytest.mark.slow
def test_alone_and_late(models: list[Path], tmp_path: Path) -> None:
    """One process with `share` does it all; one that comes after the end has nothing to do, and says no error."""
    asked = call(models, "ties", tmp_path / "out")
    merge(asked, share=True)
    found, stamp = digest(tmp_path / "out"), (tmp_path / "out" / "model.safetensors.index.json").stat().st_mtime_ns
    merge(asked, share=True)
    assert (tmp_path / "out" / "model.safetensors.index.json").stat().st_mtime_ns == stamp
    merge(asked | {"out": str(tmp_path / "one" / "out")})
    assert digest(tmp_path / "one" / "out") == found
    with pytest.raises(SpoliaError, match="exists already"):  # another merge is no late comer
        merge(asked | {"method": "dare"}, share=True)
    os.utime(models[1] / "model.safetensors")  # an expert that changed since makes it another merge
    with pytest.raises(SpoliaError, match="exists already"):
        merge(asked, share=True)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["average", "ties", "tsv"])
def test_killed_at_random_the_others_finish(method: str, large: list[Path], tmp_path: Path, fork: Fork) -> None:
    merge(call(large, method, tmp_path / "one" / "out", max_shard_size=20_000_000))
    asked = call(large, method, tmp_path / "two" / "out", max_shard_size=20_000_000)
    chance, marks = random.Random(method), tmp_path / "two" / "out.partial" / ".spolia-share"
    survivor, victims = fork(MERGE, json.dumps(asked)), [fork(MERGE, json.dumps(asked))]
    killed = 0
    for _ in range(3):
        done, goal = 0, chance.randint(1, 12)
        before = len(list(marks.glob("*.done"))) if marks.is_dir() else 0
        while victims[-1].poll() is None and done < before + goal:
            time.sleep(0.005)
            with contextlib.suppress(OSError):
                done = len([f for f in marks.iterdir() if f.suffix == ".done"])
        victims[-1].kill()
        victims[-1].communicate()
        killed += victims[-1].returncode == -signal.SIGKILL
        victims.append(fork(MERGE, json.dumps(asked)))
    end(survivor), end(victims[-1])
    assert killed  # else nothing was tested
    assert digest(tmp_path / "two" / "out") == digest(tmp_path / "one" / "out")
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["out"]


@pytest.fixture(scope="module")
def alone(models: list[Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What one process makes of them by ties."""
    out = tmp_path_factory.mktemp("alone") / "out"
    merge(call(models, "ties", out))
    return digest(out)


STEPS = (
    [("open", n) for n in (1, 2, 4)]
    + [("link", n) for n in (1, 2, 30, 130)]
    + [("fsync", n) for n in (1, 3, 40)]
    + [("rename", 1)]
)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "number"), STEPS)
def test_all_killed_the_next_goes_on(
    name: str, number: int, models: list[Path], alone: dict[str, str], tmp_path: Path, fork: Fork
) -> None:
    asked = call(models, "ties", tmp_path / "two" / "out")
    dead = fork(STEP, json.dumps(asked), DIE=f"{name} {number}")
    dead.communicate()
    assert dead.returncode == -signal.SIGKILL
    if (tmp_path / "two" / "out").exists():  # it died after the rename: whole
        assert alone.items() <= digest(tmp_path / "two" / "out").items()
    merge(asked, share=True)
    assert digest(tmp_path / "two" / "out") == alone
    assert [p.name for p in (tmp_path / "two").iterdir()] == ["out"]


def test_another_merge_is_refused_before_any_work(models: list[Path], tmp_path: Path) -> None:
    asked = call(models, "ties", tmp_path / "out")
    marks = Claims(tmp_path / "out.partial" / ".spolia-share")
    with marks:
        marks.agree({"method": "linear", "torch": "0", "all": "x" * 64})
        with pytest.raises(SpoliaError) as caught:
            merge(asked, share=True)
    told = str(caught.value)
    assert all(word in told for word in ("method (`linear` there, `ties` here)", "torch", "out.partial", "delete"))
    assert "x" * 64 not in told  # digests say nothing to a person
    assert [f.name for f in (tmp_path / "out.partial").iterdir()] == [".spolia-share"]
    assert len(list(marks.folder.glob("work-*.json"))) == 1  # the one refused left no mark


@pytest.mark.parametrize(
    "change",
    [{"settings": {"density": 0.3}}, {"seed": 1}, {"dtype": "float32"}, {"max_shard_size": 100_000}, {"base": 1}],
)
def test_every_difference_is_seen(change: dict[str, object], models: list[Path], tmp_path: Path) -> None:
    from spolia.catalog import find
    from spolia.runs.asked import check_settings, request_from
    from spolia.runs.merging import prepare
    from spolia.runs.target import agreement

    def stated(base: Path = models[0], **given: object) -> dict[str, str]:
        method, size = find("ties"), given.get("max_shard_size", 300_000)
        settings = check_settings(method, given.get("settings"), 2)  # type: ignore[arg-type]
        asked = request_from(models[1:], base, method, settings, given.get("dtype"), given.get("seed", 0))  # type: ignore[arg-type]
        return agreement(prepare(asked, max_shard_size=size))  # type: ignore[arg-type]

    other = {"base": models[1]} if "base" in change else change
    assert stated() == stated()
    assert stated() != stated(**other)  # type: ignore[arg-type]


@pytest.mark.slow
def test_one_alone_and_several_do_not_mix(models: list[Path], tmp_path: Path) -> None:
    asked = call(models, "ties", tmp_path / "out")

    class Stop:
        def start(self, *_: object) -> None: ...
        def finish(self) -> None: ...
        def advance(self, *_: object, **__: object) -> None:
            raise KeyError

    for share in (False, True):
        with pytest.raises(KeyError):
            merge(asked, share=share, progress=Stop())
        with pytest.raises(SpoliaError) as caught:
            merge(asked, share=not share)
        assert str(tmp_path / "out.partial") in str(caught.value)
        merge(asked, share=share)
        import shutil

        shutil.rmtree(tmp_path / "out")


# --- claims ----------------------------------------------------------------------------------------------------------


def test_a_claim_is_one_process_s_until_it_ends(tmp_path: Path) -> None:
    with Claims(tmp_path / "c") as one:
        assert one.claim("a") and one.claim("b")
        with Claims(tmp_path / "c") as two:
            assert not two.claim("a") and two.others() == 1
            one.publish("a", [torch.arange(3), 2, (1.5, None)])
            assert not two.claim("a") and two.left(["a", "b", "c"]) == [1, 2]
            found = two.found("a")
            assert torch.equal(found[0], torch.arange(3)) and found[1:] == [2, (1.5, None)]
            assert two.claim("c")
        assert one.others() == 0 and one.claim("c")  # leaving gives back
    assert sorted(f.name for f in (tmp_path / "c").iterdir()) == ["a.done"]


def test_claims_of_the_dead_are_taken(tmp_path: Path) -> None:
    code = "import sys, os, signal; from pathlib import Path; from spolia.core.claims import Claims\n"
    code += "c = Claims(Path(sys.argv[1])); c.__enter__(); c.claim('a'); os.kill(os.getpid(), signal.SIGKILL)"
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "c")], check=False)
    assert (tmp_path / "c" / "a.claim").exists()
    with Claims(tmp_path / "c") as claims:
        assert claims.claim("a")


@pytest.mark.slow
def test_claims_of_another_machine_are_taken_once_they_stand_still(tmp_path: Path) -> None:
    """Its processes cannot be seen, only the touches; clocks may differ by any amount."""
    file = tmp_path / "c" / "a.claim"
    with Claims(tmp_path / "c", beat=0.05, stale=0.5) as claims:
        file.write_text(json.dumps({"place": "elsewhere", "pid": 1, "token": "x"}))
        end = time.monotonic() + 1.5
        for moment in range(10**6):  # as long as it is touched it stays its owner's
            os.utime(file, (moment, moment))
            assert not claims.claim("a")
            if time.monotonic() > end:
                break
            time.sleep(0.01)
        while not claims.claim("a"):
            assert time.monotonic() < end + 30
            time.sleep(0.02)
        touched = file.stat().st_mtime_ns
        while file.stat().st_mtime_ns == touched:  # and now we touch it
            assert time.monotonic() < end + 60
            time.sleep(0.02)
    assert not file.exists()


def test_half_a_claim_and_a_folder_that_is_gone(tmp_path: Path) -> None:
    import shutil

    with Claims(tmp_path / "c", stale=0.1) as claims:
        (tmp_path / "c" / "a.claim").touch()  # without hard links an owner may die before it writes its name
        assert not claims.claim("a")
        time.sleep(0.3)
        assert claims.claim("a")
        shutil.rmtree(tmp_path / "c")
        for use in (lambda: claims.claim("b"), lambda: claims.publish("a"), lambda: claims.left(["a"])):
            with pytest.raises(Gone):
                use()
