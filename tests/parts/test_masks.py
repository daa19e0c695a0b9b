"""Masks: what is packed comes back, in memory and on disk, and files that lie are refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from spolia.errors import SpoliaError
from spolia.parts.masks import RESCALER, Mask, file_of, mask_bytes

SHAPES = {"a.weight": (5, 7), "b": (3,), "scalar": (), "none": (0, 4), "c": (16,)}


def filled(file: Path | None, seed: int = 0) -> tuple[Mask, dict[str, np.ndarray]]:
    mask = Mask.blank("math", "emr", SHAPES, 1.25, file)
    draw = np.random.default_rng(seed)
    bits = {name: draw.integers(0, 2, int(np.prod(shape))).astype(np.uint8) for name, shape in SHAPES.items()}
    for name, row in bits.items():
        mask.packed[name][:] = np.packbits(row)
    return mask, bits


def test_a_file_gives_back_what_was_written(tmp_path: Path):
    file = tmp_path / "math.safetensors"
    _, bits = filled(file)
    mask = Mask.open(file)
    assert (mask.expert, mask.method, mask.shapes, mask.rescaler) == ("math", "emr", SHAPES, 1.25)
    for name, row in bits.items():
        assert mask.bits(name, 0, row.size).tolist() == row.tolist()
    assert file.stat().st_size == mask_bytes(SHAPES, "math", "emr")
    packed = load_file(file)  # the reference reader
    assert float(packed[RESCALER]) == 1.25 and packed["a.weight"].dtype == torch.uint8
    assert np.unpackbits(packed["a.weight"].numpy())[:35].tolist() == bits["a.weight"].tolist()


@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_slice(data: st.DataObject):
    mask, bits = filled(None, 3)
    name = data.draw(st.sampled_from(["a.weight", "b", "c", "scalar"]))
    stop = data.draw(st.integers(0, bits[name].size))
    start = data.draw(st.integers(0, stop))
    assert mask.bits(name, start, stop).tolist() == bits[name][start:stop].tolist()


def test_less_than_a_bit_and_a_header():
    shapes = {f"layers.{k}.weight": (512, 512) for k in range(20)}
    header = mask_bytes(shapes) - 20 * 512 * 512 // 8
    assert 0 < header < 250 * len(shapes) + 300  # a few hundred bytes a tensor beside its bits


@pytest.mark.parametrize("name", ["math", "../up", "a/b", "..", "a b", "ünï", "x" * 60])
def test_any_name_stays_in_the_folder(name: str, tmp_path: Path):
    file = file_of(tmp_path, name)
    assert file.parent == tmp_path / "masks" and file.resolve().parent == (tmp_path / "masks").resolve()
    file.parent.mkdir()
    Mask.blank(name, "emr", {"b": (3,)}, 1.0, file)
    assert Mask.of(tmp_path, name).expert == name


def test_what_is_not_there_is_told(tmp_path: Path):
    with pytest.raises(SpoliaError, match="holds no masks"):
        Mask.of(tmp_path, "math")
    (tmp_path / "masks").mkdir()
    filled(file_of(tmp_path, "math"))
    with pytest.raises(SpoliaError, match=r"(?s)holds no mask of `maths`.*math"):
        Mask.of(tmp_path, "maths")


@pytest.mark.parametrize("fault", ["no mask", "format", "shapes", "rescaler", "short", "not json"])
def test_files_that_lie_are_refused(fault: str, tmp_path: Path):
    file = tmp_path / "x.safetensors"
    filled(file)
    tensors, about = load_file(file), {"format": "spolia mask 1", "expert": "math", "method": "emr"}
    about["shapes"] = json.dumps(SHAPES)
    if fault == "no mask":
        about = {}
    elif fault == "format":
        about["format"] = "other"
    elif fault == "shapes":
        about["shapes"] = json.dumps({**SHAPES, "b": (300,)})
    elif fault == "rescaler":
        del tensors[RESCALER]
    elif fault == "not json":
        about["shapes"] = "{"
    save_file(tensors, file, about)
    if fault == "short":
        file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(SpoliaError):
        Mask.open(file)
