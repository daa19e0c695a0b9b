"""A stage: one copy of a network on which the models of a pool are shown one after the other, and the merge at the end.

For merges that run the experts but learn no coefficients: one expert is in memory at a time, beside what is being merged.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from spolia.core.dist import world
from spolia.core.lazy import np, torch
from spolia.errors import SpoliaError
from spolia.parts.align import Aligned
from spolia.parts.combination import fitted
from spolia.parts.examples import Examples
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network
from spolia.parts.statistics import reestimated

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Drawn:
    """The inputs of one task that are looked at, in the order drawn."""

    examples: Examples
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def batches(self, size: int) -> Iterator[tuple[np.ndarray, Any]]:
        """Places and inputs of this process's share, `size` at a time."""
        rank, ranks = world()
        mine = self.places[rank::ranks]
        for start in range(0, len(mine), size):
            yield mine[start : start + size], self.examples.batch(mine[start : start + size])


def drawn(given: Mapping[str, Examples], count: int, seed: int) -> dict[str, Drawn]:
    """`count` inputs of each task at random, or all where there are fewer: the first ones may be of one class."""
    return {task: Drawn(examples, examples.drawn(count, seed, 0)) for task, examples in given.items()}


@dataclass
class Stage:
    """The network with whichever weights are shown on it. Made by `Stage.of`; the given network stays as it is.

    Merged weights are a mapping from the names of `tensors` to tensors of their shapes, in the arithmetic's type.
    """

    pool: ExpertPool
    network: Network
    tensors: list[Aligned]
    tied: dict[str, str]
    own: dict[str, Tensor]  # the copy's parameters and buffers by name

    @classmethod
    def of(cls, pool: ExpertPool, network: Network) -> Stage:
        """SpoliaError where the experts' tensors are not the network's. Nothing is read yet."""
        aligned, tied = fitted(pool, network)
        network = replace(network, module=copy.deepcopy(network.module).requires_grad_(False))
        return cls(pool, network, aligned, tied, dict(network.module.state_dict(keep_vars=True)))

    @property
    def arithmetic(self) -> list[Aligned]:
        """The tensors that are merged, in natural order; the others are copied."""
        return [tensor for tensor in self.tensors if tensor.arithmetic]

    def copy_of(self, tensor: Aligned, expert: int) -> Tensor | None:
        """An expert's copy in the arithmetic's type; None where it has no such tensor. Use inside `pool.opened()`."""
        if expert not in tensor.places:
            return None
        return self._read(tensor, tensor.experts[tensor.places.index(expert)])

    def show(self, expert: int) -> None:
        """Set all weights to an expert's; what it lacks comes from the first model that has it."""
        for tensor in self.tensors:
            found = self.copy_of(tensor, expert)
            self._write(tensor.name, self._read(tensor, tensor.ends[0]) if found is None else found)

    def put(self, merged: Mapping[str, Tensor]) -> None:
        """Set all weights to merged ones."""
        for name, value in merged.items():
            self._write(name, value)

    def mean(self, weights: Sequence[float]) -> dict[str, Tensor]:
        """The experts' weighted mean; whole numbers and what no two models share as the first model has them."""
        return {tensor.name: self._mean(tensor, weights) for tensor in self.tensors}

    def restate(self, merged: dict[str, Tensor], inputs: Mapping[str, Drawn], batch: int) -> None:
        """Running statistics of `merged` found anew on the inputs; nothing to do in a network without any."""
        self.put(merged)
        found = reestimated(self.network, (x for part in inputs.values() for _, x in part.batches(max(batch, 2))))
        merged.update({name: value for name, value in found.items() if name in merged})

    def weights(self, merged: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Merged weights in their stored types, by the first model's names and in its order."""
        kinds = {tensor.name: getattr(torch, tensor.stored.torch_name) for tensor in self.tensors}
        made = {name: value.to(kinds[name]).cpu() for name, value in merged.items()}
        made |= {alias: made[name] for alias, name in self.tied.items()}
        order = self.pool.models[0].weights.entries
        return {n: made[n] for n in [*(n for n in order if n in made), *(n for n in made if n not in order)]}

    def _mean(self, tensor: Aligned, weights: Sequence[float]) -> Tensor:
        if not tensor.arithmetic:
            return self._read(tensor, tensor.ends[0])
        total, mean = 0.0, torch.zeros(tensor.shape, dtype=torch.float64 if tensor.wide else torch.float32)
        for where, place in zip(tensor.experts, tensor.places, strict=True):
            total += weights[place]
            mean.lerp_(self._read(tensor, where), weights[place] / total if total else 0.0)
        if not total:
            what = f"the weights of the experts that have `{tensor.name}` sum to zero"
            raise SpoliaError(what, where="settings.weight", mend="change a weight")
        return mean

    def _read(self, tensor: Aligned, where: tuple[int, str]) -> Tensor:
        model = self.pool.models[where[0]]
        plane = model.weights.plane(where[1], model.name)
        kind = getattr(torch, plane.dtype.torch_name)
        if tensor.arithmetic:
            kind = torch.float64 if tensor.wide else torch.float32
        flat = torch.empty(tensor.numel, dtype=kind)
        plane.read(0, tensor.numel, flat)
        if tensor.arithmetic and not bool(torch.isfinite(flat.sum())) and not bool(torch.isfinite(flat).all()):
            mend = "this expert is broken: leave it out or get a sound copy"
            raise SpoliaError(f"tensor `{tensor.name}` holds NaN or Inf", where=model.name, mend=mend)
        return flat.view(tensor.shape)

    def _write(self, name: str, value: Tensor) -> None:
        self.own[name].detach().copy_(value)
