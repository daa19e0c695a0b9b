"""APIs that speak JSON of their own: a template for requests and paths into answers.

    mapping = Mapping({"instances": "$inputs"}, {"probabilities": "predictions.*.scores"})
    endpoint = JsonEndpoint(Session("https://example.org/v1"), "classify", mapping, contract)

In the template the text `$inputs` stands for the list of inputs, `$input` for a single one (one input a request then). A path
goes down by names and numbers; `*` goes through a list. It leads to the list of all answers, or with `$input` to the one
answer, which may be

    [0.1, 0.9]      {"cat": 0.1, "dog": 0.9}      [{"label": "dog", "score": 0.9}, {"label": "cat", "score": 0.1}]

where the last needs `pair=("label", "score")`; classes are put in the contract's order, and one that is missing has 0. A single
value is a label: a number or a name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping as AnyMapping
from dataclasses import dataclass, replace
from typing import Any

from spolia.core.lazy import np
from spolia.errors import Problems
from spolia.parts.api_answers import Contract, Misfit
from spolia.parts.api_client import Endpoint
from spolia.parts.api_http import Session, check_installed, said

MANY, ONE = "$inputs", "$input"


@dataclass(frozen=True)
class Mapping:
    """`request`: any JSON with `$inputs` or `$input` in it. `answers`: a path for each thing that the contract asks for:

    logits, probabilities, label, or values and classes of kind top. `flat`: inputs as one list of numbers each.
    """

    request: Any
    answers: AnyMapping[str, str]
    pair: tuple[str, str] | None = None
    flat: bool = False


class JsonEndpoint(Endpoint):
    """POST to `path` below the session's address."""

    def __init__(self, session: Session, path: str, mapping: Mapping, contract: Contract):
        check_installed()
        single = _check(mapping, contract)
        own = replace(contract, most=1) if single else contract

        def ask(batch: np.ndarray) -> dict[str, np.ndarray]:
            given = (batch.reshape(len(batch), -1) if mapping.flat else batch).tolist()
            body = _filled(mapping.request, given, given[0])
            text = json.dumps(body, separators=(",", ":"), allow_nan=False).encode()
            answer = session.post(path, text, {"Content-Type": "application/json"}).json()
            return {
                name: _array(found(answer, at), own, mapping, len(batch), single)
                for name, at in mapping.answers.items()
            }

        super().__init__(f"{session.url} {path}", ask, lambda: own, session.close)


def found(value: Any, path: str) -> Any:
    """What lies at `path`. Misfit where it leads nowhere."""
    return _down(value, [part for part in path.split(".") if part], path)


def _down(value: Any, parts: list[str], path: str) -> Any:
    for place, part in enumerate(parts):
        if part == "*":
            if not isinstance(value, list):
                raise Misfit(f"no list at `*` of `{path}`: {said(json.dumps(value))}")
            return [_down(one, parts[place + 1 :], path) for one in value]
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.lstrip("-").isdigit() and -len(value) <= int(part) < len(value):
            value = value[int(part)]
        else:
            raise Misfit(f"nothing at `{part}` of `{path}`: {said(json.dumps(value))}")
    return value


def _array(value: Any, contract: Contract, mapping: Mapping, count: int, single: bool) -> np.ndarray:
    """What was found, an entry for each of `count` inputs: numbers [n, classes], or labels [n]."""
    entries = [value] if single else value
    if not isinstance(entries, list) or len(entries) != count:
        raise Misfit(f"no list of {count} answers: {said(json.dumps(value))}")
    rows = [_row(entry, contract, mapping) for entry in entries]
    if any(isinstance(item, str) for row in rows for item in (row if isinstance(row, list) else [row])):
        return np.array(rows, dtype=object)
    try:
        return np.array(rows, dtype=np.float64)
    except (ValueError, TypeError):
        raise Misfit(f"no table of numbers: {said(json.dumps(value))}") from None


def _row(entry: Any, contract: Contract, mapping: Mapping) -> Any:
    """One input's answer; scores by name in the order of the classes."""
    if mapping.pair is not None and isinstance(entry, list):
        label, score = mapping.pair
        if not all(isinstance(one, dict) and label in one and score in one for one in entry):
            raise Misfit(f"no list of `{label}` and `{score}`: {said(json.dumps(entry))}")
        entry = {str(one[label]): one[score] for one in entry}
    if isinstance(entry, dict):
        strange = sorted(set(entry) - set(contract.classes))
        if strange:
            raise Misfit(f"classes {strange[:3]} are not among those promised: {list(contract.classes)[:8]}")
        return [entry.get(name, 0.0) for name in contract.classes]
    return entry


def _filled(template: Any, inputs: list[Any], first: Any) -> Any:
    if template == MANY:
        return inputs
    if template == ONE:
        return first
    if isinstance(template, dict):
        return {name: _filled(part, inputs, first) for name, part in template.items()}
    return [_filled(part, inputs, first) for part in template] if isinstance(template, list) else template


def _check(mapping: Mapping, contract: Contract) -> bool:
    """Whether requests hold one input each. SpoliaError with all that is wrong."""
    text, problems = json.dumps(mapping.request), Problems()
    many, one = f'"{MANY}"' in text, f'"{ONE}"' in text
    if many == one:
        problems.add(
            "mapping.request", f"holds {'both' if many else 'neither'}", f"put {MANY} or {ONE} where inputs go"
        )
    wanted = {"top": {"values", "classes"}}.get(contract.answers, {contract.answers})
    if set(mapping.answers) != wanted:
        listed = ", ".join(sorted(wanted))
        problems.add(
            "mapping.answers", f"paths for {', '.join(mapping.answers) or 'nothing'}", f"give one for {listed}"
        )
    problems.raise_if_any()
    return one
