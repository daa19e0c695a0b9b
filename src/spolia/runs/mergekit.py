"""Reads mergekit's YAML recipes: same file, same numbers, every mistake found before a weight is read.

Ten methods are read (mergekit_settings.SPECS); what comes with a later release is refused by name. Where mergekit skips
an unknown key or parameter in silence, we stop (`strict: false` in an `x-spolia:` block makes that a warning).
Departures: arithmetic is fp32 throughout, so `dtype` only names the output's type where `out_dtype` does not. Two
spellings of one path are one model. Config and tokenizer come from `base_model`, else from the first model of the file.
A base without weight stays out of a `linear` merge. `bf16`, `fp16`, `fp32` and `float64` are understood too.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from spolia.catalog import find
from spolia.core.checkpoint import Checkpoint
from spolia.errors import SpoliaError, did_you_mean
from spolia.runs.mergekit_models import read_reference, read_tokenizer
from spolia.runs.mergekit_resolver import Layers, Resolver, Source
from spolia.runs.mergekit_settings import LATER, SPECS, Check, Given, read_parameters
from spolia.runs.request import MergeRequest, ModelRef
from spolia.runs.yamlmarks import Marked
from spolia.runs.yamlmarks import Path as Place

_TOP = (
    "merge_method", "models", "base_model", "parameters", "dtype", "out_dtype", "tokenizer_source", "tokenizer",
    "x-spolia",
)  # fmt: skip
_TOLERATED = ("name", "residual_weight")  # mergekit accepts them and makes no use of them in a single merge
_SIGNS = ("merge_method", "models", "slices", "modules", "base_model", "gate_mode", "tokenizer_source", "x-spolia")
_METHODS_LATER = {  # and what is nearest meanwhile
    "nuslerp": "slerp", "multislerp": "linear", "karcher": "linear", "model_stock": "linear", "nearswap": "slerp",
    "arcee_fusion": "breadcrumbs", "sce": "ties", "ram": "ties", "ramplus_tl": "ties", "passthrough": "",
}  # fmt: skip
_KEYS_LATER = {
    "slices": "list whole models under `models:`; stacking layers of several models has no substitute yet",
    "modules": "list the models under `models:`; their settings can be set apart by filters on tensor names",
    "chat_template": "remove the key and put the template into the result's tokenizer files after merging",
}
_DTYPES = {"bfloat16": "bfloat16", "float16": "float16", "float32": "float32", "float64": "float64"}
_DTYPES |= {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}


def is_mergekit(value: Any) -> bool:
    """True for a document that can only be meant for mergekit, even if its `merge_method` is missing or misspelt."""
    if not isinstance(value, dict):
        return False
    return "merge_method" in value or ("spolia" not in value and any(key in value for key in _SIGNS))


def read_mergekit(marked: Marked, *, folder: Path, strict: bool = True) -> MergeRequest:
    """The merge that a mergekit recipe asks for. Relative model paths start at `folder`, then at the current one.

    Opens the headers of the first model (for the number of layers), no weights. Raises SpoliaError with all that is
    wrong.
    """
    value = marked.value
    if not isinstance(value, dict):
        raise SpoliaError(
            "a mergekit recipe is a mapping", where=marked.where(), mend="start with `merge_method: linear`"
        )
    for key in ("gate_mode", "experts"):
        if key in value and "merge_method" not in value:
            mend = "use mergekit-moe for it; `spolia list` names what can be merged here"
            raise SpoliaError(f"a mixture-of-experts recipe (`{key}`) {LATER}", where=marked.where((key,)), mend=mend)
    return _Reader(marked, Path(folder), strict).read()


@dataclass(frozen=True)
class _Model:
    """An entry under `models`."""

    ref: ModelRef
    at: Place
    given: Given

    def same_as(self, other: ModelRef | None) -> bool:
        return other is not None and self.ref.path.resolve() == other.path.resolve()


class _Reader:
    """One pass over one file; notes everything before it raises."""

    def __init__(self, marked: Marked, folder: Path, strict: bool):
        self.value: dict[str, Any] = {key: v for key, v in marked.value.items() if v is not None}
        self.marked, self.folder = marked, folder
        self.check = Check(marked, strict)
        self.lost = False  # a model could not be read: counting them would mislead

    def read(self) -> MergeRequest:
        check, value = self.check, self.value
        extra = self._extra()
        check.keys(self.marked.value, (), _TOP, tolerated=(*_KEYS_LATER, *_TOLERATED))
        for key, mend in _KEYS_LATER.items():
            if key in value:
                check.error((key,), f"`{key}` {LATER}", mend)
        method = self._method()
        dtypes = [self._dtype(key) for key in ("out_dtype", "dtype")]
        base = self._reference(value["base_model"], ("base_model",)) if "base_model" in value else None
        models = self._models(method)
        top = read_parameters(value.get("parameters"), ("parameters",), check, method, model=False)
        known = [*([base] if base else []), *(model.ref for model in models)]
        donor = read_tokenizer(value, [] if self.lost else known, check, self.folder)
        if method is None or not models or self.lost:
            check.raise_if_any()
            raise AssertionError("a missing method or model has left a problem")
        experts = self._experts(method, base, models, top)
        resolver = self._resolver(method, models, [source for _, source in experts], top)
        check.raise_if_any()
        return MergeRequest(
            method=find(SPECS[method].method),
            experts=[ref for ref, _ in experts],
            settings_for=resolver.settings_for,
            base=None if method == "linear" else base,
            out_dtype=dtypes[0] or dtypes[1],
            donor=donor or base or models[0].ref,
            seed=extra["seed"],
            recipe=yaml.safe_dump(self.marked.value, sort_keys=False, allow_unicode=True, width=120),
            recipe_name="mergekit_config.yml",
            warnings=check.problems.warnings,
            on_size_mismatch=extra["on_size_mismatch"],
            check_tensors=resolver.check_tensors,
        )

    def _extra(self) -> dict[str, Any]:
        """Our own block, which mergekit skips: strict, on_size_mismatch, seed."""
        block, found = self.value.get("x-spolia", {}), {"strict": True, "on_size_mismatch": "refuse", "seed": 0}
        valid = {
            "strict": (lambda v: isinstance(v, bool), "true or false"),
            "on_size_mismatch": (lambda v: v in ("refuse", "truncate"), "refuse or truncate"),
            "seed": (lambda v: type(v) is int and v >= 0, "a whole number from 0 on"),
        }
        if not isinstance(block, dict):
            self.check.error(("x-spolia",), "`x-spolia` must be a mapping", f"known: {', '.join(valid)}")
            return found
        for key in valid.keys() & block.keys():
            fits, wanted = valid[key]
            if fits(block[key]):
                found[key] = block[key]
            else:
                self.check.error(("x-spolia", key), f"`{key}` cannot be {block[key]!r}", f"write {wanted}")
        self.check.strict = self.check.strict and found["strict"]
        self.check.keys(block, ("x-spolia",), tuple(valid))
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
        elif name in _METHODS_LATER:
            near = _METHODS_LATER[name]
            mend = (
                f"nearest meanwhile: `{near}`"
                if near
                else "to copy one model no merge is needed; stacking waits for `slices`"
            )
            self.check.error(("merge_method",), f"the method `{name}` {LATER}", mend)
        else:
            self.check.error(("merge_method",), f"no method is called `{name}`", did_you_mean(name, SPECS))
        return None

    def _missing(self, key: str, mend: str) -> None:
        """Notes that `key` is missing, unless it stands there misspelt and that has been told."""
        misspelt = f"did you mean `{key}`?"
        told = (did_you_mean(word, _TOP) == misspelt for word in self.value)
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

    def _models(self, method: str | None) -> list[_Model]:
        entries = self.value.get("models")
        if entries is None and ("slices" in self.value or "modules" in self.value):
            self.lost = True  # told already
            return []
        mend = "write `models:` and below it `- model: PATH`"
        if entries is None:
            self._missing("models", mend)
        elif not isinstance(entries, list) or not entries:
            self.check.error(("models",), "`models` must be a list of models", mend)
        if not isinstance(entries, list):
            return []
        models: list[_Model] = []
        for i, entry in enumerate(entries):
            at: Place = ("models", i)
            if not isinstance(entry, dict) or "model" not in entry:
                path = entry if isinstance(entry, str) else "PATH"
                self.check.error(at, "this entry names no model", f"write `- model: {path}`")
                self.lost = True
            if not isinstance(entry, dict):
                continue
            self.check.keys(entry, at, ("model", "parameters"))
            given = read_parameters(entry.get("parameters"), (*at, "parameters"), self.check, method, model=True)
            ref = self._reference(entry["model"], (*at, "model")) if "model" in entry else None
            if ref is None:
                continue
            twin = next((model for model in models if model.same_as(ref)), None)
            if twin:
                first = self.marked.lines[twin.at]
                self.check.error(at, f"`{ref.name}` is listed twice, first in line {first}", "keep one of the two")
            models.append(_Model(ref, at, given))
        return models

    def _reference(self, value: Any, at: Place) -> ModelRef | None:
        ref = read_reference(value, at, self.check, self.folder)
        self.lost = self.lost or ref is None
        return ref

    def _experts(
        self, method: str, base: ModelRef | None, models: list[_Model], top: Given
    ) -> list[tuple[ModelRef, Source]]:
        """Who is merged, in the file's order. In `linear` the base is one of them if it has a weight."""
        check, linear = self.check, method == "linear"
        experts: list[tuple[ModelRef, Source]] = []
        for model in models:
            weighted = "weight" in model.given.settings or "weight" in top.settings
            if not model.same_as(base):
                experts.append((model.ref, Source(model.ref.name, model.at, model.given)))
            elif linear and weighted:
                experts.append((model.ref, Source(model.ref.name, model.at, model.given, silent=0.0)))
            elif linear:
                check.warn(
                    model.at, f"the base `{model.ref.name}` has no weight and stays out of the merge", "give it one"
                )
            elif model.given.settings:
                names = ", ".join(f"`{name}`" for name in model.given.settings)
                check.warn(
                    model.at, f"{names} of the base changes nothing: only the other models are weighed", "remove it"
                )
        if linear and base and not any(model.same_as(base) for model in models):
            if "weight" in top.settings:
                experts.append((base, Source(base.name, ("base_model",), Given(), silent=0.0)))
            else:
                what = f"the base `{base.name}` has no weight and stays out of the merge"
                check.warn(("base_model",), what, "list it under `models:` with a weight if it should take part")
        if not linear and base is None:
            what = f"`{method}` needs a base" + (": the model at t = 0" if method == "slerp" else "")
            check.error(("merge_method",), what, "add `base_model: PATH`")
        elif not experts:
            check.error(("models",), "only the base is listed", "add a model to merge with it")
        elif method == "slerp" and len(experts) != 1:
            what = f"`slerp` takes two models, the base and one other; found {len(experts)} others"
            check.error(("models",), what, "keep one, or use `linear` for several")
        return experts

    def _resolver(self, method: str, models: list[_Model], sources: list[Source], top: Given) -> Resolver:
        """Positions come from the first model of the file; what its tensors lack is told here."""
        check, first = self.check, models[0]
        names: list[str] = []
        layers = Layers(())
        try:
            checkpoint = Checkpoint.open(first.ref.path)
            names, layers = list(checkpoint.tensors), Layers(checkpoint.tensors, checkpoint.config)
        except SpoliaError as error:
            for problem in error.problems:
                check.error((*first.at, "model"), f"{problem.where}: {problem.what}", problem.mend)
        resolver = Resolver(method, sources, top, layers, self.marked)
        check.problems.errors.extend(resolver.unset(names))
        if names and not check.problems.errors:
            try:
                for name in names:
                    resolver.settings_for(name)
            except SpoliaError as error:
                check.problems.errors.extend(error.problems)
            for given in (top, *(source.given for source in sources)):
                self._gradients(given, layers.count)
        return resolver

    def _gradients(self, given: Given, layers: int) -> None:
        for name, setting in given.settings.items():
            for entry in setting:
                count = len(entry.values)
                if count > max(1, layers):
                    what = f"the gradient of `{name}` has {count} values for {layers} layers"
                    mend = "values between two layers are never reached" if layers > 1 else "only one value is used"
                    self.check.warn(entry.at, what, mend)
