"""From slices to tensors: which layer of which model each output tensor is made of, and what the config becomes.

Layers are numbered on over the slices. What stands before the layers (embeddings) is merged from the models of the first
slice, what stands after them (final norm, head) from those of the last, with their parameters. A gradient runs over the
layers of its slice and starts anew in the next; outside the layers its first value counts.
Departure: mergekit cuts the last slice's models, after the layers, to as many as the first slice has. Here all take part;
`x-spolia: {legacy_post_weights: true}` cuts them too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from spolia.errors import SpoliaError
from spolia.parts.align import Where, Wire
from spolia.parts.expert import Weights
from spolia.parts.layers import Layers, before, restacked, share
from spolia.runs.mergekit_grammar import Member, Module, Slice
from spolia.runs.mergekit_resolver import Row
from spolia.runs.mergekit_roles import Roles, roles
from spolia.runs.mergekit_settings import Check, Given
from spolia.runs.request import ModelRef, distinct


class Headers:
    """Names, layers and configs of the models, each opened once. What cannot be opened is told where it is named."""

    def __init__(self, check: Check, open_model: Callable[[ModelRef], Weights]):
        self._check, self._open = check, open_model
        self._seen: dict[ModelRef, tuple[Weights, Layers] | None] = {}

    def of(self, member: Member) -> tuple[Weights, Layers] | None:
        """The model's weights and layers; None: told."""
        key = member.ref.key
        if key not in self._seen:
            try:
                weights = self._open(member.ref)
                self._seen[key] = weights, Layers(weights.entries, weights.config)
            except SpoliaError as error:
                self._seen[key] = None
                at = (*member.at, "model") if member.at != ("base_model",) else member.at
                for problem in error.problems:
                    self._check.error(at, f"{problem.where}: {problem.what}", problem.mend)
        return self._seen[key]


@dataclass(frozen=True)
class Scope:
    """The tensors of one module: all that no other module claims, or those whose name contains its name."""

    name: str
    claimed: tuple[str, ...] = ()  # names of the other modules, for the one that takes the rest

    def holds(self, tensor: str) -> bool:
        dotted = f".{tensor}."
        if self.claimed or not self.name:
            return not any(f".{name}." in dotted for name in self.claimed)
        return f".{self.name}." in dotted


REST = ("", "default", "text_decoder")  # modules that take what no other claims


def scopes(modules: list[Module], names: Iterable[str], check: Check) -> dict[str, Scope]:
    """Which tensors belong to which module. Told: modules without tensors, tensors without module."""
    named = tuple(sorted((m.name for m in modules if m.name not in REST), key=len, reverse=True))
    found = {m.name: Scope(m.name, named) if m.name in REST else Scope(m.name) for m in modules}
    if len(modules) == 1 and modules[0].name in REST:
        found[modules[0].name] = Scope("")
    names = list(names)
    for module in modules:
        if module.name and not any(found[module.name].holds(name) for name in names):
            prefixes = sorted({name.split(".")[0] for name in names} | set(Layers(names).depth))
            mend = f"use `default`, or a part of tensor names such as {', '.join(f'`{p}`' for p in prefixes[:6])}"
            check.error(module.at, f"no tensor belongs to the module `{module.name}`", mend)
    over = [name for name in names if not any(scope.holds(name) for scope in found.values())]
    if over:
        more = f" (and {len(over) - 1} more)" if len(over) > 1 else ""
        mend = "add a module `default` for what the others leave"
        check.error(modules[0].at[:1], f"`{over[0]}`{more} belongs to no module", mend)
    return found


@dataclass
class Wired:
    """What the slices come to. `rows`, `wires` and their settings by output tensor."""

    base: ModelRef | None
    experts: list[ModelRef]
    wires: dict[str, Wire] = field(default_factory=dict)
    rows: dict[str, Row] = field(default_factory=dict)
    reshapes: list[tuple[str, list[tuple[Mapping[str, Any] | None, int]]]] = field(default_factory=list)
    longest: int = 0  # layers of the longest slice
    notes: list[str] = field(default_factory=list)  # the layout in words, for the plan

    def reshape(self, config: dict[str, Any]) -> dict[str, Any]:
        """The donor's config with the new numbers of layers."""
        for stack, kept in self.reshapes:
            config = restacked(config, stack, kept)
        return config


