"""Settings of a method: a frozen pydantic model whose every field says its unit and where its default comes from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

PerModel = float | tuple[float, ...]
"""One number for all experts, or one for each in the pool's order."""


_LARGEST = 1e30  # of a factor: products and sums of a few stay within fp32


class Settings(BaseModel):
    """Base of all settings: frozen, unknown fields refused."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="after")
    def _numbers_fit(self) -> Self:
        for name in type(self).model_fields:
            value = getattr(self, name)
            for number in value if isinstance(value, tuple) else (value,):
                if isinstance(number, float) and abs(number) > _LARGEST:
                    raise ValueError(f"{name}: {number:g} is more than the arithmetic can carry")
        return self


class MergeSettings(Settings):
    """Settings of a merge that needs no data, with what it asks of the pool."""

    base: ClassVar[str] = "required"  # required | optional | unused
    experts: ClassVar[tuple[int, int | None]] = (1, None)  # fewest and most experts
    masked: ClassVar[bool] = False  # True where each expert gets a mask that brings it back from the merged model
    vectors: ClassVar[bool] = False  # True where base and task vectors are all it sees: these may be changed first
    base_counts: ClassVar[bool] = False  # True where an optional base is one of these, as an end of the arc is

    @property
    def elementwise(self) -> bool:
        """True where every element is merged by itself, so that a tensor may be split over workers."""
        return False

    @property
    def whole_rows(self) -> bool:
        """True where a block must hold whole rows of the tensor."""
        return False

    def copies_held(self, name: str, shape: tuple[int, ...], experts: int) -> float:
        """Copies of the whole tensor, in the arithmetic's type, that merging it keeps in memory; 0 when it is streamed."""
        return 0.0


class LearnedSettings(Settings):
    """Settings of a merge that looks at inputs: it runs the experts, so all tensors are held, not streamed."""

    base: ClassVar[str] = "required"
    experts: ClassVar[tuple[int, int | None]] = (1, None)
    masked: ClassVar[bool] = False
    vectors: ClassVar[bool] = False  # as above
    base_counts: ClassVar[bool] = False


def narrowed(settings: Any, places: Sequence[int]) -> Any:
    """The settings with every per-model field reduced to the experts at `places`."""
    fields = {name: getattr(settings, name) for name in type(settings).model_fields}
    update = {name: tuple(v[p] for p in places) for name, v in fields.items() if isinstance(v, tuple)}
    return settings.model_copy(update=update) if update else settings


def setting(default: Any, help: str, *, source: str, unit: str = "", **limits: Any) -> Any:
    """A field with its description, unit (empty: a plain number or word) and the source of its default."""
    return Field(default, description=help, json_schema_extra={"unit": unit, "source": source}, **limits)


def each(value: PerModel, count: int) -> tuple[float, ...]:
    """`value` for every one of `count` experts; a sequence of another length is a ValueError."""
    if isinstance(value, int | float):
        return (float(value),) * count
    if len(value) != count:
        raise ValueError(f"{len(value)} values for {count} experts")
    return tuple(float(v) for v in value)
