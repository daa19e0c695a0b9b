"""The hostile corpus, made longer: random changes of a sound model folder; and what the whole of it costs in memory."""

from __future__ import annotations

import io
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

import spolia
from spolia.core.checkpoint import Checkpoint
from spolia.core.pickled import load
from spolia.parts.patterns import BadPattern, compile_patterns, first_fit

SHARDS, INDEX = [f"model-0000{k}-of-00002.safetensors" for k in (1, 2)], "model.safetensors.index.json"


def mutate(world: Path, draw: Callable[..., Any]) -> None:
    """One random change of one file of expert b."""
    file = draw(st.sampled_from(sorted(f for f in (world / "b").iterdir() if f.is_file())))
    raw = bytearray(file.read_bytes())
    at = draw(st.integers(0, max(len(raw) - 1, 0)))
    act = draw(st.sampled_from(["flip", "cut", "insert", "repeat", "delete", "rename", "swap", "zero"]))
    if act == "flip" and raw:
        raw[at] ^= 1 << draw(st.integers(0, 7))
    elif act == "cut":
        del raw[at:]
    elif act == "insert":
        raw[at:at] = draw(st.binary(min_size=1, max_size=9))
    elif act == "repeat":
        raw[at:at] = raw[at : at + draw(st.integers(1, 64))]
    elif act == "zero":
        raw[at : at + 8] = bytes(len(raw[at : at + 8]))
    elif act == "delete":
        file.unlink()
        return
    elif act in ("rename", "swap"):
        other = (
            world / "b" / draw(st.sampled_from([*SHARDS, INDEX, "model.safetensors", "config.json", "tokenizer.json"]))
        )
        if act == "swap" and other.is_file():
            raw, mine = other.read_bytes(), raw
            other.write_bytes(mine)
        else:
            file.rename(other)
            return
    file.write_bytes(raw)


def fuzz(data: st.DataObject, sound: Path, told: Callable[..., Any], root: Path) -> None:
    """After up to three changes: refused with nothing left, or every tensor whole and finite."""
    shutil.rmtree(root / "world", ignore_errors=True)
    world = shutil.copytree(sound, root / "world")
    for _ in range(data.draw(st.integers(1, 3))):
        mutate(world, data.draw)
        if not any((world / "b").iterdir()):
            break
    out = world / "out"
    if told(lambda: spolia.merge([world / "a", world / "b"], out=out, threads=1)) is not None:
        assert not out.exists()
        return
    found = {name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()}
    assert found and all(torch.isfinite(t.double()).all() for t in found.values())