@dataclass(frozen=True)
class _Cut:
    """One slice with its roles and the layers it takes of each member."""

    slice: Slice
    roles: Roles
    levels: tuple[Given, ...]
    spans: dict[ModelRef, tuple[int, int]]
    length: int


class Wirer:
    """Lays modules out. Everything that does not fit is told before `wire` returns None."""

    def __init__(self, method: str, top: Given, headers: Headers, check: Check, legacy: bool):
        self._method, self._top, self._headers, self._check, self._legacy = method, top, headers, check, legacy

    def wire(self, modules: list[Module]) -> Wired | None:
        check, errors = self._check, len(self._check.problems.errors)
        slices = [slice for module in modules for slice in module.slices]
        members = [m for slice in slices for m in slice.members]
        members += [Member(slice.base, ("base_model",)) for slice in slices if slice.whole and slice.base is not None]
        opened = {m.ref.key: self._headers.of(m) for m in members}
        if None in opened.values():
            return None
        first = opened[members[0].ref.key]
        assert first is not None
        scoped = scopes(modules, first[0].entries, check)
        cuts = {module.name: self._cuts(module, scoped[module.name]) for module in modules}
        if len(check.problems.errors) > errors:
            return None
        every = [cut for found in cuts.values() for cut, _ in found]
        wired = self._pool([cut.roles for cut in every])
        for module in modules:
            self._lay_out(module, scoped[module.name], cuts[module.name], wired)
        wired.longest = max((cut.length for cut in every), default=0)
        return wired

    def _pool(self, every: list[Roles]) -> Wired:
        """The models of all slices. A base is the pool's base when it is the base everywhere."""
        bases = {r.base.ref.key if r.base is not None else None for r in every}
        base = every[0].base.ref if len(bases) == 1 and every[0].base is not None else None
        listed = (m.ref for r in every for m in r.members)
        return Wired(base, distinct(ref for ref in listed if base is None or not ref.is_same(base)))

    def _stack(self, member: Member, scope: Scope) -> tuple[str, int]:
        """The stack of layers within the module, and how many it has in this model; none: empty name and 0."""
        found = self._headers.of(member)
        assert found is not None
        weights, layers = found
        inside: dict[str, int] = {}
        for name in weights.entries:
            place = layers.of(name)
            if place is not None and scope.holds(name):
                inside[place[0]] = inside.get(place[0], 0) + 1
        if not inside:
            return "", 0
        stack = max(inside, key=inside.__getitem__)
        return stack, layers.depth[stack]

    def _cuts(self, module: Module, scope: Scope) -> list[tuple[_Cut, str]]:
        """The slices of a module, each with the prefix of its layers."""
        cuts: list[tuple[_Cut, str]] = []
        for slice in module.slices:
            levels = (slice.given, module.given, self._top)
            found = roles(self._method, slice, levels, self._check)
            members = found.members or slice.members
            spans, stacks = {}, []
            for m in members:
                stack, count = self._stack(m, scope)
                stacks.append(stack)
                if m.span is not None and m.span[1] > count:
                    what = f"`{m.ref.name}` has {count} layers, the range ends at {m.span[1]}"
                    self._check.error((*m.at, "layer_range"), what, f"write an end of at most {count}")
                spans[m.ref.key] = m.span or (0, count)
            lengths = {m.ref.name: spans[m.ref.key][1] - spans[m.ref.key][0] for m in members}
            if len(set(lengths.values())) > 1:
                told = ", ".join(f"{count} of `{name}`" for name, count in lengths.items())
                self._check.error(slice.at, f"models of one slice need as many layers: {told}", "mend a layer_range")
            cuts.append((_Cut(slice, found, levels, spans, next(iter(lengths.values()))), stacks[0]))
        self._one_stack(module, scope)
        return cuts

    def _one_stack(self, module: Module, scope: Scope) -> None:
        """Ranges of layers mean one stack."""
        sliced = [m for slice in module.slices if not slice.whole for m in slice.members]
        if not sliced:
            return
        found = self._headers.of(sliced[0])
        assert found is not None
        stacks = sorted({p[0] for n in found[0].entries if scope.holds(n) and (p := found[1].of(n)) is not None})
        if len(stacks) > 1:
            names = ", ".join(f"`{stack}`" for stack in stacks)
            mend = f"slice each apart: `modules: {{default: {{models: …}}, {stacks[0]}: {{slices: …}}}}`"
            self._check.error(module.at, f"the layers could be those of {names}", mend)

    def _lay_out(self, module: Module, scope: Scope, cuts: list[tuple[_Cut, str]], wired: Wired) -> None:
        kept: list[tuple[Mapping[str, Any] | None, int]] = []
        for cut, stack in cuts:
            if cut.length:
                wired.notes.append(f"`{stack}` {_range(len(kept), cut.length)}: {_taken(cut)}")
            for layer in range(cut.length):
                self._layer(cut, stack, layer, len(kept), scope, wired)
                lead = cut.roles.members[0]
                found = self._headers.of(lead)
                kept.append((found[0].config if found else None, cut.spans[lead.ref.key][0] + layer))
        first, last = cuts[0][0], self._after(cuts[0][0], cuts[-1][0])
        for cut, early in ((first, True), (last, False)):
            names = [n for m in cut.roles.members for n in self._loose(m, scope) if before(n) is early]
            if names:
                shown = ", ".join(f"`{name}`" for name in list(dict.fromkeys(names))[:3]) + " …" * (len(set(names)) > 3)
                owners = ", ".join(m.ref.name for m in cut.roles.members)
                wired.notes.append(f"{'before' if early else 'after'} the layers {shown}: {owners}")
            for name in dict.fromkeys(names):
                self._enter(name, [name] * len(cut.roles.members), cut, 0.0, wired)
        if cuts[0][1] and not (len(module.slices) == 1 and module.slices[0].whole):
            wired.reshapes.append((cuts[0][1], kept))

    def _after(self, first: _Cut, last: _Cut) -> _Cut:
        if not self._legacy or len(last.slice.members) <= len(first.slice.members):
            return last
        cut = replace(last.slice, members=last.slice.members[: len(first.slice.members)])
        return replace(last, slice=cut, roles=roles(self._method, cut, last.levels, self._check))

    def _loose(self, member: Member, scope: Scope) -> list[str]:
        found = self._headers.of(member)
        assert found is not None
        return [name for name in found[0].entries if found[1].of(name) is None and scope.holds(name)]

    def _layer(self, cut: _Cut, stack: str, layer: int, number: int, scope: Scope, wired: Wired) -> None:
        """The tensors of layer `layer` of the slice: layer `number` of the result."""
        starts = [cut.spans[m.ref.key][0] + layer for m in cut.roles.members]
        rests: dict[str, None] = {}
        for member, at in zip(cut.roles.members, starts, strict=True):
            found = self._headers.of(member)
            assert found is not None
            prefix = f"{stack}.{at}."
            rests.update(dict.fromkeys(n[len(prefix) :] for n in found[0].entries if n.startswith(prefix)))
        for rest in rests:
            names = [f"{stack}.{at}.{rest}" for at in starts]
            self._enter(f"{stack}.{number}.{rest}", names, cut, share(layer, cut.length), wired)

    def _enter(self, name: str, names: list[str], cut: _Cut, t: float, wired: Wired) -> None:
        """Output tensor `name`, made of `names` in the slice's base and experts."""
        numbers = {ref.key: n for n, ref in enumerate([*([wired.base] if wired.base else []), *wired.experts])}
        ends: list[Where] = [(numbers[m.ref.key], n) for m, n in zip(cut.roles.members, names, strict=True)]
        base, experts = (ends[0], ends[1:]) if cut.roles.base is not None else (None, ends)
        wired.wires[name] = Wire(base, tuple(experts))
        first = 0 if wired.base is None else 1
        places = tuple(number - first for number, _ in experts)
        wired.rows[name] = Row(cut.roles.sources, places, tuple(n for _, n in experts), cut.levels, t)


def _range(start: int, length: int) -> str:
    return str(start) if length == 1 else f"{start}-{start + length - 1}"


def _taken(cut: _Cut) -> str:
    """`A 0-2, B 4-6`."""
    return ", ".join(f"{m.ref.name} {_range(cut.spans[m.ref.key][0], cut.length)}" for m in cut.roles.members)
