"""What may stand under mergekit's `parameters`: which names each method knows, numbers, gradients and filters.

A setting is a number, a list of numbers (a gradient from the first layer to the last), or a list of `{filter, value}`
of which the first whose filter is part of the tensor's name counts. Settings of the whole merge (`t`, `normalize`,
`lambda`, `rescale`) live at the top level only; the others in a model's entry or, for all models, at the top. Which
value wins: mergekit_resolver.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path as PathOnDisk
from typing import Any

from spolia.errors import Problem, Problems, did_you_mean
from spolia.runs.yamlmarks import Marked
from spolia.runs.yamlmarks import Path as Place


@dataclass(frozen=True)
class Spec:
    """How one mergekit method is read: our method, its parameters with mergekit's defaults (None: required).

    `fixed` holds fields in which mergekit's meaning differs from the papers'. `base_model` is "required", "optional" or,
    where it is merged like the others, a "member"; `others` says how few and many models stand beside it.
    """

    method: str
    each: Mapping[str, float | None]
    whole: Mapping[str, float | None]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    base: str = "required"
    others: tuple[int, int | None] = (1, None)


_VOTE = {"zero_sign": "+"}  # a sum that cancels counts as positive
_RANK = {**_VOTE, "scope": "tensor", "count": "floor", "at_threshold": "exact"}


def _sparse(method: str, normalize: float, rescale: float, fixed: Mapping[str, Any], **each: float) -> Spec:
    whole = {"normalize": normalize, "rescale": rescale, "lambda": 1.0}
    return Spec(method, {"weight": None, "density": 1.0, **each}, whole, fixed)


SPECS: dict[str, Spec] = {
    "linear": Spec("average", {"weight": None}, {"normalize": 1.0}, base="member"),
    "slerp": Spec("slerp", {}, {"t": None}, {"dot_threshold": 0.9995}, others=(1, 1)),
    "task_arithmetic": Spec("task_arithmetic", {"weight": None}, {"normalize": 0.0, "lambda": 1.0}),
    "ties": _sparse("ties", 1.0, 0.0, _RANK),
    "dare_ties": _sparse("dare_ties", 0.0, 1.0, _VOTE),
    "dare_linear": _sparse("dare", 0.0, 1.0, _VOTE),
    "breadcrumbs": _sparse("breadcrumbs", 0.0, 0.0, _RANK, gamma=0.01),
    "breadcrumbs_ties": _sparse("breadcrumbs_ties", 0.0, 0.0, _RANK, gamma=0.01),
    "della": _sparse("della", 1.0, 1.0, _VOTE, epsilon=0.15),
    "della_linear": _sparse("della_linear", 0.0, 1.0, _VOTE, epsilon=0.15),
    "nuslerp": Spec(
        "nuslerp", {"weight": None}, {"nuslerp_flatten": 1.0, "nuslerp_row_wise": 0.0}, {}, "optional", (2, 2)
    ),
    "multislerp": Spec(
        "multislerp", {"weight": None}, {"normalize_weights": 1.0, "eps": 1e-8}, {}, "optional", (2, None)
    ),
    "karcher": Spec("karcher", {}, {"max_iter": 10.0, "tol": 1e-5}, base="member"),
    "model_stock": Spec(
        "model_stock", {}, {"filter_wise": 0.0}, {"clamp": False, "least_product": 1e-6}, others=(2, None)
    ),
    "nearswap": Spec("nearswap", {}, {"t": None}, others=(1, 1)),
    "arcee_fusion": Spec("arcee_fusion", {}, {}, others=(1, 1)),
    "sce": Spec("sce", {}, {"select_topk": 1.0}, {"floor": 1e-6}),
    "ram": Spec("ram", {}, {"epsilon": 1e-5}),
    "ramplus_tl": Spec("ramplus", {}, {"r": 0.1, "alpha": 0.2, "epsilon": 1e-5}, {"scope": "tensor"}),
    "passthrough": Spec("passthrough", {"scale": 1.0}, {}, base="member", others=(1, 1)),
}
_FIELDS = {  # fields of ours that go by another name
    "lambda": "scale", "normalize_weights": "normalize", "select_topk": "density", "r": "boost", "alpha": "cap",
}  # fmt: skip
_KINDS: dict[str, Any] = {"normalize": bool, "normalize_weights": bool, "max_iter": int}


def fields_of(whole: Mapping[str, Any]) -> dict[str, Any]:
    """mergekit's parameters of the whole merge as fields of our settings."""
    fields: dict[str, Any] = {}
    for name, value in whole.items():
        if name == "rescale":
            fields[name] = "l1" if value else "none"
        elif name == "filter_wise":
            fields["scope"] = "row" if value else "tensor"
        elif name == "nuslerp_flatten":  # row_wise means along the first dimension there
            fields["scope"] = "tensor" if value else "column" if whole["nuslerp_row_wise"] else "row"
        elif name != "nuslerp_row_wise":
            fields[_FIELDS.get(name, name)] = _KINDS.get(name, float)(value)
    return fields


