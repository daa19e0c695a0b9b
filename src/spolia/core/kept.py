"""State of a loop on disk without pickle: one safetensors file, everything but tensors as JSON in its header.

`save` and `load` move nested Python values; `capture` and `restore` move live objects (modules, optimizers, random
generators, tensors, plain dicts and lists) to such values and back.
"""

from __future__ import annotations

import json
import math
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core import tensorfile
from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

_FORMAT = "spolia kept 1"


class Damaged(Exception):
    """The file is no sound checkpoint: half-written, altered, or of another kind."""


# --- values <-> JSON and tensors -------------------------------------------------------------------------------------


def encode(value: Any, tensors: dict[str, Tensor], where: str = "keep") -> Any:
    """`value` as strict JSON; tensors and arrays move to `tensors` and leave their key behind.

    Everything that JSON would change (int keys, tuples, inf, nan) becomes a one-key mapping. Raises SpoliaError naming
    the place of a value that is neither plain nor a tensor.
    """
    if value is None or type(value) in (bool, int, str):
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}  # JSON writes finite doubles exactly
    if type(value) is list:
        return [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]
    if type(value) is tuple:
        return {"tuple": [encode(item, tensors, f"{where}[{i}]") for i, item in enumerate(value)]}
    if isinstance(value, dict):  # an OrderedDict, as modules give, comes back as a dict in the same order
        pairs = [[encode(k, tensors, where), encode(v, tensors, f"{where}[{k!r}]")] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, np.ndarray | np.generic):
        if value.dtype.kind in "biuf":
            name = "array" if isinstance(value, np.ndarray) else "scalar"
            return {name: _put(torch.from_numpy(np.array(value, order="C")), tensors)}
    elif isinstance(value, torch.Tensor):
        return {"tensor": _put(value, tensors)}
    raise SpoliaError(
        f"a {type(value).__name__} cannot be kept without pickle",
        where=where,
        mend="keep numbers, text, tensors, lists and dicts, or an object with state_dict() and load_state_dict()",
    )


def _put(tensor: Tensor, tensors: dict[str, Tensor]) -> str:
    key = str(len(tensors))
    tensors[key] = tensor.detach().to("cpu", copy=True).contiguous()  # a copy: safetensors refuses shared memory
    return key


def decode(skeleton: Any, tensors: dict[str, Tensor]) -> Any:
    """The value that `encode` was given."""
    if isinstance(skeleton, list):
        return [decode(item, tensors) for item in skeleton]
    if not isinstance(skeleton, dict):
        return skeleton
    ((kind, inner),) = skeleton.items()
    if kind == "float":
        return float(inner)
    if kind == "tuple":
        return tuple(decode(item, tensors) for item in inner)
    if kind == "dict":
        return {decode(k, tensors): decode(v, tensors) for k, v in inner}
    if kind == "tensor":
        return tensors[inner]
    if kind in ("array", "scalar"):
        array = tensors[inner].numpy()
        return array if kind == "array" else array[()]
    raise Damaged(f"unknown entry {kind!r}")


# --- files -----------------------------------------------------------------------------------------------------------


def save(file: Path, value: Any) -> None:
    """Write `value` to `file`, whole or not at all: a temporary neighbour, flushed to the disk, then renamed."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(encode(value, tensors), allow_nan=False, separators=(",", ":"))
    metadata = {"format": _FORMAT, "skeleton": text, "checksum": _checksum(text, tensors)}
    tensorfile.write(file, tensors, metadata)


def load(file: Path) -> Any:
    """The value in `file`. Raises Damaged unless every byte is as it was written."""
    try:
        metadata, tensors = tensorfile.read(file, "")
        if metadata.get("format") != _FORMAT or metadata["checksum"] != _checksum(metadata["skeleton"], tensors):
            raise Damaged("checksum differs")
        return decode(json.loads(metadata["skeleton"]), tensors)
    except (SpoliaError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise Damaged(str(error)) from error


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    total = zlib.crc32(text.encode())
    for key in sorted(tensors, key=int):
        flat = tensors[key].reshape(-1)
        if flat.numel():
            total = zlib.crc32(flat.view(torch.uint8).numpy(), total)
    return f"{total:08x}"


# --- live objects ----------------------------------------------------------------------------------------------------


def kind(name: str, value: Any) -> str:
    """How `value` is kept. Raises SpoliaError for what cannot be restored in place."""
    if isinstance(value, np.random.Generator):
        return "numpy generator"
    if isinstance(value, np.ndarray):
        return "array"
    if isinstance(value, dict | list):
        return type(value).__name__
    if callable(getattr(value, "state_dict", None)) and callable(getattr(value, "load_state_dict", None)):
        return "object"
    if isinstance(value, torch.Generator):
        return "torch generator"
    if isinstance(value, torch.Tensor):
        return "tensor"
    raise SpoliaError(
        f"a {type(value).__name__} cannot be restored in place",
        where=f"keep[{name!r}]",
        mend="keep a module, optimizer, generator, tensor, dict or list; put a bare number into a dict",
    )


def capture(name: str, value: Any) -> Any:
    """What of `value` has to be saved."""
    match kind(name, value):
        case "numpy generator":
            return value.bit_generator.state
        case "torch generator":
            return value.get_state()
        case "object":
            return value.state_dict()
    return value


def restore(name: str, value: Any, state: Any) -> None:
    """Put a captured state back into the live `value`, in place."""
    match kind(name, value):
        case "numpy generator":
            value.bit_generator.state = state
        case "torch generator":
            value.set_state(state)
        case "object":
            value.load_state_dict(state)
        case "dict":
            value.clear()
            value.update(state)
        case "list":
            value[:] = state
        case "tensor" | "array":
            if value.shape != state.shape or value.dtype != state.dtype:
                kept, now = (f"{tuple(x.shape)} {x.dtype}" for x in (state, value))
                raise ValueError(f"kept as {kept}, now {now}")
            if isinstance(value, np.ndarray):
                value[...] = state
            else:
                with torch.no_grad():
                    value.copy_(state)
