"""Which value a tensor gets: mergekit's order of precedence, and the settings built from it.

For one tensor the model's own `parameters` come first, then those of the slice, of the module and of the file, then the
method's default; a list of filters that matches nothing passes the question on. Filters of a model's parameter see the
tensor's name in that model, those of the whole merge its name in the result.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from spolia.catalog import find
from spolia.core.settings import MergeSettings
from spolia.errors import Problem, Problems, SpoliaError, did_you_mean
from spolia.runs.mergekit_settings import SPECS, Entry, Given, Setting, fields_of
from spolia.runs.yamlmarks import Marked, dotted
from spolia.runs.yamlmarks import Path as Place


@dataclass(frozen=True)
class Source:
    """One expert with its own parameters. `silent`: its weight where none is set; 0 for a base that may stay out."""

    name: str
    at: Place
    given: Given
    silent: float | None = None


@dataclass(frozen=True)
class Row:
    """Where one output tensor takes its values from: experts with the tensor's name in each, and the levels above."""

    sources: tuple[Source, ...]
    places: tuple[int, ...]  # of these experts in the pool
    names: tuple[str, ...]
    levels: tuple[Given, ...]  # slice, module, file
    t: float


class Resolver:
    """Settings of every tensor, built once for each set of values that occurs. `experts`: how many the pool has."""

    def __init__(self, method: str, row_of: Callable[[str], Row], experts: int, doc: Marked):
        self._method, self._spec, self._doc = method, SPECS[method], doc
        self._row_of, self._experts = row_of, experts
        self._class = find(self._spec.method).settings_class()
        self._built: dict[tuple[Any, ...], MergeSettings] = {}

    def settings_for(self, tensor: str) -> MergeSettings:
        """Raises SpoliaError where a required value is unset or the values make no sense together."""
        row = self._row_of(tensor)
        whole, each = self._numbers(row, tensor)
        if any(None in column for column in each.values()) or None in whole.values():
            self._check_set([tensor])
        key = (row.places, *whole.values(), *each.values())
        if key not in self._built:
            self._built[key] = self._build(whole, each, row.places, tensor)
        return self._built[key]

    def check_tensors(self, names: list[str]) -> list[Problem]:
        """Warnings about filters and values, now that the tensors are known. SpoliaError for values left unset."""
        self._check_set(names)
        problems = Problems()
        for name in names:
            self.settings_for(name)
        for given, seen in self._seen(names):
            for setting in given.settings.values():
                check_filters(self._doc, setting, list(seen), problems)
        self._check_window(names, problems)
        return problems.warnings

    def _seen(self, names: list[str]) -> list[tuple[Given, dict[str, None]]]:
        """The tensor names that the filters of each `parameters` are tested against."""
        found: dict[int, tuple[Given, dict[str, None]]] = {}
        for name in names:
            row = self._row_of(name)
            for given in row.levels:
                found.setdefault(id(given), (given, {}))[1].update(dict.fromkeys((name, *row.names)))
            for source, own in zip(row.sources, row.names, strict=True):
                found.setdefault(id(source.given), (source.given, {}))[1][own] = None
        return list(found.values())

    def unset(self, names: list[str]) -> list[Problem]:
        """Required values that are set nowhere, or for some of `names` by no filter."""
        problems = Problems()
        bare: dict[tuple[str, Place | None], tuple[Source | None, list[Setting | None], list[str]]] = {}
        for name in names:
            row = self._row_of(name)
            asked: list[tuple[str, Source | None, str]] = [
                (p, None, name) for p, default in self._spec.whole.items() if default is None
            ]
            for p, default in self._spec.each.items():
                pairs = zip(row.sources, row.names, strict=True)
                asked += [(p, s, own) for s, own in pairs if default is None and s.silent is None]
            for p, source, own in asked:
                givens = (*((source.given,) if source else ()), *row.levels)
                levels = [given.settings.get(p) for given in givens]
                if all(given.clean for given in givens) and _first(levels, own, 0.0) is None:
                    bare.setdefault((p, source.at if source else None), (source, levels, []))[2].append(own)
        for (parameter, _), (source, levels, lacking) in bare.items():
            problems.add(*self._told(parameter, source, levels, lacking))
        return problems.errors

    def _told(
        self, parameter: str, source: Source | None, levels: list[Setting | None], lacking: list[str]
    ) -> tuple[str, str, str]:
        whose = f" of `{source.name}`" if source else ""
        if not any(levels):
            what = f"`{parameter}`{whose} is not set, and `{self._method}` needs it"
            place = "to the model, or to the top level for all models" if source else "to the top level"
            where = self._doc.where(source.at if source else ())
            return where, what, f"add `parameters: {{{parameter}: 0.5}}` {place}"
        more = f" (and of {len(lacking) - 1} more tensors)" if len(lacking) > 1 else ""
        at = next(setting for setting in levels if setting)[-1].at
        what = f"no filter sets `{parameter}`{whose} for `{lacking[0]}`{more}"
        return self._doc.where(at), what, "end the list with an entry without filter: `- value: 0.5`"

    def _check_set(self, names: list[str]) -> None:
        problems = self.unset(names)
        if problems:
            raise SpoliaError(problems=problems)

    def _numbers(self, row: Row, tensor: str) -> tuple[dict[str, float | None], dict[str, tuple[float | None, ...]]]:
        def levels(parameter: str, *own: Given) -> list[Setting | None]:
            return [given.settings.get(parameter) for given in (*own, *row.levels)]

        whole = {p: _first(levels(p), tensor, row.t, default) for p, default in self._spec.whole.items()}
        each = {
            p: tuple(
                _first(levels(p, source.given), name, row.t, source.silent if default is None else default)
                for source, name in zip(row.sources, row.names, strict=True)
            )
            for p, default in self._spec.each.items()
        }
        return whole, each

    def _build(
        self, whole: dict[str, Any], each: dict[str, Any], places: tuple[int, ...], tensor: str
    ) -> MergeSettings:
        """mergekit's names and numbers as our fields; experts that take no part here get the first one's values."""
        columns = {name: self._spread(column, places) for name, column in each.items()}
        fields = {**self._spec.fixed, **columns, **fields_of(whole)}
        if self._spec.method == "average" and fields["normalize"] and abs(sum(each["weight"])) < 1e-8:
            what = f"the weights for `{tensor}` sum to zero, and `normalize` divides by the sum"
            raise SpoliaError(
                what, where=self._doc.where(("models",)), mend="change a weight, or set `normalize: false`"
            )
        try:
            return self._class.model_validate(fields, context={"told": True})  # its warnings: with their line, above
        except ValidationError as error:
            where = self._doc.where(("parameters",))
            told = [Problem(where, f"`{dotted(e['loc'])}` for `{tensor}`: {e['msg']}") for e in error.errors()]
            raise SpoliaError(problems=told) from None

    def _spread(self, column: tuple[float, ...], places: tuple[int, ...]) -> tuple[float, ...]:
        """One value for every expert of the pool."""
        if places == tuple(range(self._experts)):
            return column
        own = dict(zip(places, column, strict=True))
        return tuple(own.get(place, column[0]) for place in range(self._experts))

    def _check_window(self, names: list[str], problems: Problems) -> None:
        """DELLA's keep-probabilities run from density - epsilon to density + epsilon."""
        if "epsilon" not in self._spec.each:
            return
        for name in names:
            row = self._row_of(name)
            _, each = self._numbers(row, name)
            for source, d, e in zip(row.sources, each["density"], each["epsilon"], strict=True):
                if d is not None and e is not None and 0 < d < 1 and not (d - e > 0 and d + e < 1):
                    what = (
                        f"density {d:g} and epsilon {e:g} of `{source.name}` leave (0, 1); the window is narrowed there"
                    )
                    problems.warn(
                        self._doc.where(source.at), what, "choose a smaller epsilon; mergekit refuses this one"
                    )
                    return


