"""Second moments of what linear layers are given: X^T X over inputs without labels, through forward hooks.

Layers that are handed one and the same tensor, as query, key and value are, share one Gram matrix. Tokens that a batch's
attention mask leaves out do not count.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from spolia.core.dist import summed
from spolia.core.lazy import torch
from spolia.errors import SpoliaError
from spolia.parts.network import Network

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor, nn

    Note = Callable[[int, Tensor], None]  # (place of the layer, what it is given)


@dataclass(frozen=True)
class Linear:
    """A linear layer: its module, its weight's name, and its numbers of inputs and outputs."""

    module: str
    weight: str
    inputs: int
    outputs: int
    turned: bool = False  # the weight is [in, out], as Hugging Face's Conv1D has it

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight as [in, out], or back."""
        return weight if self.turned else weight.t()


@dataclass(frozen=True)
class Fed:
    """Layers that are given the same tensor, `calls` times in a forward pass."""

    layers: tuple[Linear, ...]
    calls: int

    @property
    def width(self) -> int:
        return self.layers[0].inputs


def linear_layers(network: Network, names: Sequence[str], pattern: str) -> list[Linear]:
    """Linear layers whose module's name `pattern` finds and whose weight is one of `names`, in the module's order.

    A weight that something other than a linear layer uses too, such as an input embedding, is left out. SpoliaError where
    none is left.
    """
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in network.module.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, module))
    own = network.module.state_dict(keep_vars=True)
    found = []
    for name in names:
        users = owners.get(id(own[name]), [])
        if users and all(_is_linear(module) and module.weight is own[name] for _, module in users):
            first, module = users[0]
            turned = not isinstance(module, torch.nn.Linear)
            inputs, outputs = own[name].shape if turned else own[name].shape[::-1]
            found.append(Linear(first, name, inputs, outputs, turned))
    chosen = [layer for layer in found if re.search(pattern, layer.module)]
    if not found:
        mend = "merge with a method that needs none, such as fisher"
        raise SpoliaError("it has no linear layer", where="network", mend=mend)
    if not chosen:
        known = ", ".join(layer.module for layer in found[:8])
        raise SpoliaError(f"no linear layer's name holds `{pattern}`", where="settings.layers", mend=f"known: {known}")
    return chosen


def fed_together(network: Network, layers: Sequence[Linear], batches: Iterable[Any]) -> list[Fed]:
    """The layers in the order in which they run on any of `batches`, those with the same input together."""
    found: dict[int, Fed] = {}
    for batch in batches:
        seen: dict[int, list[Tensor]] = {}  # the tensors stay, so that none takes another's identity
        with torch.no_grad(), listening(network, layers, lambda i, x, seen=seen: seen.setdefault(i, []).append(x)):
            network.features(batch)
        together: dict[tuple[int, ...], list[int]] = {}
        for i, given in seen.items():
            together.setdefault(tuple(map(id, given)), []).append(i)
        for group in together.values():
            if new := [i for i in group if not any(layers[i] in fed.layers for fed in found.values())]:
                found[new[0]] = Fed(tuple(layers[i] for i in new), len(seen[new[0]]))
    return list(found.values())


def grams(network: Network, fed: Sequence[Fed], batches: Iterable[Any], stop_early: bool = False) -> list[Tensor]:
    """X^T X / n over all rows that the layers are given: fp64 [in, in] each, zero where none comes.

    `stop_early` ends each forward pass once all have been given theirs.
    """
    device = next((p.device for p in network.module.parameters()), torch.device("cpu"))
    place = torch.device("cpu") if device.type == "mps" else device  # it has no fp64
    totals = [torch.zeros(one.width, one.width, dtype=torch.float64, device=place) for one in fed]
    counts = torch.zeros(len(fed), dtype=torch.float64)
    for batch in batches:
        left = sum(one.calls for one in fed)
        mask = _mask(batch)

        def note(i: int, x: Tensor, mask: Tensor | None = mask) -> None:
            nonlocal left
            rows = rows_of(x, mask).to(place).double()
            totals[i].addmm_(rows.t(), rows)
            counts[i] += len(rows)
            left -= 1
            if stop_early and left == 0:
                raise _Enough

        with torch.no_grad(), listening(network, [one.layers[0] for one in fed], note), suppress(_Enough):
            network.features(batch)
    summed(counts)
    return [summed(total.cpu()).div_(max(float(n), 1.0)) for total, n in zip(totals, counts, strict=True)]


def rows_of(x: Tensor, mask: Tensor | None) -> Tensor:
    """What a layer is given as rows [n, in]; of tokens those that `mask` [inputs, tokens] counts, if it is about them."""
    if mask is not None and x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    if mask is not None and x.dim() == 2 and len(x) == mask.numel():
        return x[mask.reshape(-1).to(x.device)]
    return x.reshape(-1, x.shape[-1])


@contextmanager
def listening(network: Network, layers: Sequence[Linear], note: Note) -> Iterator[None]:
    """Inside, `note` is told what each layer is given whenever it runs."""

    def hook(i: int) -> Callable[..., None]:
        def told(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
            note(i, given[0] if given else next(iter(named.values())))

        return told

    modules = [network.module.get_submodule(layer.module) for layer in layers]
    handles = [m.register_forward_pre_hook(hook(i), with_kwargs=True) for i, m in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def check_sound(gram: Tensor, layer: Linear, task: str) -> None:
    """SpoliaError where what the layer was given is not finite."""
    if not bool(torch.isfinite(gram).all()):
        mend = "look at the inputs of that task, and at its expert's outputs on them"
        raise SpoliaError(f"layer `{layer.module}` is given NaN or Inf", where=f"unlabelled.{task}", mend=mend)


class _Enough(Exception):
    """What was wanted of a forward pass has been seen."""


def _is_linear(module: nn.Module) -> bool:
    """torch's linear layer, or Hugging Face's Conv1D, which is one."""
    return isinstance(module, torch.nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _mask(batch: Any) -> Tensor | None:
    """The batch's attention mask [inputs, tokens], where it has one."""
    mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
    return mask.bool() if torch.is_tensor(mask) and mask.dim() == 2 else None