EACH = ("weight", "density", "gamma", "epsilon", "scale")  # of one model, in any mergekit method
WHOLE = (
    "t", "normalize", "lambda", "rescale", "int8_mask", "filter_wise", "nuslerp_flatten", "nuslerp_row_wise",
    "normalize_weights", "eps", "max_iter", "tol", "select_topk", "r", "alpha",
)  # fmt: skip
LATER = "is not read yet; it comes with a later release"
SHARES = ("density", "gamma", "epsilon", "select_topk")  # from 0 to 1


@dataclass
class Check:
    """Where the reader notes errors and warnings, each with its line."""

    doc: Marked
    strict: bool = True
    problems: Problems = field(default_factory=Problems)
    named: Mapping[str, PathOnDisk] = field(default_factory=dict)  # models that go by a name: earlier documents

    def error(self, at: Place, what: str, mend: str = "") -> None:
        self.problems.add(self.doc.where(at), what, mend)

    def warn(self, at: Place, what: str, mend: str = "") -> None:
        self.problems.warn(self.doc.where(at), what, mend)

    def raise_if_any(self) -> None:
        """All errors, in the order of the file's lines."""
        self.problems.errors.sort(key=self._line)
        self.problems.raise_if_any()

    def _line(self, problem: Problem) -> int:
        number = problem.where.removeprefix(f"{self.doc.name}:").partition(" ")[0]
        return int(number) if number.isdigit() else 0

    def unheard(self, at: Place, what: str, mend: str) -> None:
        """What mergekit would skip in silence: an error, or a warning when not strict."""
        if self.strict:
            self.error(at, what, mend)
        else:
            self.warn(at, f"{what}; ignored", mend)

    def keys(self, mapping: dict[str, Any], at: Place, known: tuple[str, ...], tolerated: tuple[str, ...] = ()) -> None:
        """Every key of `mapping` that is not `known`."""
        for key in mapping:
            if key in known or key in tolerated:
                continue
            near = did_you_mean(key, known)
            mend = near if near.startswith("did") else did_you_mean(key, (*known, *tolerated))
            if key in (*EACH, *WHOLE) and "parameters" in known:
                mend = f"write it under `parameters:`, as `parameters: {{{key}: …}}`"
            self.unheard((*at, key), f"unknown key `{key}`", mend)


@dataclass(frozen=True)
class Entry:
    """One value of a setting: a number (one value) or a gradient, for the tensors whose name contains `filter`."""

    filter: str | None
    values: tuple[float, ...]
    at: Place

    def matches(self, tensor: str) -> bool:
        return self.filter is None or self.filter in tensor

    def value(self, t: float) -> float:
        x = t * (len(self.values) - 1)
        low = math.floor(x)
        high = min(len(self.values) - 1, low + 1)
        return (1 - (x - low)) * self.values[low] + (x - low) * self.values[high]


Setting = tuple[Entry, ...]


@dataclass(frozen=True)
class Given:
    """The `parameters` of one model or of the top level. `clean` is False when something in them was refused."""

    settings: Mapping[str, Setting] = field(default_factory=dict)
    clean: bool = True


