"""Which value a tensor gets: layers from names, mergekit's order of precedence, and the settings built from both.

For one tensor the model's own `parameters` come first, then the top-level ones, then the method's default; a list of
filters that matches nothing passes the question on. Layer i of n stands at t = i/(n-1) of a gradient, the layer of a
stack of one at t = 1, and everything outside the layers (embeddings, final norm, head) at t = 0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from spolia.catalog import find
from spolia.core.settings import MergeSettings
from spolia.errors import Problem, Problems, SpoliaError, did_you_mean
from spolia.runs.mergekit_settings import SPECS, Entry, Given, Setting
from spolia.runs.yamlmarks import Marked, dotted
from spolia.runs.yamlmarks import Path as Place

_LAYER = re.compile(r"(.+?)\.(\d+)\.")
_COUNTS = ("num_hidden_layers", "n_layer", "num_layers")


class Layers:
    """Which layer a tensor belongs to, from names alone; the number of layers from the config where it says so.

    The stack is the prefix before the first `.number.` that holds most tensors; a prefix that ends in the same word
    (the vision tower's `layers` beside the text's) is a stack of its own. Every other tensor is outside the layers.
    """

    def __init__(self, names: Iterable[str], config: Mapping[str, Any] | None = None):
        found = [match.groups() for match in map(_LAYER.match, names) if match]
        tally = Counter(prefix for prefix, _ in found)
        self._depth: dict[str, int] = {}
        self.count = 0  # layers of the main stack
        if tally:
            main = max(tally, key=tally.__getitem__)
            for prefix, number in found:
                if prefix.rpartition(".")[2] == main.rpartition(".")[2]:
                    self._depth[prefix] = max(self._depth.get(prefix, 0), int(number) + 1)
            said = ((config or {}).get(key) for key in _COUNTS)
            self._depth[main] = next((n for n in said if type(n) is int and n > 0), self._depth[main])
            self.count = self._depth[main]

    def position(self, tensor: str) -> float:
        """t in [0, 1]. A layer beyond the config's count (an extra prediction head) stands at 1."""
        match = _LAYER.match(tensor)
        depth = self._depth.get(match[1], 0) if match else 0
        if not match or not depth:
            return 0.0
        return min(1.0, int(match[2]) / (depth - 1)) if depth > 1 else 1.0


@dataclass(frozen=True)
class Source:
    """One expert with its own parameters. `silent`: its weight where none is set; 0 for a base that may stay out."""

    name: str
    at: Place
    given: Given
    silent: float | None = None


