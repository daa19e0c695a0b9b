"""The Open Inference Protocol, version 2, over REST: what KServe, Triton and MLServer speak, tensors as JSON or binary.

    POST v2/models/NAME/infer      {"inputs": [{"name", "shape", "datatype", "data"}]} -> {"outputs": [ … ]}

With the binary extension a tensor's entry says `binary_data_size` in the place of `data`; the bytes, little-endian, follow the
JSON, whose length is the header Inference-Header-Content-Length. Both directions are here: clients ask, servers answer.
kserve/open-inference-protocol on GitHub has the text.

What a server of this package adds to a model's metadata is one entry, `parameters.contract` (api_answers.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any
from urllib.parse import quote

from spolia.core.lazy import np
from spolia.errors import SpoliaError
from spolia.parts.api_answers import Contract, Misfit
from spolia.parts.api_client import Endpoint
from spolia.parts.api_http import Reply, Session, check_installed, not_an_error, said

LENGTH = "Inference-Header-Content-Length"
BINARY = "binary_tensor_data"  # the extension's name in a server's metadata
INPUT = "input"
OUTPUTS = {"top": ("values", "classes")}  # of other answers: one, called as they are
_TYPES = {
    "BOOL": "|b1", "UINT8": "|u1", "UINT16": "<u2", "UINT32": "<u4", "UINT64": "<u8", "INT8": "|i1", "INT16": "<i2",
    "INT32": "<i4", "INT64": "<i8", "FP16": "<f2", "FP32": "<f4", "FP64": "<f8",
}  # fmt: skip
_NAMES = {np_type: name for name, np_type in _TYPES.items()}
_MOST = 1 << 31  # numbers of a tensor that anyone means


def outputs_of(contract: Contract) -> tuple[str, ...]:
    """Names of the tensors that answers come as."""
    return OUTPUTS.get(contract.answers, (contract.answers,))


# --- messages --------------------------------------------------------------------------------------------------------


def packed(head: Mapping[str, Any], key: str, tensors: Mapping[str, np.ndarray], *, binary: bool) -> tuple[bytes, int]:
    """A message with `tensors` listed under `key`, and the length of its JSON."""
    entries, blobs = [], []
    for name, array in tensors.items():
        array = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
        entry: dict[str, Any] = {"name": name, "shape": list(array.shape), "datatype": _NAMES[array.dtype.str]}
        if binary:
            blobs.append(array.tobytes())
            entry["parameters"] = {"binary_data_size": len(blobs[-1])}
        else:
            entry["data"] = array.ravel().tolist()
        entries.append(entry)
    text = json.dumps({**head, key: entries}, separators=(",", ":"), allow_nan=True).encode()
    return b"".join([text, *blobs]), len(text)


def unpacked(body: bytes, length: str | None, key: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The message's JSON and the tensors listed under `key`. Misfit where anything is not as the protocol has it."""
    head: Any
    try:
        size = len(body) if length is None else int(length)
        head = json.loads(body[:size]) if 0 <= size <= len(body) else None
    except (ValueError, RecursionError):
        raise Misfit(f"no message of the protocol: {said(body)}") from None
    not_an_error(head)
    if not isinstance(head, dict) or not isinstance(head.get(key), list):
        raise Misfit(f"no message of the protocol: it has no list `{key}`")
    tensors, rest = {}, memoryview(body)[size:]
    for entry in head[key]:
        name, array, used = _tensor(entry, rest)
        tensors[name], rest = array, rest[used:]
    if len(rest):
        raise Misfit(f"{len(rest)} bytes more than its tensors take")
    return head, tensors


def _tensor(entry: Any, rest: memoryview) -> tuple[str, np.ndarray, int]:
    """One entry's name and array, and how many of the bytes that follow it took."""
    if not isinstance(entry, dict) or not isinstance(entry.get("name"), str):
        raise Misfit("a tensor without a name")
    name, shape, kind = entry["name"], entry.get("shape"), entry.get("datatype")
    sizes = shape if isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape) else None
    if sizes is None or math.prod(sizes) > _MOST or (kind not in _TYPES and kind != "BYTES"):
        raise Misfit(f"tensor `{name}` of shape {shape} and type {kind}")
    told = entry.get("parameters")
    size = told.get("binary_data_size") if isinstance(told, dict) else None
    if size is not None:
        wanted = None if kind == "BYTES" else math.prod(sizes) * np.dtype(_TYPES[kind]).itemsize
        if type(size) is not int or not 0 <= size <= len(rest) or size != wanted:
            raise Misfit(f"tensor `{name}` of shape {sizes} in {size} bytes, {len(rest)} of which came")
        return name, np.frombuffer(rest[:size], _TYPES[kind]).reshape(sizes), size
    data = entry.get("data")
    try:
        array = np.array(data, dtype=object if kind == "BYTES" else _TYPES[kind]) if isinstance(data, list) else None
    except (ValueError, TypeError, OverflowError):
        array = None
    if array is None or array.size != math.prod(sizes):
        raise Misfit(f"tensor `{name}`: its data are no {math.prod(sizes)} numbers of type {kind}")
    return name, array.reshape(sizes), 0


