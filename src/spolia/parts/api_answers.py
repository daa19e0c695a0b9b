"""What an API promises, what it answers, and the check of the one against the other.

An answer of one input is a row of fp32 numbers, whatever it was sent as; rows are what is kept and compared:

| answers | sent | row |
|---|---|---|
| logits, probabilities | [n, classes] | the same |
| top | values [n, k] (probabilities) and classes [n, k] | k values, then k classes |
| label | classes [n], by number or by name | one number |

Out of rows come `Answers`: for every kind log-probabilities of all classes, as well as they are known.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from spolia.core.lazy import np, torch
from spolia.errors import Problems

if TYPE_CHECKING:
    from torch import Tensor

Answering = Literal["logits", "probabilities", "top", "label"]
KINDS = ("logits", "probabilities", "top", "label")
FLOOR = 1e-7  # least probability that is believed: an fp32 answer below it is rounding
SMOOTH = 0.01  # of a hard label's probability, shared by the other classes
_LOOSE = 1e-2  # of the sum of a row of probabilities, besides rounding


class Misfit(Exception):
    """An answer that is not what the contract says. Its text says how."""


class Answers(NamedTuple):
    """Of n inputs: the likeliest class [n], and log-probabilities [n, classes] in fp64. `hard`: labels were all it said."""

    labels: Tensor
    log_p: Tensor
    hard: bool = False


@dataclass(frozen=True)
class Contract:
    """What an API takes and what it answers.

    `classes`: names, in the order of its outputs. `shape`: of one input, numbers from `low` to `high`, whole ones if `whole`.
    `top`: how many classes an answer of kind top names. `resolution`: step that answers are rounded to, 0 where they are not.
    `most`: inputs in one request.
    """

    classes: tuple[str, ...]
    shape: tuple[int, ...]
    answers: Answering = "probabilities"
    low: float = 0.0
    high: float = 1.0
    top: int = 1
    resolution: float = 0.0
    most: int = 256
    whole: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", tuple(map(str, self.classes)))
        object.__setattr__(self, "shape", tuple(self.shape))
        problems = Problems()
        if len(set(self.classes)) < max(2, len(self.classes)):
            problems.add("classes", f"{list(self.classes)[:8]}", "give two names or more, all different")
        if not self.shape or min(self.shape) < 1:
            problems.add("shape", f"{list(self.shape)}", "give the sizes of one input, as [3, 32, 32]")
        if self.answers not in KINDS:
            problems.add("answers", f"`{self.answers}`", f"one of {', '.join(KINDS)}")
        if not (math.isfinite(self.low) and math.isfinite(self.high) and self.low < self.high):
            problems.add("low, high", f"{self.low}, {self.high}", "give a range of numbers")
        if not 1 <= self.top <= len(self.classes) or self.most < 1 or not 0 <= self.resolution < 1:
            what = f"{self.top}, {self.most}, {self.resolution}"
            problems.add("top, most, resolution", what, "top up to the classes, most from 1 on, a resolution below 1")
        problems.raise_if_any()

    @property
    def size(self) -> int:
        """Numbers of one input."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Numbers of a row."""
        return {"label": 1, "top": 2 * self.top}.get(self.answers, len(self.classes))

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON has them."""
        return asdict(self) | {"classes": list(self.classes), "shape": list(self.shape)}

    @classmethod
    def of(cls, given: Mapping[str, Any]) -> Contract:
        """From what `to_dict` gives; unknown names are left aside."""
        known = {name: given[name] for name in cls.__dataclass_fields__ if name in given}
        return cls(**known)


def rows_of(raw: Mapping[str, np.ndarray], contract: Contract, count: int) -> np.ndarray:
    """Rows [count, width] fp32 of what was sent, by name. Misfit where it is not what the contract says."""
    if contract.answers == "top":
        values, classes = (_named(raw, name, contract) for name in ("values", "classes"))
        _shaped(values, (count, contract.top), "values")
        _shaped(classes, (count, contract.top), "classes")
        rows = np.concatenate([_numbers(values), _numbered(classes, contract)], 1)
        _probable(rows[:, : contract.top], contract, whole=contract.top == len(contract.classes))
    elif contract.answers == "label":
        labels = _named(raw, "label", contract)
        if labels.shape not in ((count,), (count, 1)):
            raise Misfit(f"labels {list(labels.shape)} for {count} inputs")
        rows = _numbered(labels.reshape(count, 1), contract)
    else:
        rows = _named(raw, contract.answers, contract)
        _shaped(rows, (count, len(contract.classes)), contract.answers)
        rows = _numbers(rows)
        if contract.answers == "probabilities":
            _probable(rows, contract, whole=True)
    return np.ascontiguousarray(rows, dtype=np.float32)


def answers_of(rows: np.ndarray, contract: Contract) -> Answers:
    """What rows [n, width] say."""
    given, count = torch.from_numpy(rows.astype(np.float64)), len(contract.classes)
    floor = max(FLOOR, contract.resolution / 2)
    match contract.answers:
        case "logits":
            log_p = given.log_softmax(1)
        case "probabilities":
            log_p = given.clamp(min=floor).log().log_softmax(1)
        case "top":
            values, places = given[:, : contract.top], given[:, contract.top :].long()
            rest = (1 - values.sum(1, keepdim=True)).clamp(min=0) / max(1, count - contract.top)
            dense = rest.expand(-1, count).scatter(1, places, values)
            log_p = dense.clamp(min=floor).log().log_softmax(1)
        case _:
            other = torch.full((len(rows), count), SMOOTH / (count - 1), dtype=torch.float64)
            log_p = other.scatter(1, given.long(), 1 - SMOOTH).log()
    return Answers(log_p.argmax(1), log_p, contract.answers == "label")


def _named(raw: Mapping[str, np.ndarray], name: str, contract: Contract) -> np.ndarray:
    if name not in raw:
        raise Misfit(f"no `{name}` in it, only {', '.join(raw) or 'nothing'}; {contract.answers} were promised")
    return np.asarray(raw[name])


def _shaped(array: np.ndarray, shape: tuple[int, int], name: str) -> None:
    if array.shape != shape:
        raise Misfit(f"{name} {list(array.shape)} where {list(shape)} were promised: inputs by classes")


def _numbers(array: np.ndarray) -> np.ndarray:
    if array.dtype.kind not in "fiu":
        raise Misfit(f"{array.dtype} in the place of numbers")
    if not np.isfinite(array).all():
        raise Misfit("NaN or infinite numbers")
    return array.astype(np.float32)


def _numbered(labels: np.ndarray, contract: Contract) -> np.ndarray:
    """Numbers of classes, which may come by name."""
    if labels.dtype.kind in "OUS":
        numbers = {name: place for place, name in enumerate(contract.classes)}
        named = [item.decode(errors="replace") if isinstance(item, bytes) else str(item) for item in labels.ravel()]
        strange = sorted({name for name in named if name not in numbers})
        if strange:
            raise Misfit(f"classes {strange[:3]} are not among those promised: {list(contract.classes)[:8]}")
        return np.array([numbers[name] for name in named], np.float32).reshape(labels.shape)
    found = _numbers(labels)
    if ((found < 0) | (found >= len(contract.classes)) | (found != np.floor(found))).any():
        raise Misfit(f"labels {np.unique(found)[:5].tolist()} for {len(contract.classes)} classes, counted from 0")
    return found


def _probable(values: np.ndarray, contract: Contract, *, whole: bool) -> None:
    slack = _LOOSE + contract.resolution * len(contract.classes) / 2
    sums = values.sum(1)
    if (values < -slack).any() or (sums > 1 + slack).any() or (whole and (sums < 1 - slack).any()):
        row = values[int(np.argmax(np.abs(sums - 1)))]
        raise Misfit(f"{[round(float(p), 4) for p in row[:6]]} are no probabilities; if they are logits, say so")
