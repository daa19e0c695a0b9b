"""pydantic's errors in our words, all at once: where (`my.yaml:4 method.lrr`), what, how to mend."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from spolia.errors import Problems, did_you_mean
from spolia.runs.fields import FieldText, describe_field
from spolia.runs.yamlmarks import Path

M = TypeVar("M", bound=BaseModel)
_SIDES = {"greater_than": "small", "greater_than_equal": "small", "less_than": "large", "less_than_equal": "large"}


def validate(model: type[M], raw: Any, at: Path, where: Callable[[Path], str], problems: Problems) -> M | None:
    """`raw` (which stands at path `at` of the document) as `model`; None after adding to `problems` what forbids it."""
    told: set[Path] = {(name,) for name in _truths(model, raw)}
    for path in sorted(told):
        what = f"`{_short(raw[path[0]])}` is not what belongs here"
        problems.add(where((*at, *path)), what, _advice(_field_text(model, path)))
    try:
        found = model.model_validate(raw)
        return None if told else found
    except ValidationError as error:
        for item in error.errors(include_url=False):
            path = _written_path(item["loc"], raw, item["type"]) or _named_path(model, item["msg"])
            if path in told:  # the branches of a union complain one by one about the same value
                continue
            told.add(path)
            problems.add(where((*at, *path)), *_explain(model, path, dict(item)))
    return None


def _truths(model: type[BaseModel], raw: Any) -> list[str]:
    """Fields of numbers that were given true or false (YAML reads `on` and `no` so): pydantic takes them for 1 and 0."""
    found = []
    for name, field in model.model_fields.items() if isinstance(raw, dict) else ():
        value = raw.get(name)
        given = value if isinstance(value, list) else [value]
        if any(isinstance(item, bool) for item in given) and not _takes_truth(field.annotation):
            found.append(name)
    return found


def _takes_truth(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(map(_takes_truth, get_args(annotation)))


def _written_path(loc: tuple[int | str, ...], raw: Any, kind: str) -> Path:
    """The part of pydantic's `loc` that the user wrote: its names of union branches are left out."""
    path: list[int | str] = []
    here = raw
    for part in loc:
        if (isinstance(here, dict) and part in here) or (
            isinstance(here, list | tuple) and isinstance(part, int) and part < len(here)
        ):
            here = here[part]
        elif kind == "missing" and part == loc[-1]:
            here = None
        else:
            continue
        path.append(part)
    return tuple(path)


def _named_path(model: type[BaseModel], message: str) -> Path:
    """A check of the whole model has no place of its own; it begins with the name of the field it is about."""
    first = message.removeprefix("Value error, ").partition(" ")[0].strip("`")
    return (first,) if first in model.model_fields else ()


def _explain(model: type[BaseModel], path: Path, item: dict[str, Any]) -> tuple[str, str]:
    """What is wrong and how to mend it."""
    kind = item["type"]
    owner = _model_at(model, path[:-1])
    known = owner.model_fields if owner else {}
    field = _field_text(model, path)
    if kind == "extra_forbidden":
        return f"there is no `{path[-1]}` here", did_you_mean(str(path[-1]), known)
    if kind == "missing":
        wants = f": {field.help or field.wants}" if field else ""
        return f"`{path[-1]}` is missing", f"add `{path[-1]}`{wants}"
    text = str(item["msg"]).removeprefix("Value error, ").removeprefix("Assertion failed, ")
    if not item["loc"]:
        return text, _advice(field) or "change one of the values"
    value = _short(item["input"])
    if kind in ("literal_error", "enum") and isinstance(item["input"], str):
        words = [word.strip("'\" ") for word in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        return f"`{value}` is not known here", did_you_mean(item["input"], words)
    mend = _advice(field)
    if kind in _SIDES:
        return f"{value} is too {_SIDES[kind]}", mend
    if kind in ("value_error", "assertion_error"):
        return f"`{value}`: {text}", mend
    if kind == "too_short":
        return "the list is empty", "give one item at least"
    return f"`{value}` is not what belongs here", mend or str(item["msg"])


def _advice(field: FieldText | None) -> str:
    if field is None or not field.wants:
        return ""
    usual = f"; default {field.default}" if field.default else ""
    source = f" ({field.source})" if field.default and field.source else ""
    return f"expected: {field.wants}{usual}{source}"


def _short(value: Any) -> str:
    text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _field_text(model: type[BaseModel], path: Path) -> FieldText | None:
    """The field that governs the value at `path`: of a list's item, the list's."""
    names = [part for part in path if isinstance(part, str)]
    owner = _model_at(model, tuple(names[:-1]))
    if not names or owner is None or names[-1] not in owner.model_fields:
        return None
    return describe_field(str(names[-1]), owner.model_fields[names[-1]])


def _model_at(model: type[BaseModel], path: Path) -> type[BaseModel] | None:
    """The model whose fields stand below `path`."""
    here: type[BaseModel] | None = model
    for part in path:
        if isinstance(part, int):
            continue
        field = here.model_fields.get(part) if here else None
        here = _nested(field.annotation) if field else None
    return here


def _nested(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _nested(part))), None)
