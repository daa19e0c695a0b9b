"""Reads mergekit's YAML recipes: same file, same numbers, every mistake found before a weight is read.

All its methods are read (mergekit_settings.SPECS), over whole models, slices of layers and modules (mergekit_grammar),
with tokenizer section and chat template. Where mergekit skips an unknown key or parameter in silence, we stop
(`strict: false` in an `x-spolia:` block makes that a warning). Departures: arithmetic is fp32 throughout, so `dtype` only
names the output's type where `out_dtype` does not. Two spellings of one path are one model. Config and tokenizer come
from `base_model`, else from the first model of the file. A base without weight stays out of a `linear` merge. `bf16`,
`fp16`, `fp32` and `float64` are understood. Several documents in one file: mergekit_multi.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from spolia.catalog import find
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.expert import Weights
from spolia.parts.inputs import Inputs
from spolia.runs.mergekit_grammar import Grammar, Member, Module
from spolia.runs.mergekit_models import read_reference
from spolia.runs.mergekit_resolver import Resolver, Row
from spolia.runs.mergekit_roles import roles
from spolia.runs.mergekit_settings import SPECS, Check, Given, read_parameters
from spolia.runs.mergekit_templates import read_template
from spolia.runs.mergekit_tokens import Section, Tokens, read_section
from spolia.runs.mergekit_wiring import REST, Headers, Wired, Wirer
from spolia.runs.request import MergeRequest, ModelRef, TokenPlan, distinct
from spolia.runs.yamlmarks import Marked
from spolia.runs.yamlmarks import Path as Place

_TOP = (
    "merge_method", "models", "slices", "modules", "base_model", "parameters", "dtype", "out_dtype",
    "tokenizer_source", "tokenizer", "chat_template", "x-spolia",
)  # fmt: skip
_TOLERATED = ("name", "residual_weight")  # mergekit accepts them and makes no use of them in a single merge
_SIGNS = (
    "merge_method", "models", "slices", "modules", "base_model", "gate_mode", "genome", "tokenizer_source", "x-spolia",
)  # fmt: skip
_OTHER_TOOLS = {  # recipes of mergekit's other commands, by a key that only they have
    "gate_mode": ("a mixture-of-experts recipe", "build it with mergekit-moe; here models of one shape are merged"),
    "experts": ("a mixture-of-experts recipe", "build it with mergekit-moe; here models of one shape are merged"),
    "genome": ("an evolutionary search", "run mergekit-evolve, then merge here the recipe that it found best"),
}
_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "float64": "float64"}
_DTYPES |= {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
_EXTRA: dict[str, tuple[Any, str]] = {  # key of `x-spolia` -> default, what it may be
    "strict": (True, "true or false"),
    "on_size_mismatch": ("refuse", "refuse or truncate"),
    "seed": (0, "a whole number from 0 on"),
    "keep_padding": (False, "true or false"),
    "legacy_post_weights": (False, "true or false"),
    "keep_intermediate": (False, "true or false"),
}


def is_mergekit(value: Any) -> bool:
    """True for a document that can only be meant for mergekit, even if its `merge_method` is missing or misspelt."""
    if not isinstance(value, dict):
        return False
    return "merge_method" in value or ("spolia" not in value and any(key in value for key in _SIGNS))


def read_mergekit(
    marked: Marked, *, folder: Path, strict: bool = True, named: Mapping[str, Path] | None = None
) -> MergeRequest:
    """The merge that a mergekit recipe asks for. Relative model paths start at `folder`, then at the current one.

    `named`: models that go by a name in this recipe. Opens headers of models, no weights: of the first one for its
    layers, of all for slices, modules and tokenizers. Raises SpoliaError with all that is wrong.
    """
    value = marked.value
    if not isinstance(value, dict):
        raise SpoliaError(
            "a mergekit recipe is a mapping", where=marked.where(), mend="start with `merge_method: linear`"
        )
    for key, (what, mend) in _OTHER_TOOLS.items():
        if key in value and "merge_method" not in value:
            raise SpoliaError(f"{what} (`{key}`) is not read here", where=marked.where((key,)), mend=mend)
    return _Reader(marked, Path(folder), strict, named or {}).read()


class _Reader:
    """One pass over one file; notes everything before it raises."""

    def __init__(self, marked: Marked, folder: Path, strict: bool, named: Mapping[str, Path]):
        self.value: dict[str, Any] = {key: v for key, v in marked.value.items() if v is not None}
        self.marked, self.folder = marked, folder
        self.check = Check(marked, strict, named=named)
        self.inputs = Inputs()
        self.headers = Headers(self.check, self._open)

    def read(self) -> MergeRequest:
        check, value = self.check, self.value
        extra = self._extra()
        check.keys(self.marked.value, (), _TOP, _TOLERATED)
        method = self._method()
        dtypes = [self._dtype(key) for key in ("out_dtype", "dtype")]
        grammar = Grammar(check, method, self._refer)
        base = self._refer(value["base_model"], ("base_model",)) if "base_model" in value else None
        if not any(key in value for key in ("models", "slices", "modules")):
            self._missing("models", "write `models:` and below it `- model: PATH`")
        modules = grammar.read(value, base)
        top = read_parameters(value.get("parameters"), ("parameters",), check, method, model=False)
        section = read_section(value, self._refer, check)
        members = [m for module in modules for slice in module.slices for m in slice.members]
        listed = [*([base] if base is not None else []), *(m.ref for m in members)]
        template = read_template(value, [*(m.ref for m in members), *listed[:1]], check)
        if method is None or not members or grammar.lost or ("base_model" in value and base is None):
            check.raise_if_any()
            raise AssertionError("a missing method or model has left a problem")
        wired, resolver = self._values(method, modules, top, extra["legacy_post_weights"])
        donor = base or members[0].ref
        tokens = self._tokens(section, listed, base is not None, extra["keep_padding"], donor)
        check.raise_if_any()
        return MergeRequest(
            method=find(SPECS[method].method),
            experts=wired.experts,
            settings_for=resolver.settings_for,
            base=wired.base,
            out_dtype=dtypes[0] or dtypes[1],
            donor=donor,
            seed=extra["seed"],
            recipe=yaml.safe_dump(self.marked.value, sort_keys=False, allow_unicode=True, width=120),
            recipe_name="mergekit_config.yml",
            warnings=check.problems.warnings,
            on_size_mismatch=extra["on_size_mismatch"],
            check_tensors=resolver.check_tensors,
            wiring=wired.wires or None,
            reshape=wired.reshape if wired.reshapes else None,
            notes=wired.notes,
            tokens=tokens,
            chat_template=template,
        )

    def _extra(self) -> dict[str, Any]:
        """Our own block, which mergekit skips."""
        block, found = self.value.get("x-spolia", {}), {key: default for key, (default, _) in _EXTRA.items()}
        if not isinstance(block, dict):
            self.check.error(("x-spolia",), "`x-spolia` must be a mapping", f"known: {', '.join(_EXTRA)}")
            return found
        for key, (default, wanted) in _EXTRA.items():
            given = block.get(key, default)
            choices = ("refuse", "truncate")
            fits = type(given) is type(default) and (given in choices if default in choices else given >= 0)
            if fits:
                found[key] = given
            else:
                self.check.error(("x-spolia", key), f"`{key}` cannot be {given!r}", f"write {wanted}")
        self.check.strict = self.check.strict and found["strict"]
        self.check.keys(block, ("x-spolia",), tuple(_EXTRA))
        return found

    def _method(self) -> str | None:
        name = self.value.get("merge_method")
        if name is not None and not isinstance(name, str):
            self.check.error(("merge_method",), "`merge_method` must be a name", f"one of {', '.join(SPECS)}")
            return None
        if name in SPECS:
            return name
        if name is None:
            self._missing("merge_method", f"add one of {', '.join(SPECS)}")
        else:
            self.check.error(("merge_method",), f"no method is called `{name}`", did_you_mean(name, SPECS))
        return None

    def _missing(self, key: str, mend: str) -> None:
        """Notes that `key` is missing, unless it stands there misspelt and that has been told."""
        forms = ("models", "slices", "modules") if key == "models" else (key,)
        misspelt = {f"did you mean `{form}`?" for form in forms}
        told = (did_you_mean(word, _TOP) in misspelt for word in self.value)
        if not (self.check.strict and any(told)):
            self.check.error((), f"`{key}` is missing", mend)

    def _dtype(self, key: str) -> str | None:
        name = self.value.get(key)
        short = str(name).removeprefix("torch.")
        if name is None or short in _DTYPES:
            return _DTYPES.get(short)
        if short.startswith(("int", "uint")):
            what, mend = (
                f"`{name}`: weights merged as whole numbers lose what they hold",
                "write bfloat16, float16 or float32",
            )
        else:
            what, mend = f"no number type is called `{name}`", did_you_mean(short, _DTYPES)
        self.check.error((key,), what, mend)
        return None

    def _refer(self, value: Any, at: Place) -> ModelRef | None:
        return read_reference(value, at, self.check, self.folder)

    def _open(self, ref: ModelRef) -> Weights:
        return self.inputs.open(ref.path, ref.lora)

    def _values(self, method: str, modules: list[Module], top: Given, legacy: bool) -> tuple[Wired, Resolver]:
        """Who is merged with whom, and with which settings. Whole models need no wiring."""
        if len(modules) == 1 and modules[0].name in REST and modules[0].slices[0].whole:
            wired, row_of, names = self._whole(method, modules[0], top)
        else:
            found = Wirer(method, top, self.headers, self.check, legacy).wire(modules)
            if found is None:
                self.check.raise_if_any()
                raise AssertionError("slices that cannot be laid out have left a problem")
            wired, row_of, names = found, found.rows.__getitem__, list(found.rows)
        resolver = Resolver(method, row_of, len(wired.experts), self.marked)
        self._settle(resolver, names)
        if names and not self.check.problems.errors:
            levels = [*(s.given for m in modules for s in m.slices), *(m.given for m in modules), top]
            for given in (*levels, *(m.given for module in modules for s in module.slices for m in s.members)):
                self._gradients(given, wired.longest)
        return wired, resolver

    def _whole(self, method: str, module: Module, top: Given) -> tuple[Wired, Any, list[str]]:
        """Every tensor of the same name in all models. Positions come from the first model of the file; what its
        tensors lack is told here."""
        (slice,) = module.slices
        levels = (slice.given, module.given, top)
        cast = roles(method, slice, levels, self.check)
        opened = self.headers.of(slice.members[0])
        wired = Wired(cast.base.ref if cast.base is not None else None, [m.ref for m in cast.experts])
        places = tuple(range(len(cast.experts)))
        wired.longest = opened[1].count if opened else 0

        def row_of(tensor: str) -> Row:
            t = opened[1].position(tensor) if opened else 0.0
            return Row(cast.sources, places, (tensor,) * len(places), levels, t)

        return wired, row_of, list(opened[0].entries) if opened else []

    def _settle(self, resolver: Resolver, names: list[str]) -> None:
        """Notes values that are unset, or that make no sense together."""
        errors = self.check.problems.errors
        errors.extend(problem for problem in resolver.unset(names) if problem not in errors)
        if errors:
            return
        try:
            for name in names:
                resolver.settings_for(name)
        except SpoliaError as error:
            errors.extend(error.problems)

    def _gradients(self, given: Given, layers: int) -> None:
        for name, setting in given.settings.items():
            for entry in setting:
                count = len(entry.values)
                if count > max(1, layers):
                    what = f"the gradient of `{name}` has {count} values for {layers} layers"
                    mend = "values between two layers are never reached" if layers > 1 else "only one value is used"
                    self.check.warn(entry.at, what, mend)

    def _tokens(
        self, section: Section | None, listed: list[ModelRef], based: bool, keep: bool, donor: ModelRef
    ) -> TokenPlan | None:
        """The plan of the tokenizer section, over the base and then the models in the file's order."""
        if section is None or self.check.problems.errors:
            return None
        models = distinct(listed)
        opened = [self.headers.of(Member(ref, section.at)) for ref in models]
        weights = [found[0] for found in opened if found is not None]
        if len(weights) < len(models):
            return None
        return Tokens(section, models, based, weights, self._refer, self.check).plan(keep, donor)
