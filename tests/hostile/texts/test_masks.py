"""Hostile masks: files that are cut, lie about their shapes, or belong to somebody else; and names that cannot be files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import spolia

pytestmark = pytest.mark.sampled(3)  # of many cases alike

Change = Callable[[dict[str, Any]], Any]
SHAPES = {"model.embed_tokens.weight": [4, 2], "model.layers.0.w.weight": [3, 2]}
EMBED = "model.embed_tokens.weight"


def nothing(header: dict[str, Any]) -> None:
    pass


def about(**changes: Any) -> Change:
    """Changes the metadata; None takes a key away."""

    def change(header: dict[str, Any]) -> None:
        told = header["__metadata__"] | changes
        header["__metadata__"] = {key: value for key, value in told.items() if value is not None}

    return change


def entry(name: str, **changes: Any) -> Change:
    return lambda header: header[name].update(changes)


HEADERS: dict[str, Change] = {
    **{f"without {key}": about(**{key: None}) for key in ("format", "expert", "method", "shapes")},
    **{f"{key} is {value!r:.24}": about(**{key: value}) for key, value in (
        ("format", "spolia mask 2"), ("format", 5), ("format", []), ("expert", 5), ("expert", {}), ("expert", "\ud800"),
        ("expert", "b"), ("expert", ""), ("expert", "x" * 300), ("expert", "../a"), ("method", []), ("method", 5),
        ("shapes", 5), ("shapes", ""), ("shapes", "[]"), ("shapes", "{}"), ("shapes", "null"), ("shapes", "7"),
        ("shapes", "[" * 100_000), ("shapes", '{"a":' * 100_000), ("shapes", '{"a": ' + "9" * 5000 + "}"),
        ("shapes", "{'a': 1}"), ("shapes", "\ud800"), ("shapes", "NaN"))},
    **{f"a shape is {shape!r:.24}": about(shapes=json.dumps(SHAPES | {EMBED: shape})) for shape in (
        5, None, "8", "", {}, [], [8], [2, 4], [-4, -2], [4.0, 2.0], ["4", 2], [4, 2, 1], [2**63], [4, [2]], [10**400],
        [True, 8], [8] * 100_000, [0], [None], [1e999], [4, 2.5])},
    "one more tensor": about(shapes=json.dumps(SHAPES | {"x": [8]})),
    "one tensor fewer": about(shapes=json.dumps({EMBED: [4, 2]})),
    "another tensor": about(shapes=json.dumps({"x": [4, 2], "model.layers.0.w.weight": [3, 2]})),
    "no metadata": lambda header: header.pop("__metadata__"),
    "metadata that is a list": lambda header: header.update(__metadata__=[]),
    "metadata that is null": lambda header: header.update(__metadata__=None),
    "no factor": lambda header: header.pop("spolia.rescaler"),
    "a factor of two numbers": entry("spolia.rescaler", dtype="F32", shape=[2]),
    "a factor of bytes": entry("spolia.rescaler", dtype="U8", shape=[8]),
    "a factor of whole numbers": entry("spolia.rescaler", dtype="I64"),
    "bits as numbers of another type": entry(EMBED, dtype="I8"),
    "bits as truths": entry(EMBED, dtype="BOOL"),
}  # fmt: skip
NAMES = (
    "", ".", "..", "../b", "/", "nobody", "a\0", "\0", "\ud800", "x" * 300, "\u00e4" * 60, "a/", "A", "a ", "*",
    "a.safetensors",
    5, None, [], {}, b"a", 1.5,
)  # fmt: skip
FACTORS = {"nan": b"\0\0\0\0\0\0\xf8\x7f", "inf": b"\0\0\0\0\0\0\xf0\x7f", "-inf": b"\0\0\0\0\0\0\xf0\xff"}


@pytest.fixture
def merged(sound: Path, tmp_path: Path) -> Path:
    """A folder with base and a merge that has masks, to spoil."""
    world = tmp_path / "world"
    for name in ("base", "merged"):
        shutil.copytree(sound / name, world / name)
    return world


def refused(world: Path, told: Callable[..., str | None], expert: Any = "a") -> None:
    before = sorted(world.rglob("*"))
    message = told(lambda: spolia.attach(world / "merged", expert, base=world / "base", out=world / "out", threads=1))
    assert message is not None and len(message) < 20_000 and sorted(world.rglob("*")) == before


@pytest.mark.sampled(8)
@pytest.mark.parametrize("change", [pytest.param(change, id=ascii(name)) for name, change in HEADERS.items()])
def test_headers_that_lie(change: Change, merged: Path, told: Callable[..., str | None]) -> None:
    file = merged / "merged" / "masks" / "a.safetensors"
    raw = file.read_bytes()
    end = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:end])
    change(header)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + raw[end:])
    refused(merged, told)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 100, 300, -1])
def test_files_that_are_cut(size: int, merged: Path, told: Callable[..., str | None]) -> None:
    file = merged / "merged" / "masks" / "a.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(merged, told)


@pytest.mark.parametrize("factor", FACTORS.values(), ids=FACTORS)
def test_factors_that_are_no_numbers(factor: bytes, merged: Path, told: Callable[..., str | None]) -> None:
    file = merged / "merged" / "masks" / "a.safetensors"
    raw = file.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    file.write_bytes(raw[:start] + factor + raw[start + 8 :])
    refused(merged, told)


@pytest.mark.parametrize("name", [pytest.param(name, id=f"{name!a:.20}") for name in NAMES])
def test_names_of_nobody(name: Any, merged: Path, told: Callable[..., str | None]) -> None:
    refused(merged, told, name)


@pytest.mark.parametrize("name", ["x" * 300, "\u00e4" * 60, "\ud800", "\U0001f5ff" * 30])
@pytest.mark.parametrize("door", ["merge", "masks"])
def test_experts_whose_masks_could_not_be_files_are_refused_before_the_work(
    name: str, door: str, sound: Path, tmp_path: Path, told: Callable[..., str | None]
) -> None:
    experts, options = {"a": sound / "a", name: sound / "b"}, {"base": sound / "base", "method": "emr", "threads": 1}
    out = {"out": tmp_path / "out"} if door == "merge" else {}
    assert told(lambda: getattr(spolia, door)(experts, **options, **out)) is not None
    assert not list(tmp_path.iterdir())


def test_a_sound_mask_is_put_on(merged: Path, told: Callable[..., str | None]) -> None:
    assert (
        told(lambda: spolia.attach(merged / "merged", "a", base=merged / "base", out=merged / "out", threads=1)) is None
    )
    assert (merged / "out" / "model.safetensors").is_file()


def test_there_are_enough() -> None:
    assert len(HEADERS) + len(NAMES) + len(FACTORS) + 8 + 8 >= 80