class Resolver:
    """Settings of every tensor, built once for each set of values that occurs."""

    def __init__(self, method: str, sources: list[Source], top: Given, layers: Layers, doc: Marked):
        self._method, self._spec, self._doc = method, SPECS[method], doc
        self._sources, self._top, self._layers = sources, top, layers
        self._class = find(self._spec.method).settings_class()
        self._built: dict[tuple[Any, ...], MergeSettings] = {}

    def settings_for(self, tensor: str) -> MergeSettings:
        """Raises SpoliaError where a required value is unset or the values make no sense together."""
        whole, each = self._numbers(tensor)
        if any(None in column for column in each.values()) or None in whole.values():
            self._check_set([tensor])
        key = (*whole.values(), *each.values())
        if key not in self._built:
            self._built[key] = self._build(whole, each, tensor)
        return self._built[key]

    def check_tensors(self, names: list[str]) -> list[Problem]:
        """Warnings about filters and values, now that the tensors are known. SpoliaError for values left unset."""
        self._check_set(names)
        problems = Problems()
        for name in names:
            self.settings_for(name)
        for given in (self._top, *(source.given for source in self._sources)):
            for setting in given.settings.values():
                self._check_filters(setting, names, problems)
        self._check_window(names, problems)
        return problems.warnings

    def unset(self, names: list[str]) -> list[Problem]:
        """Required values that are set nowhere, or for some of `names` by no filter."""
        problems = Problems()
        columns = [
            (p, s, [s.given.settings.get(p), self._top.settings.get(p)]) for p in self._spec.each for s in self._sources
        ]
        rows: list[tuple[str, Source | None, list[Setting | None]]] = [
            *((p, None, [self._top.settings.get(p)]) for p, default in self._spec.whole.items() if default is None),
            *((p, s, levels) for p, s, levels in columns if self._spec.each[p] is None and s.silent is None),
        ]
        for parameter, source, levels in rows:
            if not self._top.clean or (source and not source.given.clean):
                continue  # it may be the one that was refused
            whose = f" of `{source.name}`" if source else ""
            if not any(levels):
                what = f"`{parameter}`{whose} is not set, and `{self._method}` needs it"
                place = "to the model, or to the top level for all models" if source else "to the top level"
                problems.add(
                    self._doc.where(source.at if source else ()),
                    what,
                    f"add `parameters: {{{parameter}: 0.5}}` {place}",
                )
                continue
            bare = [name for name in names if _first(levels, name, 0.0) is None]
            if bare:
                more = f" (and of {len(bare) - 1} more tensors)" if len(bare) > 1 else ""
                at = next(setting for setting in levels if setting)[-1].at
                what = f"no filter sets `{parameter}`{whose} for `{bare[0]}`{more}"
                problems.add(self._doc.where(at), what, "end the list with an entry without filter: `- value: 0.5`")
        return problems.errors

    def _check_set(self, names: list[str]) -> None:
        problems = self.unset(names)
        if problems:
            raise SpoliaError(problems=problems)

    def _numbers(self, tensor: str) -> tuple[dict[str, float | None], dict[str, tuple[float | None, ...]]]:
        t = self._layers.position(tensor)
        whole = {p: _first([self._top.settings.get(p)], tensor, t, default) for p, default in self._spec.whole.items()}
        each = {
            p: tuple(
                _first(
                    [s.given.settings.get(p), self._top.settings.get(p)],
                    tensor,
                    t,
                    s.silent if default is None else default,
                )
                for s in self._sources
            )
            for p, default in self._spec.each.items()
        }
        return whole, each

    def _build(self, whole: dict[str, Any], each: dict[str, Any], tensor: str) -> MergeSettings:
        """mergekit's names and numbers as our fields."""
        fields = {**self._spec.fixed, **each}
        for name, value in whole.items():
            if name == "lambda":
                fields["scale"] = value
            elif name == "normalize":
                fields["normalize"] = bool(value)
            elif name == "rescale":
                fields["rescale"] = "l1" if value else "none"
            else:
                fields[name] = value
        if self._spec.method == "average" and fields["normalize"] and abs(sum(each["weight"])) < 1e-8:
            what = f"the weights for `{tensor}` sum to zero, and `normalize` divides by the sum"
            raise SpoliaError(
                what, where=self._doc.where(("models",)), mend="change a weight, or set `normalize: false`"
            )
        try:
            return self._class.model_validate(fields)
        except ValidationError as error:
            where = self._doc.where(("parameters",))
            told = [Problem(where, f"`{dotted(e['loc'])}` for `{tensor}`: {e['msg']}") for e in error.errors()]
            raise SpoliaError(problems=told) from None

    def _check_filters(self, setting: Setting, names: list[str], problems: Problems) -> None:
        """Filters that match nothing, or only what an earlier entry has taken, or more layers than they name."""
        left = names
        for entry in setting:
            if entry.filter is None:
                return
            where, hits = self._doc.where(entry.at), [name for name in left if entry.filter in name]
            if not any(entry.filter in name for name in names):
                words = dict.fromkeys(part for name in names for part in name.split(".") if not part.isdigit())
                near = did_you_mean(entry.filter, words)
                mend = (
                    near
                    if near.startswith("did")
                    else "write a part of a tensor's name, as it stands in the checkpoint"
                )
                problems.warn(where, f"no tensor's name contains `{entry.filter}`", mend)
            elif not hits:
                what = f"all tensors that contain `{entry.filter}` are taken by earlier entries"
                problems.warn(where, what, "the first match counts: put this entry before them")
            else:
                self._check_digits(entry, hits, where, problems)
            left = [name for name in left if entry.filter not in name]

    def _check_digits(self, entry: Entry, hits: list[str], where: str, problems: Problems) -> None:
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

    def _check_window(self, names: list[str], problems: Problems) -> None:
        """DELLA's keep-probabilities run from density - epsilon to density + epsilon."""
        if "epsilon" not in self._spec.each:
            return
        for name in names:
            _, each = self._numbers(name)
            for source, d, e in zip(self._sources, each["density"], each["epsilon"], strict=True):
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
