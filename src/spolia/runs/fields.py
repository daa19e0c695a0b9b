"""What a settings field says about itself, in words: one home for `show`, `new` and the error messages."""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from spolia.core.settings import PerModel

_KINDS = {float: "number", int: "whole number", bool: "true or false", str: "text", type(None): "null"}
_LIMITS = (("gt", "above {}"), ("ge", "at least {}"), ("lt", "below {}"), ("le", "at most {}"))


@dataclass(frozen=True)
class FieldText:
    """One field: every part is text, empty where there is nothing to say."""

    name: str
    default: str
    kind: str
    limits: str
    unit: str
    source: str
    help: str

    @property
    def wants(self) -> str:
        """What may be written here: kind, range and unit."""
        return ", ".join(part for part in (self.kind, self.limits, self.unit) if part)


def describe(model: type[BaseModel]) -> list[FieldText]:
    """Every field of `model`, in the order of the class."""
    return [describe_field(name, field) for name, field in model.model_fields.items()]


def describe_field(name: str, field: FieldInfo) -> FieldText:
    extra = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    return FieldText(
        name=name,
        default="" if field.is_required() else yaml_value(field.get_default(call_default_factory=True)),
        kind=str(extra.get("kind", "")) or kind(field.annotation),
        limits=_limits(field),
        unit=str(extra.get("unit", "")),
        source=str(extra.get("source", "")),
        help=field.description or "",
    )


def kind(annotation: Any) -> str:
    """`float | None` as `number or null`."""
    if annotation == PerModel:
        return "number, or list with one per expert"
    if annotation in _KINDS:
        return _KINDS[annotation]
    parts = get_args(annotation)
    origin = get_origin(annotation)
    if origin is Literal:
        return "one of " + ", ".join(yaml_value(part) for part in parts)
    if origin in (Union, types.UnionType):
        return " or ".join(kind(part) for part in parts)
    if origin is dict:
        return "mapping of " + " to ".join(kind(part) for part in parts)
    if origin in (tuple, list):
        return "list of " + " and ".join(dict.fromkeys(f"{kind(part)}s" for part in parts if part is not Ellipsis))
    return getattr(annotation, "__name__", "").lower()


def yaml_value(value: Any) -> str:
    """`value` as one would write it in a recipe."""
    if value is None or value is PydanticUndefined:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple | list):
        return f"[{', '.join(yaml_value(item) for item in value)}]"
    return str(value)


def _limits(field: FieldInfo) -> str:
    found = {key: getattr(item, key) for item in field.metadata for key, _ in _LIMITS if hasattr(item, key)}
    if set(found) == {"ge", "le"}:
        return f"{found['ge']:g} to {found['le']:g}"
    return ", ".join(text.format(f"{found[key]:g}") for key, text in _LIMITS if key in found)
