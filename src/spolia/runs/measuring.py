"""The caller's own evaluation of a merged folder, and its numbers in the folder's card: `spolia.merge(..., evaluate=...)`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spolia.errors import SpoliaError
from spolia.runs.store import write_json, write_whole

FILE = "results.json"


def check(evaluate: Any, out: Any, share: bool) -> None:
    """SpoliaError where the numbers could not be kept, before anything is merged."""
    if not callable(evaluate):
        raise SpoliaError(f"a {type(evaluate).__name__} cannot be called", where="evaluate", mend="give a function")
    if out is None:
        mend = "give `out`, or call it on the state dict that is returned"
        raise SpoliaError("its numbers stand in the merged folder, and there is none", where="evaluate", mend=mend)
    if share:
        mend = "merge first, and evaluate in one process"
        raise SpoliaError("every process that shares the merge would evaluate it", where="evaluate", mend=mend)


@dataclass(frozen=True)
class Measured:
    """What a run has measured already, in the place of numbers: its ledger, and what that calls the merge."""

    ledger: dict[str, Any]
    method: str


def measure(folder: Path, evaluate: Any, facts: Mapping[str, Any], render: Callable[[dict[str, Any]], str]) -> None:
    """Calls `evaluate(folder)`; its numbers go to results.json and, by `render` of the card's `facts`, to README.md."""
    found = evaluate(folder)
    if isinstance(found, Measured):
        told = {**facts, "method": found.method, "results": found.ledger, "data": found.ledger["data"]}
    else:
        told = {**facts, **_of_numbers(_checked(found, folder), evaluate, facts)}
    write_json(folder / FILE, told["results"])
    told["limits"] = [
        "Measured on what is listed above only: a merge can be worse elsewhere than every model that went into it."
    ]
    write_whole(folder / "README.md", render(told))


def _of_numbers(found: Mapping[str, float], evaluate: Any, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The card's facts that follow from what the caller's function said of each task."""
    name = getattr(evaluate, "__qualname__", type(evaluate).__qualname__)
    one = {"method": facts["method"], "metric": "score", "unit": "", "low": None, "high": None, "n": 1}
    rows = [one | {"task": task, "mean": value} for task, value in found.items()]
    notes = f"Measured once by the caller's function `{name}`, which also says what a score is."
    results = {"name": facts["name"], "rows": rows, "notes": notes}
    return {"results": results, "data": {**facts["data"], "evaluation": f"whatever `{name}` reads"}}


def _checked(found: Any, folder: Path) -> dict[str, float]:
    if not isinstance(found, Mapping) or not found:
        what = f"returned a {type(found).__name__}" + (" that is empty" if found is not None and not found else "")
        raise SpoliaError(what, where="evaluate", mend=f"return {{task: number}}; the merged model stands in {folder}")
    for task, value in found.items():
        number = value.item() if hasattr(value, "item") else value
        if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
            mend = f"return {{task: number}}; the merged model stands in {folder}"
            raise SpoliaError(f"`{task}` is {value!r}, no finite number", where="evaluate", mend=mend)
    return {str(task): float(value) for task, value in found.items()}
