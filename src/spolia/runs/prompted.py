"""Prompts and prototypes as a file: the doors `spolia.save_prompts` and `spolia.attach_prompts`.

The encoder is not in it. What answers do not need (heads of training, deviations) is left out.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.catalog import find
from spolia.core import tensorfile
from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.bench.continual import Outcome, Protocol
    from spolia.methods.continual.learner import Factory, Show, View
    from spolia.parts.encoder import Encoder
    from spolia.parts.stream import Stream

FORMAT = "spolia prompts 1"
PROMPTED = ("ncm", "l2p", "dualprompt", "coda", "asp")
MEND = "give a file that spolia.save_prompts wrote"


def save_prompts(learner: Any, file: str | os.PathLike[str], *, classes: Sequence[str] = ()) -> Path:
    """Write what `learner` adds to its encoder. `classes`: their names, by id. Returns the file."""
    method = getattr(learner, "method", "")
    if method not in PROMPTED:
        what = f"a {type(learner).__name__} has no prompts"
        raise SpoliaError(what, where="learner", mend=f"give a learner of {', '.join(PROMPTED)}")
    if not len(learner.prototypes) and getattr(learner.settings, "answer", "prototypes") == "prototypes":
        raise SpoliaError("has no prototypes yet", where="learner", mend="end() its first experience before")
    encoder = learner.encoder
    told = {"format": FORMAT, "method": method, "settings": learner.settings.model_dump_json()}
    told |= {"classes": json.dumps(list(classes)), "place": str(learner.count["place"])}
    told |= {"encoder": json.dumps({"width": encoder.width, "depth": encoder.depth, "mark": encoder.mark()})}
    return tensorfile.write(Path(file), _tensors(learner), told)


def attach_prompts(
    module: nn.Module | Encoder | str,
    file: str | os.PathLike[str],
    *,
    show: Show | None = None,
    view: View | None = None,
    match: bool = True,
) -> Any:
    """The learner of that file on a loaded model: `predict(x)`, `begin` and `end` for further sessions.

    `module`: an Encoder, a module, a folder or a name on the hub. `match`: its weights have to be those that the prompts
    were learned on. Raises SpoliaError for what does not fit.
    """
    from spolia.parts.encoder import Encoder
    from spolia.zoo.encoders import encoder_of

    told, tensors = tensorfile.read(file, MEND)
    if told.get("format") != FORMAT:
        raise SpoliaError("holds no prompts", where=str(file), mend=MEND)
    encoder = module if isinstance(module, Encoder) else encoder_of(module)
    _check(encoder, json.loads(told["encoder"]), str(file), match)
    method = find(told["method"], "method")
    settings = method.settings_class().model_validate_json(told["settings"])
    classes = len(tensors["prototypes.counts"])
    learner = method.function()(encoder, settings, classes=classes, show=show, view=view)
    own = {name.removeprefix("prototypes."): t for name, t in tensors.items() if name.startswith("prototypes.")}
    learner.prototypes.load_state_dict(own)
    with torch.no_grad():
        for name, tensor in _learned(learner).items():
            tensor.copy_(tensors[f"prompts.{name}"])
    if "mean" in tensors:
        learner.state["mean"] = tensors["mean"].to(encoder.device)
    learner.count["place"] = int(told["place"])
    return learner


def lead_prompts(
    method: str,
    network: Any,
    stream: Stream,
    settings: Any,
    protocol: Protocol,
    journal: Any,
    seed: int,
    view: View | None = None,
    show: Show | None = None,
    optimizer: Factory | None = None,
) -> tuple[Any, Outcome]:
    """A learner of prompts on `network`, an Encoder or a module, led through `stream`. What `spolia.continual` does."""
    from spolia.bench.continual import run
    from spolia.parts.encoder import Encoder
    from spolia.zoo.encoders import encoder_of

    encoder = network if isinstance(network, Encoder) else encoder_of(network)
    learner = learner_of(method, settings, encoder, stream, seed, view, show, optimizer)
    return learner, run(learner, stream, protocol, journal, seed)


def learner_of(
    method: str,
    settings: Any,
    encoder: Encoder,
    stream: Stream,
    seed: int,
    view: View | None = None,
    show: Show | None = None,
    optimizer: Factory | None = None,
) -> Any:
    """The learner of a method of prompts, for all of the stream's classes."""
    made, classes = find(method).function(), stream.classes
    if method == "ncm":
        return made(encoder, settings, classes=classes, seed=seed, view=view, show=show)
    if method == "asp":
        base = stream.experiences[0].train
        return made(encoder, settings, classes=classes, base=base, seed=seed, view=view, show=show, optimizer=optimizer)
    return made(encoder, settings, classes=classes, seed=seed, view=view, show=show, optimizer=optimizer)


def timed(settings: Any, epochs: float) -> Any:
    """The settings with learning rates that fall over this many epochs, unless they say how many."""
    silent = getattr(settings, "readings", 0) is None
    return settings.model_copy(update={"readings": epochs}) if silent else settings


def size_of(learner: Any) -> int:
    """Bytes of what that file holds."""
    return sum(t.numel() * t.element_size() for t in _tensors(learner).values())


def names_in(file: str | os.PathLike[str]) -> list[str]:
    """The classes' names, by id; empty where none were given."""
    told, _ = tensorfile.read(file, MEND)
    return json.loads(told.get("classes", "[]"))


def _tensors(learner: Any) -> dict[str, Tensor]:
    tensors = {f"prototypes.{name}": t for name, t in learner.prototypes.state_dict().items()}
    tensors |= {f"prompts.{name}": t for name, t in _learned(learner).items()}
    return tensors | ({"mean": learner.state["mean"]} if hasattr(learner, "state") else {})


def _learned(learner: Any) -> dict[str, Tensor]:
    """The tensors that answers need."""
    if learner.method == "ncm":
        return {}
    head = learner.settings.answer == "head"
    beside = tuple(name for name in learner.training_only if not (head and name in ("head", "scale")))
    return {name: t.detach() for name, t in learner.network.named_parameters() if not name.startswith(beside)}


def _check(encoder: Encoder, told: dict[str, Any], where: str, match: bool) -> None:
    for name in ("width", "depth"):
        if getattr(encoder, name) != told[name]:
            what = f"is for an encoder of {name} {told[name]}, this one has {getattr(encoder, name)}"
            raise SpoliaError(what, where=where, mend="give the encoder that they were learned on")
    if match and encoder.mark() != told["mark"]:
        what = "was learned on other weights of this architecture"
        raise SpoliaError(what, where=where, mend="give those weights in fp32, or match=False")