# --- the client's side -----------------------------------------------------------------------------------------------


class V2Endpoint(Endpoint):
    """A model of a server. `contract`: for servers that do not tell theirs; `names`: what they call input and outputs."""

    def __init__(
        self,
        session: Session,
        model: str,
        contract: Contract | None = None,
        *,
        names: tuple[str, Sequence[str]] | None = None,
        binary: bool | None = None,
    ):
        check_installed()
        spoken = _Spoken(session, f"v2/models/{quote(model, safe='')}", contract, names, binary)
        super().__init__(f"{session.url} {model}", spoken.ask, spoken.look, session.close)


class _Spoken:
    """How one model is asked; what its server tells is learned at the first look."""

    def __init__(
        self,
        session: Session,
        path: str,
        contract: Contract | None,
        names: tuple[str, Sequence[str]] | None,
        binary: bool | None,
    ):
        self.session, self.path, self.given, self.names, self.binary = session, path, contract, names, binary
        self.contract = contract

    def look(self) -> Contract:
        """What the model's metadata say; one that was given goes before them."""
        told = self.session.get(self.path).json()
        if self.binary is None:
            server = self.session.get("v2").json()
            extensions = server.get("extensions") if isinstance(server, dict) else None
            self.binary = isinstance(extensions, list) and BINARY in extensions
        own = told.get("parameters") if isinstance(told, dict) else None
        found = own.get("contract") if isinstance(own, dict) else None
        if isinstance(found, dict):
            self.contract = _told(found, self.session.url)
            if self.given is not None and self.given.classes != self.contract.classes:
                what = f"serves classes {list(self.contract.classes)[:8]}, not {list(self.given.classes)[:8]}"
                raise SpoliaError(what, where=f"{self.session.url} {self.path}", mend="look at the model's name")
        if self.contract is None:
            mend = "give contract=Contract(classes, shape, answers=…)"
            raise SpoliaError(
                "does not tell its classes and what it answers", where=f"{self.session.url} {self.path}", mend=mend
            )
        if self.names is None and not isinstance(found, dict):
            self.names = _listed(told, self.contract)
        return self.contract

    def ask(self, batch: np.ndarray) -> dict[str, np.ndarray]:
        """One request."""
        if self.contract is None or self.binary is None:
            self.look()
        assert self.contract is not None
        own = outputs_of(self.contract)
        given, made = self.names or (INPUT, own)
        sent = (
            batch.astype(np.uint8)
            if self.contract.whole and self.contract.low >= 0 and self.contract.high <= 255
            else batch
        )
        wanted = [{"name": name, "parameters": {"binary_data": bool(self.binary)}} for name in made]
        body, length = packed({"outputs": wanted}, "inputs", {given: sent}, binary=bool(self.binary))
        headers = {"Content-Type": "application/json"}
        if self.binary:
            headers = {"Content-Type": "application/octet-stream", LENGTH: str(length)}
        reply: Reply = self.session.post(f"{self.path}/infer", body, headers)
        _, tensors = unpacked(reply.body, reply.headers.get(LENGTH), "outputs")
        return {ours: tensors[theirs] for ours, theirs in zip(own, made, strict=True) if theirs in tensors}


def _told(found: dict[str, Any], url: str) -> Contract:
    try:
        return Contract.of(found)
    except (SpoliaError, TypeError, ValueError, AttributeError) as error:
        raise Misfit(f"{url} promises what cannot be understood: {error}") from None


def _listed(told: Any, contract: Contract) -> tuple[str, Sequence[str]]:
    """Input and outputs as another server's metadata call them: the first ones."""
    inputs, outputs = (
        [e["name"] for e in (told.get(key) or []) if isinstance(e, dict) and isinstance(e.get("name"), str)]
        if isinstance(told, dict) and isinstance(told.get(key) or [], list)
        else []
        for key in ("inputs", "outputs")
    )
    own = outputs_of(contract)
    named = own if set(own) <= set(outputs) else outputs[: len(own)]
    if not inputs or len(named) != len(own):
        what = f"its metadata list inputs {inputs[:4]} and outputs {outputs[:4]}"
        raise SpoliaError(what, where="metadata", mend="give names=(input, outputs)")
    return inputs[0], named