def _first(levels: list[Setting | None], tensor: str, t: float, default: float | None = None) -> float | None:
    """The value of the first level that has an entry for `tensor`."""
    for setting in levels:
        for entry in setting or ():
            if entry.matches(tensor):
                return entry.value(t)
    return default


def check_filters(doc: Marked, setting: Setting, names: list[str], problems: Problems) -> None:
    """Filters that match nothing, or only what an earlier entry has taken, or more layers than they name."""
    left = names
    for entry in setting:
        if entry.filter is None:
            return
        where, hits = doc.where(entry.at), [name for name in left if entry.filter in name]
        if not any(entry.filter in name for name in names):
            words = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
            near = did_you_mean(entry.filter, words)
            mend = near if near.startswith("did") else "write a part of a tensor's name, as it stands in the checkpoint"
            problems.warn(where, f"no tensor's name contains `{entry.filter}`", mend)
        elif not hits:
            what = f"all tensors that contain `{entry.filter}` are taken by earlier entries"
            problems.warn(where, what, "the first match counts: put this entry before them")
        else:
            _check_digits(entry, hits, where, problems)
        left = [name for name in left if entry.filter not in name]


def _check_digits(entry: Entry, hits: list[str], where: str, problems: Problems) -> None:
    """`layers.1` is part of `layers.10` too."""
    assert entry.filter is not None
    text = re.escape(entry.filter)
    after, before = entry.filter[-1].isdigit(), entry.filter[0].isdigit()
    for cut, pattern in ((after, rf"{text}\d"), (before, rf"\d{text}")):
        long = next((name for name in hits if cut and re.search(pattern, name)), None)
        if long:
            closed = ("." if before else "") + entry.filter + ("." if after else "")
            problems.warn(where, f"`{entry.filter}` matches `{long}` too", f"to name one layer write `{closed}`")
            return
