"""Weights seen under other names, some of them left out: what files call their tensors, as a module calls them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch
from spolia.core.stream import Plane
from spolia.parts.expert import Weights

if TYPE_CHECKING:
    from torch import Tensor


class Renamed(Weights):
    """`names`: the name here of every tensor that is seen, and the one it has in `inner`. Nothing is read or copied."""

    def __init__(self, inner: Weights, names: Mapping[str, str], config: Mapping[str, Any] | None):
        super().__init__({name: inner.entries[own] for name, own in names.items()}, config)
        self.inner, self.names = inner, dict(names)
        self.checkpoint = inner.checkpoint

    def plane(self, name: str, model: str) -> Plane:
        return self.inner.plane(self.names[name], model)

    @contextmanager
    def opened(self) -> Iterator[None]:
        with self.inner.opened():
            yield


def read(weights: Weights, name: str) -> Tensor:
    """One tensor of open weights, in its own type."""
    entry = weights.entries[name]
    out = torch.empty(entry.numel, dtype=getattr(torch, entry.dtype.torch_name))
    weights.plane(name, name).read(0, entry.numel, out)
    return out.reshape(entry.shape)
