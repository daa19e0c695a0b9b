"""Whatever stands on disk, as Weights: safetensors, pickled state dicts, and LoRA adapters on their base."""

from __future__ import annotations

import os
from pathlib import Path

from spolia.core.files import is_folder
from spolia.core.pickled import has_pickles
from spolia.errors import SpoliaError
from spolia.parts.adapter import UNLOAD, Adapter, is_adapter
from spolia.parts.expert import FileWeights, PickledWeights, Weights
from spolia.parts.lora import LoraWeights


class Inputs:
    """Opens models, each folder once, so that several adapters share the base they stand on."""

    def __init__(self) -> None:
        self._opened: dict[Path, Weights] = {}

    def open(self, path: str | os.PathLike[str], lora: Path | None = None, base: Weights | None = None) -> Weights:
        """The model at `path`, with the adapter `lora` on it if given. An adapter folder stands on `base`, the pool's,
        else on the base that its config names. Raises SpoliaError.
        """
        path = Path(path)
        if lora is not None:
            if is_adapter(path):
                what, mend = "is an adapter itself", "name the whole model before the `+`"
                raise SpoliaError(what, where=str(path), mend=mend)
            return LoraWeights(self.open(path), Adapter.open(lora))
        if is_adapter(path):
            adapter = Adapter.open(path)
            return LoraWeights(base if base is not None else self.open(base_of(adapter)), adapter)
        place = Path(os.path.abspath(path))
        if place not in self._opened:
            self._opened[place] = open_plain(path)
        return self._opened[place]


def open_plain(path: Path) -> Weights:
    """A whole model: safetensors where there are any, else a pickled state dict."""
    pickled = path.suffix != ".safetensors" and _exists(path) and has_pickles(path)
    beside = path.glob("*.safetensors") if pickled and is_folder(path) else ()
    if pickled and all(file.name.startswith(("adapter_model", "consolidated")) for file in beside):
        return PickledWeights(path)
    return FileWeights.open(path)


def base_of(adapter: Adapter) -> Path:
    """The base that the adapter's config names, if it is a model on this disk."""
    for folder in (Path.cwd(), adapter.path):
        if adapter.base is not None and _exists(path := folder / Path(adapter.base).expanduser()):
            if is_adapter(path):
                what = f"its base {adapter.base} is an adapter too"
                raise SpoliaError(what, where=str(adapter.path), mend=UNLOAD)
            return path
    named = f"its config names `{adapter.base}`, which is not on this disk" if adapter.base else "its config names none"
    raise SpoliaError(
        f"is a LoRA adapter, and its base is not known: {named}",
        where=str(adapter.path),
        mend="give the base: `base=...`, or `BASE+ADAPTER` in the adapter's place",
    )


def parted(text: str | os.PathLike[str]) -> tuple[Path, Path | None]:
    """`BASE+ADAPTER` as two paths. A path that exists is one, whatever is in its name."""
    text = os.fspath(text)
    if text.count("+") != 1 or _exists(Path(text)):
        return Path(text), None
    base, _, lora = text.partition("+")
    return (Path(base), Path(lora)) if base and lora else (Path(text), None)


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):  # a name the system cannot hold
        return False