def read_parameters(value: Any, at: Place, check: Check, method: str | None, *, model: bool) -> Given:
    """The mapping under `parameters`, of one model (`model=True`) or of the whole merge. `method` None: not known."""
    if value is None:
        return Given()
    if not isinstance(value, dict):
        check.error(at, "`parameters` must be a mapping", "write `parameters: {weight: 0.5}`")
        return Given(clean=False)
    spec = SPECS.get(method or "")
    ours = (*spec.each, *spec.whole) if spec else (*EACH, *WHOLE)
    before, settings = len(check.problems.errors), {}
    for name, raw in value.items():
        here = (*at, name)
        if name not in EACH and name not in WHOLE:
            near = did_you_mean(name, (*EACH, *WHOLE))
            check.unheard(
                here, f"no parameter is called `{name}`", near if near.startswith("did") else did_you_mean(name, ours)
            )
        elif model and name in (spec.whole if spec and name in ours else WHOLE):
            check.unheard(
                here, f"`{name}` belongs to the whole merge, not to one model", "move it to the top-level `parameters:`"
            )
        elif spec and name not in ours:
            check.warn(here, f"`{name}` changes nothing in `{method}`", "remove it")
        else:
            setting = read_setting(raw, here, check)
            if setting:
                settings[name] = _in_range(name, setting, check)
    return Given(settings, len(check.problems.errors) == before)


def read_setting(value: Any, at: Place, check: Check) -> Setting | None:
    """A number, a gradient or a list of `{filter, value}`; None (and a note) when it is none of these."""
    if isinstance(value, dict):
        check.warn(at, "one `{filter, value}` stands alone; read as a list of one", "put `- ` before it")
        entry = _entry(value, at, check)
        return (entry,) if entry else None
    if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
        entries = [_entry(item, (*at, i), check) for i, item in enumerate(value)]
        for entry in entries[:-1]:
            if entry and entry.filter is None:
                check.warn(entry.at, "matches every tensor, so the entries below it never count", "put it last")
                break
        return tuple(entry for entry in entries if entry) or None
    values = _values(value, at, check)
    return (Entry(None, values, at),) if values else None


def _entry(item: dict[str, Any], at: Place, check: Check) -> Entry | None:
    for key in item:
        if key not in ("filter", "value"):
            check.unheard((*at, key), f"unknown key `{key}`", did_you_mean(key, ("filter", "value")))
    pattern = item.get("filter")
    if pattern is not None and (not isinstance(pattern, str) or not pattern):
        check.error((*at, "filter"), f"`filter: {pattern!r}` is not text", "put part of a tensor's name in quotes")
        return None
    if "value" not in item:
        check.error(
            at, "this entry has no `value`", "write `value: 0.5` (a number, or a list from first to last layer)"
        )
        return None
    values = _values(item["value"], (*at, "value"), check)
    return Entry(None if pattern == "*" else pattern, values, at) if values else None


def _values(value: Any, at: Place, check: Check) -> tuple[float, ...] | None:
    if not isinstance(value, list):
        number = _number(value, at, check)
        return None if number is None else (number,)
    if not value:
        check.error(at, "the gradient is empty", "give a number, or one number or more from first to last layer")
        return None
    numbers = [_number(item, (*at, i), check) for i, item in enumerate(value)]
    return None if None in numbers else tuple(n for n in numbers if n is not None)


def _number(value: Any, at: Place, check: Check) -> float | None:
    if isinstance(value, bool | int | float | str):
        try:
            number = float(value)
            if math.isfinite(number):
                return number
        except (ValueError, OverflowError):
            pass
        said = f"`{value}`" + (" (text)" if isinstance(value, str) else "")
    else:
        said = {dict: "a mapping", list: "a list"}.get(type(value), "nothing")
    mend = (
        "true and false stand without quotes"
        if str(value).lower() in ("true", "false")
        else "write a number such as 0.5"
    )
    check.error(at, f"expected a number, found {said}", mend)
    return None


def _in_range(name: str, setting: Setting, check: Check) -> Setting:
    """Shares stand in [0, 1]. mergekit reads a density above 1 as 1, and so do we, with a warning."""
    if name not in SHARES:
        return setting
    fixed = []
    for entry in setting:
        low, high = min(entry.values), max(entry.values)
        if low < 0 or (high > 1 and name not in ("density", "select_topk")):
            check.error(
                entry.at, f"`{name}` is a share, found {low if low < 0 else high:g}", "give a number from 0 to 1"
            )
        elif high > 1:
            check.warn(entry.at, f"{name} {high:g} keeps everything, as 1 does", "a share is meant: 0.2 keeps 20 %")
        fixed.append(Entry(entry.filter, tuple(min(1.0, max(0.0, v)) for v in entry.values), entry.at))
    return tuple(fixed)
