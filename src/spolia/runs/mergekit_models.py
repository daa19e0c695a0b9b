"""Which folders a mergekit recipe names: model references."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Any

from spolia.data.hub import fetch
from spolia.errors import SpoliaError
from spolia.parts.adapter import Adapter, is_adapter
from spolia.parts.inputs import base_of
from spolia.runs.mergekit_settings import Check
from spolia.runs.references import is_hub_id, names_in
from spolia.runs.request import ModelRef
from spolia.runs.yamlmarks import Path as Place


def read_reference(value: Any, at: Place, check: Check, folder: Path) -> ModelRef | None:
    """`MODEL`, `MODEL+ADAPTER`, or mergekit's mapping `{model: {path, revision}, lora, override_architecture}`.

    A model is a path or a hub's id (`owner/name@revision`, fetched here). None: error told.
    """
    lora, lora_at = None, (*at, "lora")
    if isinstance(value, dict):
        check.keys(value, at, ("model", "lora", "override_architecture"))
        lora = value.get("lora")
        if value.get("override_architecture"):
            what = "`override_architecture` changes nothing: tensors are matched by name"
            check.warn((*at, "override_architecture"), what, "remove it")
        value, at = value.get("model"), (*at, "model")
    elif isinstance(value, str) and "+" in value and _local(value, folder) is None:
        if value.count("+") > 1:
            check.error(at, f"`{value}` has more than one `+`", "write MODEL+ADAPTER: one adapter on one model")
            return None
        value, _, lora = value.partition("+")
        lora_at = at
    model = _place(value, at, check, folder)
    if lora is None:
        return _alone(*model, at, check, folder) if model else None
    adapter = _place(lora, lora_at, check, folder)
    if model is None or adapter is None:
        return None
    if not is_adapter(adapter[1]):
        check.error(
            lora_at, f"`{adapter[0]}` is no LoRA adapter", "name a folder with adapter_config.json after the `+`"
        )
        return None
    return ModelRef(f"{model[0]}+{adapter[0]}", model[1], adapter[1])


def _place(value: Any, at: Place, check: Check, folder: Path) -> tuple[str, Path] | None:
    """A path or hub id as it is written, and the folder or file it means."""
    revision = None
    if isinstance(value, dict):
        check.keys(value, at, ("path", "revision"))
        revision = value.get("revision")
        value, at = value.get("path"), (*at, "path")
    if not isinstance(value, str) or not value:
        check.error(
            at, f"expected the path of a model, found {value!r}", "write the path of its folder, in quotes if need be"
        )
        return None
    path = check.named.get(value) or _local(value, folder)
    if path is not None:
        if revision:
            check.warn((*at[:-1], "revision"), "a folder on disk has no revision; ignored", "remove it")
        return value, path
    asked = f"{value}@{revision}" if revision else value
    wrong = _not_here(value, folder)
    if wrong is None:
        try:
            return asked, fetch(asked)
        except SpoliaError as error:
            wrong = error.problems[0].what, error.problems[0].mend
    check.error(at, *wrong)
    return None


def _alone(name: str, path: Path, at: Place, check: Check, folder: Path) -> ModelRef | None:
    """A model as it is; an adapter alone stands on `base_model`, else on the base that its config names."""
    if not is_adapter(path):
        return ModelRef(name, path)
    given = check.doc.value.get("base_model")
    if given is not None and at[:1] != ("base_model",):
        base = read_reference(given, ("base_model",), check, folder)
        if base is not None and base.lora is not None:
            check.error(at, f"`{name}` is an adapter, and so is its base {base.name}", "write MODEL+ADAPTER")
        return ModelRef(name, base.path, path) if base is not None and base.lora is None else None
    try:
        return ModelRef(name, base_of(Adapter.open(path)), path)
    except SpoliaError as error:
        check.error(at, f"`{name}` {error.problems[0].what}", error.problems[0].mend)
        return None


def _local(text: str, folder: Path) -> Path | None:
    """The existing path meant by `text`, even if it holds `+` or `@`: from `folder` on, else from the current one."""
    path = Path.home() / text[2:] if text.startswith("~/") else Path(text)
    found = (root / path for root in (folder, Path.cwd()) if os.path.exists(root / path))
    return next((path.absolute() for path in found), None)


def _not_here(text: str, folder: Path) -> tuple[str, str] | None:
    """What is wrong with a reference that is no path, and the cure. None: it may be a model of the hub."""
    plain = text.partition("@")[0]
    beside = names_in(folder / Path(plain).parent, Path.is_dir)
    near = difflib.get_close_matches(Path(plain).name, beside, 1, 0.6)
    if near:
        return f"there is no model at `{text}`", f"did you mean `{Path(plain).with_name(near[0])}`?"
    if is_hub_id(text, [folder]):
        return None
    return f"there is no model at `{text}`", "write the path of a folder; a model of the hub is written OWNER/NAME"
