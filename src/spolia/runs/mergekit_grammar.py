"""The form of a mergekit recipe: `models`, `slices` and `modules` as what they say, each with its place in the file.

models:                slices:                             modules:
  - model: REF           - sources:                          NAME:
    parameters: {}           - model: REF                      models: [...]   # or slices
                               layer_range: [0, 16]             parameters: {}
                               parameters: {}
                         base_model: REF
                         parameters: {}
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from spolia.runs.mergekit_settings import Check, Given, read_parameters
from spolia.runs.request import ModelRef
from spolia.runs.yamlmarks import Path as Place

_FORMS = ("models", "slices", "modules")


@dataclass(frozen=True)
class Member:
    """An entry under `models` or `sources`. `span`: its layers, end exclusive; None: all."""

    ref: ModelRef
    at: Place
    given: Given = field(default_factory=Given)
    span: tuple[int, int] | None = None

    def same_as(self, other: ModelRef | None) -> bool:
        return other is not None and self.ref.key == other.key


@dataclass(frozen=True)
class Slice:
    """Models merged over a range of layers. `whole`: it stands for `models:`, so an unlisted base joins it."""

    at: Place
    members: tuple[Member, ...]
    base: ModelRef | None
    given: Given = field(default_factory=Given)
    whole: bool = False


@dataclass(frozen=True)
class Module:
    """A part of the model with slices of its own. `name` is empty where the recipe names no modules."""

    name: str
    at: Place
    slices: tuple[Slice, ...]
    given: Given = field(default_factory=Given)


class Grammar:
    """Reads the form; notes what is wrong in `check`. `lost`: something could not be read, counting would mislead."""

    def __init__(self, check: Check, method: str | None, refer: Callable[[Any, Place], ModelRef | None]):
        self.check, self.method, self._refer = check, method, refer
        self.lost = False

    def read(self, value: dict[str, Any], base: ModelRef | None) -> list[Module]:
        """The modules of the recipe; one without a name when it has `models` or `slices` at the top."""
        forms = [key for key in _FORMS if value.get(key) is not None]
        for key in forms[1:]:
            self.check.error((key,), f"`{key}` and `{forms[0]}` exclude each other", "keep one of the two")
        if not forms:
            self.lost = True  # told by the reader, which knows what is misspelt
            return []
        if forms[0] != "modules":
            slices = self._slices(value, (), base)
            return [Module("", (forms[0],), slices)] if slices else []
        named = value["modules"]
        if not isinstance(named, dict) or not named:
            mend = "write `modules: {default: {models: [...]}}`"
            self.check.error(("modules",), "`modules` must be a mapping of names", mend)
            self.lost = True
            return []
        return [module for name, body in named.items() if (module := self._module(str(name), body, base)) is not None]

    def _module(self, name: str, body: Any, base: ModelRef | None) -> Module | None:
        at: Place = ("modules", name)
        if not isinstance(body, dict):
            self._bad(at, "this module says nothing", "give it `models:` or `slices:`")
            return None
        self.check.keys(body, at, ("models", "slices", "parameters"), tolerated=("name",))
        forms = [key for key in ("models", "slices") if body.get(key) is not None]
        if len(forms) != 1:
            self._bad(at, "a module has either `models` or `slices`", "keep one of the two" if forms else "add one")
            return None
        given = self._parameters(body, at)
        slices = self._slices(body, at, base)
        return Module(name, at, slices, given) if slices else None

    def _bad(self, at: Place, what: str, mend: str) -> None:
        self.check.error(at, what, mend)
        self.lost = True

    def _parameters(self, body: dict[str, Any], at: Place, model: bool = False) -> Given:
        return read_parameters(body.get("parameters"), (*at, "parameters"), self.check, self.method, model=model)

    def _slices(self, body: dict[str, Any], at: Place, base: ModelRef | None) -> tuple[Slice, ...]:
        """What stands under `models` or `slices` in `body`."""
        if body.get("models") is not None:
            members = self._members(body["models"], (*at, "models"), ranged=False)
            return (Slice((*at, "models"), members, base, whole=True),) if members else ()
        entries, here = body["slices"], (*at, "slices")
        if not isinstance(entries, list) or not entries:
            self._bad(here, "`slices` must be a list", "write `slices:` and below it `- sources:`")
            return ()
        slices = [self._slice(entry, (*here, i), base) for i, entry in enumerate(entries)]
        return tuple(slice for slice in slices if slice is not None)

    def _slice(self, entry: Any, at: Place, base: ModelRef | None) -> Slice | None:
        if not isinstance(entry, dict) or "sources" not in entry:
            self._bad(at, "this slice names no `sources`", "write `- sources: [{model: PATH, layer_range: [0, 16]}]`")
            return None
        self.check.keys(entry, at, ("sources", "base_model", "parameters"), tolerated=("residual_weight",))
        if entry.get("base_model") is not None:
            base = self._reference(entry["base_model"], (*at, "base_model"))
        members = self._members(entry["sources"], (*at, "sources"), ranged=True)
        return Slice(at, members, base, self._parameters(entry, at)) if members else None

    def _members(self, entries: Any, at: Place, *, ranged: bool) -> tuple[Member, ...]:
        word = str(at[-1])
        if not isinstance(entries, list) or not entries:
            mend = f"write `{word}:` and below it `- model: PATH`"
            self._bad(at, f"`{word}` must be a list of models", mend)
            return ()
        members: list[Member] = []
        for i, entry in enumerate(entries):
            here: Place = (*at, i)
            if not isinstance(entry, dict) or "model" not in entry:
                path = entry if isinstance(entry, str) else "PATH"
                self._bad(here, "this entry names no model", f"write `- model: {path}`")
            if not isinstance(entry, dict):
                continue
            self._member_keys(entry, here, ranged)
            given = self._parameters(entry, here, model=True)
            span = self._span(entry.get("layer_range"), (*here, "layer_range")) if ranged else None
            ref = self._reference(entry["model"], (*here, "model")) if "model" in entry else None
            if ref is None:
                continue
            twin = next((member for member in members if member.same_as(ref)), None)
            if twin:
                first = self.check.doc.lines.get(twin.at)
                self.check.error(here, f"`{ref.name}` is listed twice, first in line {first}", "keep one of the two")
            members.append(Member(ref, here, given, span))
        return tuple(members)

    def _member_keys(self, entry: dict[str, Any], at: Place, ranged: bool) -> None:
        if "layer_range" in entry and not ranged:
            mend = "layers are cut under `slices:`, as `- sources: [{model: …, layer_range: …}]`"
            self.check.unheard((*at, "layer_range"), "`layer_range` has no place under `models`", mend)
        known = ("model", "parameters", "layer_range") if ranged else ("model", "parameters")
        self.check.keys(entry, at, known, tolerated=() if ranged else ("layer_range",))

    def _span(self, value: Any, at: Place) -> tuple[int, int] | None:
        if value is None:
            return None
        mend = "write [start, end]; layers count from 0, and the end is not included"
        if not isinstance(value, list) or len(value) != 2 or not all(type(v) is int for v in value):
            self._bad(at, f"`layer_range: {value}` is no pair of whole numbers", mend)
            return None
        low, high = value
        if low < 0 or high <= low:
            what = "starts below 0" if low < 0 else "holds no layer"
            self._bad(at, f"the range [{low}, {high}] {what}", mend)
            return None
        return low, high

    def _reference(self, value: Any, at: Place) -> ModelRef | None:
        ref = self._refer(value, at)
        self.lost = self.lost or ref is None
        return ref
