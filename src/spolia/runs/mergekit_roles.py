"""Who takes part in one slice, and as what: the base the others are compared with, or one that is merged."""

from __future__ import annotations

from dataclasses import dataclass

from spolia.runs.mergekit_grammar import Member, Slice
from spolia.runs.mergekit_resolver import Source
from spolia.runs.mergekit_settings import SPECS, Check, Given
from spolia.runs.request import ModelRef


@dataclass(frozen=True)
class Roles:
    """Of one slice: the base, if it has a part of its own, and who is merged, in the file's order."""

    base: Member | None
    experts: tuple[Member, ...]
    sources: tuple[Source, ...]  # the experts, as the resolver knows them

    @property
    def members(self) -> tuple[Member, ...]:
        return (*((self.base,) if self.base is not None else ()), *self.experts)


def roles(method: str, slice: Slice, levels: tuple[Given, ...], check: Check) -> Roles:
    """`levels`: parameters of slice, module and file. What does not fit goes into `check`."""
    spec, base = SPECS[method], slice.base
    member, weightless = spec.base == "member", "weight" not in spec.each
    shared = weightless or any("weight" in given.settings for given in levels)
    listed = next((m for m in slice.members if m.same_as(base)), None)
    experts: list[tuple[Member, Source]] = []
    for m in slice.members:
        if m is not listed:
            experts.append((m, Source(m.ref.name, m.at, m.given)))
        elif member and (shared or "weight" in m.given.settings):
            experts.append((m, Source(m.ref.name, m.at, m.given, silent=0.0)))
        elif member:
            check.warn(m.at, f"the base `{m.ref.name}` has no weight and stays out of the merge", "give it one")
        elif m.given.settings:
            names = ", ".join(f"`{name}`" for name in m.given.settings)
            check.warn(m.at, f"{names} of the base changes nothing: only the other models are weighed", "remove it")
    if base is not None and listed is None:
        listed = _unlisted(method, slice, base, shared, experts, check)
    if spec.base == "required" and base is None:
        what = f"`{method}` needs a base" + (": the model at t = 0" if method == "slerp" else "")
        check.error(("merge_method",), what, "add `base_model: PATH`")
    elif not experts:
        what = "only the base is listed" if base is not None else "no model is listed"
        check.error(slice.at, what, "add a model to merge with it")
    else:
        _count(method, slice, len(experts), check)
    return Roles(None if member else listed, tuple(m for m, _ in experts), tuple(s for _, s in experts))


def _unlisted(
    method: str, slice: Slice, base: ModelRef, shared: bool, experts: list[tuple[Member, Source]], check: Check
) -> Member | None:
    """A base that stands in `base_model` alone: `models` take it in, a slice does not know its layers."""
    member, at = SPECS[method].base == "member", ("base_model",)
    if not slice.whole:
        if SPECS[method].base == "required":
            mend = f"add `- model: {base.name}` with its layer_range to `sources`"
            check.error(slice.at, f"`{method}` needs its base `{base.name}` in every slice", mend)
        return None
    if not member:
        return Member(base, at)
    if method == "passthrough":
        check.warn(at, f"`{base.name}` lends only config and tokenizer", "list it under `models:` to copy it")
    elif shared:
        experts.append((Member(base, at), Source(base.name, at, Given(), silent=0.0)))
    else:
        what = f"the base `{base.name}` has no weight and stays out of the merge"
        check.warn(at, what, "list it under `models:` with a weight if it should take part")
    return None


def _count(method: str, slice: Slice, others: int, check: Check) -> None:
    """Notes a number of models that the method does not take."""
    fewest, most = SPECS[method].others
    if fewest <= others and (most is None or others <= most):
        return
    wanted = f"{fewest} or more" if most is None else str(fewest)
    beside = {"required": " beside the base", "optional": " (a base may stand beside them)", "member": ""}
    what = f"`{method}` takes {wanted}{beside[SPECS[method].base]}; found {others}"
    what += " others" if SPECS[method].base == "required" else ""
    mend = "list another" if others < fewest else f"keep {most}, or use `linear` for several"
    check.error(slice.at, what, mend)
