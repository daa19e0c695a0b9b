"""A loss inside another's settings: `base: dkd`, or `base: {name: dkd, beta: 2}`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BeforeValidator, PlainSerializer, ValidationError, WithJsonSchema

from spolia.core.settings import Settings
from spolia.errors import did_you_mean


def one_of(kinds: Mapping[str, type[Settings]]) -> Any:
    """The type of a field that holds the settings of one of `kinds`; written as a mapping with `name`."""
    names = {kind: name for name, kind in kinds.items()}

    def read(value: Any) -> Any:
        if type(value) in names:
            return value
        fields = {"name": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
        name = fields.pop("name", None)
        if name not in kinds:
            raise ValueError(f"{name!r} is none of its losses; {did_you_mean(str(name), kinds)}")
        try:
            return kinds[name](**fields)
        except ValidationError as error:
            told = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            raise ValueError("; ".join(told)) from None

    def write(value: Settings) -> dict[str, Any]:
        return {"name": names[type(value)], **value.model_dump(mode="json")}

    shape = {"anyOf": [{"enum": list(kinds)}, {"type": "object", "properties": {"name": {"enum": list(kinds)}}}]}
    return Annotated[Settings, BeforeValidator(read), PlainSerializer(write), WithJsonSchema(shape)]