@pytest.mark.slow
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_random_changes(data: st.DataObject, sound: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    fuzz(data, sound, told, tmp_path)


@pytest.mark.slow
@settings(max_examples=200, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@pytest.mark.filterwarnings("ignore")
def test_many_random_changes(data: st.DataObject, sound: Path, told: Callable[..., Any], tmp_path: Path) -> None:
    fuzz(data, sound, told, tmp_path)


EDGES = st.sampled_from([-1, 0, 1, 2, 3, 4, 5, 8, 12, 2**31, 2**32 + 1, 2**60, 2**62, 2**63 - 1, 2**63, 2**64, 10**30])
ODD = st.sampled_from([None, True, 1.0, "4", [], {}])
LIES = st.one_of(
    st.tuples(st.just("dtype"), st.sampled_from(["F16", "I8", "BOOL", "F64", "I32", "F4", "", 7])),
    st.tuples(st.just("shape"), st.lists(EDGES | st.integers(0, 4) | ODD, max_size=4) | ODD),
    st.tuples(st.just("data_offsets"), st.lists(EDGES | st.integers(0, 24), min_size=2, max_size=2) | ODD),
)


@settings(max_examples=150, deadline=None)
@given(
    shapes=st.dictionaries(st.text(max_size=3), st.lists(st.integers(0, 3), max_size=3), min_size=1, max_size=3),
    lies=st.lists(st.tuples(st.integers(0, 2), LIES), max_size=2),
    cut=st.integers(0, 9),
)
def test_random_headers(
    shapes: dict[str, list[int]], lies: list[Any], cut: int, told: Callable[..., Any], tmp_path_factory: Any
) -> None:
    """A sound header with up to two lies: what is taken is taken by another reader too, with the same bytes."""
    entries, at = list[dict[str, Any]](), 0
    for shape in shapes.values():
        entries.append({"dtype": "F32", "shape": shape, "data_offsets": [at, at + 4 * math.prod(shape)]})
        at = entries[-1]["data_offsets"][1]
    for place, (field, value) in lies:
        entries[place % len(entries)][field] = value
    text = json.dumps(dict(zip(shapes, entries, strict=True))).encode()
    raw = (len(text).to_bytes(8, "little") + text + bytes(k % 251 for k in range(at)))[: None if cut < 8 else -1]
    (file := tmp_path_factory.getbasetemp() / "fuzzed.safetensors").write_bytes(raw)
    opened: list[Checkpoint] = []
    if told(lambda: opened.append(Checkpoint.open(file))) is None:
        theirs = {name: (tuple(t["shape"]), bytes(t["data"])) for name, t in safetensors.deserialize(raw)}
        assert theirs == {name: (t.shape, raw[t.start : t.stop]) for name, t in opened[0].tensors.items()}
    else:
        assert lies or cut >= 8


@settings(max_examples=150, deadline=None)
@given(data=st.data(), old=st.booleans())
@pytest.mark.filterwarnings("ignore")
def test_random_pickles(data: st.DataObject, old: bool, told: Callable[..., Any], tmp_path_factory: Any) -> None:
    """A sound state dict with up to four bytes changed and perhaps its end gone: tensors, or a refusal."""
    torch.save(
        {"w": torch.ones(2, 3), "b": torch.zeros(2)}, out := io.BytesIO(), _use_new_zipfile_serialization=not old
    )
    raw = bytearray(out.getvalue())  # its length changes with addresses in it, so no draw may depend on that
    for _ in range(data.draw(st.integers(0, 4))):
        raw[data.draw(st.integers(0, 9999)) % len(raw)] = data.draw(st.integers(0, 255))
    (file := tmp_path_factory.getbasetemp() / "fuzzed.bin").write_bytes(raw[: data.draw(st.integers(1, 2000))])
    found: list[dict[str, torch.Tensor]] = []
    if told(lambda: found.append(load(file))) is None:
        assert all(isinstance(t, torch.Tensor) and t.numel() <= len(raw) for t in found[0].values())


@settings(max_examples=250, deadline=None)
@given(pattern=st.text("ab.|()*+?[]^$-\\d", max_size=7), names=st.lists(st.text("ab.1", max_size=6), max_size=4))
def test_random_patterns(pattern: str, names: list[str]) -> None:
    """Those that are read fit what PEFT's rule fits. Short ones, so that Python's `re` ends."""
    try:
        patterns = compile_patterns({pattern: True}, names)
    except BadPattern:
        return
    rule = re.compile(rf"(.*\.)?({pattern})$")
    assert [first_fit(patterns, n, False) for n in names] == [bool(rule.match(n)) for n in names]


WATCH = """
import resource, sys
from pathlib import Path
import pytest, spolia, torch, hypothesis, safetensors.torch
here = Path(sys.argv[1])
spolia.merge([{"w": torch.ones(2, 2)}] * 2)
spolia.inspect({"w": torch.ones(2, 2)}, [{"w": torch.ones(2, 2)}])
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
files = [str(here / f"test_{name}.py") for name in ("headers", "models")]
code = pytest.main(["-q", "-p", "no:cacheprovider", *files])
print("GROWN", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
sys.exit(code)
"""


@pytest.mark.slow
def test_files_that_claim_much_take_little_memory() -> None:
    """200 MB: a header of 1 MB in a hundred forms, the test runner's own books, and nothing of what the files claim."""
    call = [sys.executable, "-c", WATCH, str(Path(__file__).parent)]
    ended = subprocess.run(call, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stdout[-3000:]
    assert int(ended.stdout.rpartition("GROWN ")[2]) < 200_000  # KiB
