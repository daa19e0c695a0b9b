"""What `spolia serve` is given, as experts: digits trained on the spot, or a folder with an image classifier."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core.checkpoint import read_config, read_tensors
from spolia.core.files import read_json
from spolia.core.lazy import torch
from spolia.errors import SpoliaError
from spolia.parts.api_answers import Answering, Contract
from spolia.parts.network import outputs_of
from spolia.runs import serve as serving
from spolia.runs.serve_requests import Served

if TYPE_CHECKING:
    from torch import Tensor, nn

_DIGITS = re.compile(r"digits:([0-9]{2,10})(?:/(mlp|conv))?")
_KNOWN = "digits:01, or a folder with config.json and safetensors"
_SHAPE = (1, 8, 8)  # of a digit


def serve(
    experts: Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    answers: Answering = "probabilities",
    top: int = 1,
    decimals: int | None = None,
    most: int = 256,
    token: str | None = None,
    seed: int = 0,
    ready: Callable[[str, list[Served]], None] | None = None,
) -> None:
    """Serve experts (`digits:01`, a folder of transformers, or NAME=either) over HTTP until interrupted.

    By the Open Inference Protocol, to requests that bear `token` where one is given. `answers`: logits, probabilities, top
    or label; `most` inputs a request; `ready` is told the address and what is served there.
    """
    serving.check_installed()
    how: dict[str, Any] = {"answers": answers, "top": top, "decimals": decimals, "most": most, "seed": seed}
    opened = [open_expert(given, **how) for given in experts]
    told = ready or (lambda url, _: print(url, flush=True))
    serving.serve(serving.application(opened, token=token), host, port, lambda url: told(url, opened))


def open_expert(
    given: str,
    *,
    answers: Answering = "probabilities",
    top: int = 1,
    decimals: int | None = None,
    most: int = 256,
    seed: int = 0,
) -> Served:
    """`[NAME=]EXPERT`: `digits:CLASSES[/conv]`, or a folder of transformers with an image classifier."""
    named, equals, what = given.rpartition("=")
    how: dict[str, Any] = {"answers": answers, "most": most, "resolution": 10.0**-decimals if decimals else 0.0}
    match = _DIGITS.fullmatch(what)
    if match is not None:
        return _digits(named if equals else what, match[1], match[2] or "mlp", how | {"top": top}, seed)
    if what.startswith("digits:"):
        mend = "write digits:01, or digits:2345/conv"
        raise SpoliaError("names no expert of digits", where=what, mend=mend)
    if not Path(what).is_dir():
        raise SpoliaError("is neither a folder nor an expert of digits", where=what, mend=f"give {_KNOWN}")
    path = Path(what)
    return _folder(named if equals else path.resolve().name, path, how | {"top": top})


def _digits(name: str, digits: str, kind: str, how: dict[str, Any], seed: int) -> Served:
    from spolia.runs.apis_experts import digit_expert
    from spolia.runs.digits_pool import one_thread

    if len(set(digits)) < len(digits):
        raise SpoliaError("names a digit twice", where=name, mend="write digits:01")
    with one_thread():
        trained = digit_expert([int(digit) for digit in digits], kind, seed)
    return Served(name, trained.logits, Contract(tuple(digits), _SHAPE, **how))


def _folder(name: str, path: Path, how: dict[str, Any]) -> Served:
    """An image classifier of transformers: classes, size and normalisation from its own files; inputs run from 0 to 1."""
    from spolia.zoo.hf import build

    config = read_config(path)
    if config is None:
        raise SpoliaError(
            "has no config.json, so its architecture is not known", where=str(path), mend=f"give {_KNOWN}"
        )
    labels, size = config.get("id2label"), config.get("image_size")
    if not isinstance(labels, dict) or not isinstance(size, int):
        what = "its config.json names no classes (id2label) or no image_size"
        raise SpoliaError(
            what, where=str(path), mend="serve an image classifier, or call spolia.runs.serve with a function"
        )
    module = _loaded(build(config, name), path)
    classes = tuple(str(labels[key]) for key in sorted(labels, key=int))
    channels = config.get("num_channels", 3)
    scale = _normalised(path, channels)

    def logits(x: Tensor) -> Tensor:
        return outputs_of(module, scale(x))

    return Served(name, logits, Contract(classes, (channels, size, size), **how))


def _loaded(module: nn.Module, path: Path) -> nn.Module:
    from spolia.zoo.hf import module_names

    tensors = read_tensors(path)
    names = module_names(module, tensors) or {name: name for name in tensors}  # as this release calls them
    state = {name: tensors[given].float() for name, given in names.items()}
    missing = module.load_state_dict(state, strict=False).missing_keys
    if missing:
        what = f"lacks tensor `{missing[0]}`" + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
        raise SpoliaError(what, where=str(path), mend="save it with save_pretrained")
    return module.eval().requires_grad_(False)


def _normalised(path: Path, channels: int) -> Any:
    """What its preprocessor does to numbers in 0 … 1."""
    file = path / "preprocessor_config.json"
    told = read_json(file, "restore it, or delete it") if file.exists() else {}
    told = told if isinstance(told, Mapping) and told.get("do_normalize", True) else {}
    mean, deviation = (told.get(name) for name in ("image_mean", "image_std"))
    if not (isinstance(mean, list) and isinstance(deviation, list) and len(mean) == len(deviation) == channels):
        return lambda x: x
    shift, scale = (torch.tensor(values).view(1, channels, 1, 1) for values in (mean, deviation))
    return lambda x: (x - shift) / scale
