"""Taps: what named modules of any network put out while it runs, read by forward hooks and taken off again.

with tapped(model, ["layer2", "layer3"]) as read:
    logits = model(images)
    features = read()          # a tensor for each name, still in the graph
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.errors import SpoliaError, did_you_mean
from spolia.parts.sites import state_in

if TYPE_CHECKING:
    from torch import Tensor, nn


@contextmanager
def tapped(module: nn.Module, names: Sequence[str]) -> Iterator[Callable[[], tuple[Tensor, ...]]]:
    """Inside, each call of the yielded function gives the outputs of the named modules since the last one, in order.

    Of a module that returns a tuple or mapping it is the first entry. Give the network itself, not a wrapper around it.
    """
    modules = dict(module.named_modules())
    for name in names:
        if not name or name not in modules:
            known = [n for n in modules if n]
            raise SpoliaError(
                f"{type(module).__name__} has no module `{name}`", where="sites", mend=did_you_mean(name, known)
            )
    seen: dict[str, list[Any]] = {name: [] for name in names}

    def hook(name: str) -> Callable[[nn.Module, Any, Any], None]:
        return lambda _module, _inputs, output: seen[name].append(state_in(output))

    def read() -> tuple[Tensor, ...]:
        found = tuple(_one(name, states) for name, states in seen.items())
        by_name = dict(zip(seen, found, strict=True))
        for states in seen.values():
            states.clear()
        return tuple(by_name[name] for name in names)

    handles = [modules[name].register_forward_hook(hook(name)) for name in seen]
    try:
        yield read
    finally:
        for handle in handles:
            handle.remove()


def _one(name: str, states: list[Any]) -> Tensor:
    if len(states) != 1:
        what = f"module `{name}` " + (f"ran {len(states)} times" if states else "did not run")
        raise SpoliaError(what, where="sites", mend="name a module that runs once in every forward pass")
    if not torch.is_tensor(states[0]):
        what = f"module `{name}` gives a {type(states[0]).__name__}"
        raise SpoliaError(what, where="sites", mend="name a module that gives a tensor")
    return states[0]
