"""What a server of experts reads and writes: bodies within bounds, batches within the contract, answers, metadata."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np
from spolia.parts.api_answers import Contract
from spolia.parts.api_v2 import INPUT, outputs_of

if TYPE_CHECKING:
    from starlette.requests import Request
    from torch import Tensor

_BODY_SECONDS = 30.0  # a request that takes longer to arrive is let go
_HEAD = 1_000_000  # bytes of a message besides its numbers
_NUMBER = 32  # bytes of a number, as JSON at its longest


@dataclass(frozen=True)
class Served:
    """An expert and how it is asked: `logits(batch [n, ...] fp32 in the contract's range)` -> [n, classes]."""

    name: str
    logits: Callable[[Tensor], Tensor]
    contract: Contract


class Refusal(Exception):
    """A request that is not answered."""

    def __init__(self, status: int, code: str, what: str, **headers: str):
        super().__init__(what)
        self.status, self.code, self.headers = status, code, headers


def answering(logits: Tensor, contract: Contract) -> dict[str, np.ndarray]:
    """What an expert that may say as much as its contract has says: arrays by name."""
    if contract.answers == "label":
        return {"label": logits.argmax(1).cpu().numpy()}
    if contract.answers == "logits":
        return {"logits": _rounded(logits, contract)}
    p = logits.double().softmax(1)
    if contract.answers == "probabilities":
        return {"probabilities": _rounded(p, contract)}
    values, classes = p.topk(contract.top)
    return {"values": _rounded(values, contract), "classes": classes.cpu().numpy()}


def metadata_of(expert: Served) -> dict[str, Any]:
    contract = expert.contract
    kinds = {"label": "INT64", "classes": "INT64"}
    widths = {"label": [], "values": [contract.top], "classes": [contract.top]}
    outputs = [
        {"name": name, "datatype": kinds.get(name, "FP32"), "shape": [-1, *widths.get(name, [len(contract.classes)])]}
        for name in outputs_of(contract)
    ]
    inputs = [{"name": INPUT, "datatype": "FP32", "shape": [-1, *contract.shape]}]
    told = {"name": expert.name, "versions": ["1"], "platform": "spolia", "inputs": inputs, "outputs": outputs}
    return told | {"parameters": {"contract": contract.to_dict()}}


def batch_of(tensors: Mapping[str, np.ndarray], contract: Contract) -> np.ndarray:
    """The inputs [n, ...] fp32. Refusal where they are not what the contract takes."""
    if list(tensors) != [INPUT]:
        raise Refusal(400, "inputs", f"inputs {list(tensors)[:4]}; one is taken, `{INPUT}`")
    batch = tensors[INPUT]
    if batch.dtype.kind not in "fiu" or batch.ndim < 1 or batch.shape[1:] != contract.shape:
        what = f"{batch.dtype} {list(batch.shape)}; taken are numbers {['n', *contract.shape]}"
        raise Refusal(400, "inputs", what)
    if not 1 <= len(batch) <= contract.most:
        status = 413 if len(batch) else 400
        raise Refusal(status, "batch", f"{len(batch)} inputs; a request holds from 1 to {contract.most}")
    batch = np.array(batch, np.float32)
    if not np.isfinite(batch).all():
        raise Refusal(400, "inputs", "NaN or infinite numbers")
    return batch


def wants_binary(asked: Mapping[str, Any]) -> bool:
    """Whether the answer is wanted in binary: for all outputs, or for the first."""
    told, outputs = asked.get("parameters"), asked.get("outputs")
    if isinstance(outputs, list) and outputs and isinstance(outputs[0], dict):
        own = outputs[0].get("parameters")
        if isinstance(own, dict) and "binary_data" in own:
            return own["binary_data"] is True
    return isinstance(told, dict) and told.get("binary_data_output") is True


async def body_of(request: Request, contract: Contract) -> bytes:
    """The request's body, in time and of bearable size."""
    from starlette.requests import ClientDisconnect

    most = _HEAD + _NUMBER * contract.most * contract.size
    too_large = Refusal(413, "body", f"more than {most:,} bytes", connection="close")
    told = request.headers.get("content-length", "0")
    if not told.isascii() or not told.isdigit() or int(told) > most:
        raise too_large
    found, size = [], 0
    try:
        async with asyncio.timeout(_BODY_SECONDS):
            async for part in request.stream():
                size += len(part)
                if size > most:
                    raise too_large
                found.append(part)
    except TimeoutError:
        what = f"the request took longer than {_BODY_SECONDS:g} s to arrive"
        raise Refusal(408, "slow", what, connection="close") from None
    except ClientDisconnect:
        raise Refusal(400, "cut", "the request was cut short") from None
    return b"".join(found)


def _rounded(x: Tensor, contract: Contract) -> np.ndarray:
    step = contract.resolution
    return (x if not step else (x.double() / step).round() * step).float().cpu().numpy()
