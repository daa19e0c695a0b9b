"""Continual learning as a function: a network and a stream go in, a learner that met it and what it knows come out."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from spolia.catalog import METHODS, Method, find
from spolia.core.journal import Journal
from spolia.core.lazy import torch
from spolia.core.settings import Settings
from spolia.errors import Problems, SpoliaError, did_you_mean
from spolia.runs.complaints import validate
from spolia.runs.continual_entries import learner_of
from spolia.runs.prompted import PROMPTED, lead_prompts, timed

if TYPE_CHECKING:
    from torch import nn

    from spolia.bench.continual import Outcome
    from spolia.methods.continual.features import Features
    from spolia.methods.continual.learner import Criterion, Factory, Meets, Show, View
    from spolia.parts.stream import Stream

VERBS = ("begin", "observe", "end", "predict")
DEFAULT = "derpp"


def continual(
    network: nn.Module | Meets,
    stream: Stream,
    *,
    method: str | None = None,
    settings: Mapping[str, Any] | Settings | None = None,
    epochs: float = 1.0,
    batch: int = 32,
    optimizer: Factory | None = None,
    criterion: Criterion | None = None,
    view: View | None = None,
    show: Show | None = None,
    features: Features | None = None,
    journal: Journal | str | os.PathLike[str] | None = None,
    seed: int = 0,
) -> tuple[Any, Outcome]:
    """Lead a copy of `network` through `stream` by `method` (derpp unless said). Returns the learner and its Outcome.

    `network` has an output for every class of the stream. In its place a learner of your own, with `begin`, `observe`,
    `end` and `predict`, is led as it is. `optimizer`, `criterion`, `view`, `show`: see `spolia.methods.continual.learner.
    Model`; `features`: of icarl. With `journal`, a folder, the same call goes on after a kill. The outcome has the
    accuracy matrix by both rules and `numbers()`. For ncm, l2p, dualprompt, coda and asp `network` is a pretrained
    transformer, which is frozen and not copied. Raises SpoliaError with what does not fit, before any step.
    """
    from spolia.bench.continual import Protocol, run

    problems = Problems()
    protocol = validate(Protocol, {"epochs": epochs, "batch": batch}, (), _place, problems)
    if not all(hasattr(stream, name) for name in ("experiences", "tests", "classes")):
        mend = "make one: spolia.parts.stream.class_incremental((x, y), (test_x, test_y), tasks=5)"
        problems.add("stream", f"a {type(stream).__name__} is no stream", mend)
    given = {"method": method, "settings": settings, "optimizer": optimizer, "criterion": criterion, "view": view}
    given |= {"show": show, "features": features}
    if all(callable(getattr(network, verb, None)) for verb in VERBS):
        for name in (name for name, value in given.items() if value is not None):
            problems.add(name, "the learner handed in has its own", f"leave `{name}` away, or give a network")
        problems.raise_if_any()
        assert protocol is not None
        return network, run(network, stream, protocol, journal, seed)  # type: ignore[arg-type]
    chosen = _method(method or DEFAULT)
    checked = _settings(chosen, settings, problems)
    if chosen.name in PROMPTED:
        if criterion is not None or features is not None:
            problems.add("criterion", f"{chosen.name} has its own loss and features", "leave both away")
        problems.raise_if_any()
        assert protocol is not None
        own = timed(checked, epochs)
        return lead_prompts(chosen.name, network, stream, own, protocol, journal, seed, view, show, optimizer)
    _check_network(network, problems)
    if features is not None and "icarl" not in (chosen.name, getattr(checked, "host", "")):
        problems.add("features", f"{chosen.name} takes the network's outputs", "leave `features` away, or take icarl")
    problems.raise_if_any()
    assert protocol is not None
    from spolia.methods.continual.learner import Model

    model = Model(copy.deepcopy(network), optimizer, criterion, view, show)  # type: ignore[arg-type]
    learner = learner_of(chosen.name, checked, model, stream, seed, features=features)
    return learner, run(learner, stream, protocol, journal, seed)


def _place(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))


def _method(name: str) -> Method:
    known = [method.name for method in METHODS if method.family == "continual" and "stream" in method.data]
    chosen = find(name, "method")
    if chosen.name not in known:
        raise SpoliaError(f"{name} is no learner of labelled streams", where="method", mend=did_you_mean(name, known))
    return chosen


def _settings(method: Method, given: Mapping[str, Any] | Settings | None, problems: Problems) -> Any:
    kind = method.settings_class()
    if isinstance(given, Settings):
        if not isinstance(given, kind):
            what = f"{type(given).__name__} are not the settings of {method.name}"
            problems.add("settings", what, f"give {kind.__name__}(…), or a mapping")
        return given
    return validate(kind, dict(given or {}), (), lambda path: _place(("settings", *path)), problems)


def _check_network(network: Any, problems: Problems) -> None:
    if not isinstance(network, torch.nn.Module):
        mend = f"give a module of torch, or a learner with {', '.join(VERBS)}"
        problems.add("network", f"a {type(network).__name__} is neither a network nor a learner", mend)
    elif not any(p.requires_grad for p in network.parameters()):
        problems.add("network", "has no parameters to train", "give a module that can be trained")
