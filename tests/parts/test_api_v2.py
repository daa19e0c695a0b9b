"""Messages of the Open Inference Protocol: there and back in both forms, and what is no message."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spolia.parts.api_answers import Misfit
from spolia.parts.api_v2 import packed, unpacked

TYPES = ["u1", "i4", "i8", "f2", "f4", "f8", "b1"]


@given(
    array=st.sampled_from(TYPES).flatmap(
        lambda kind: arrays.arrays(
            kind,
            arrays.array_shapes(min_dims=1, max_dims=3, min_side=0, max_side=4),
            elements=None if kind[0] != "f" else {"allow_nan": False, "allow_infinity": False},
        )
    ),
    binary=st.booleans(),
)
def test_tensors_arrive_as_they_were_sent(array: np.ndarray, binary: bool) -> None:
    body, length = packed({"id": "7"}, "inputs", {"x": array, "y": array[:1]}, binary=binary)
    head, found = unpacked(body, str(length) if binary else None, "inputs")
    assert head["id"] == "7"
    for name, sent in (("x", array), ("y", array[:1])):
        assert found[name].dtype == sent.dtype.newbyteorder("<")
        np.testing.assert_array_equal(found[name], sent)


def test_the_binary_form_is_the_protocols() -> None:
    body, length = packed({}, "inputs", {"x": np.array([[1.5, -2]], np.float32)}, binary=True)
    head = json.loads(body[:length])
    assert head["inputs"] == [{"name": "x", "shape": [1, 2], "datatype": "FP32", "parameters": {"binary_data_size": 8}}]
    assert body[length:] == bytes.fromhex("0000c03f000000c0")  # little-endian, row by row


def test_the_json_form_is_the_protocols() -> None:
    told = {"outputs": [{"name": "y", "shape": [2, 1], "datatype": "FP32", "data": [[0.25], [0.75]]}]}
    _, found = unpacked(json.dumps(told).encode(), None, "outputs")
    assert found["y"].tolist() == [[0.25], [0.75]]
    names = {"outputs": [{"name": "label", "shape": [2], "datatype": "BYTES", "data": ["cat", "dog"]}]}
    assert unpacked(json.dumps(names).encode(), None, "outputs")[1]["label"].tolist() == ["cat", "dog"]


def tensor(**more) -> bytes:
    return json.dumps({"outputs": [{"name": "y", "shape": [2], "datatype": "FP32", "data": [1, 2]} | more]}).encode()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>",
        b"[]",
        b"{}",
        b'{"outputs": 3}',
        b'{"outputs": [3]}',
        b"\xff\xfe\x00",
        b"[" * 100_000,
        b'{"error": "out of memory"}',
        tensor(name=None),
        tensor(shape=[3]),
        tensor(shape=[-1]),
        tensor(shape=[1 << 40, 1 << 40]),
        tensor(shape="2"),
        tensor(datatype="FP31"),
        tensor(data=["a", "b"]),
        tensor(data=None),
        tensor(data=[[1], [2, 3]]),
        tensor(parameters={"binary_data_size": 8}),
        tensor(parameters={"binary_data_size": -8}),
        tensor(parameters={"binary_data_size": "8"}),
    ],
)
def test_what_is_no_message_is_a_misfit(body: bytes) -> None:
    with pytest.raises(Misfit):
        unpacked(body, None, "outputs")


@pytest.mark.parametrize("length", ["x", "-1", "99999999", "3"])
def test_a_wrong_length_is_a_misfit(length: str) -> None:
    body, _ = packed({}, "outputs", {"y": np.ones(2, np.float32)}, binary=True)
    with pytest.raises(Misfit):
        unpacked(body, length, "outputs")


@given(st.binary(max_size=200), st.one_of(st.none(), st.text(max_size=5), st.integers(-5, 300).map(str)))
def test_any_bytes_are_a_message_or_a_misfit(body: bytes, length: str | None) -> None:
    try:
        unpacked(body, length, "outputs")
    except Misfit:
        return
