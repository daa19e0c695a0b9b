"""A network whose weights are base + sum_k c_k tau_k, and the gradient of the c_k, with no graph through the models.

The merged weights are leaves: written in place, their gradients accumulate as in any training, and the coefficient of
expert k in tensor l has the gradient <dL/dtheta_l, tau_kl>, exactly, for theta is linear in it. A step reads the stack of
task vectors twice, once to add them and once to project on them.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.stream import BLOCK, Plane, in_parallel
from spolia.errors import Problems
from spolia.parts.align import Aligned, align
from spolia.parts.expert import ExpertPool
from spolia.parts.network import Network
from spolia.parts.pieces import Piece, Storage, held
from spolia.parts.preprocessed import Step
from spolia.parts.statistics import statistics_of

if TYPE_CHECKING:
    from torch import Tensor, nn

_SMALL = 1 << 20  # elements of a stack below which threads cost more than they save


@dataclass
class Combination:
    """The network of a pool, its weights set by coefficients. Made by `Combination.of`; the given network stays as it is."""

    pool: ExpertPool
    network: Network
    tensors: list[Aligned]
    tied: dict[str, str]
    pieces: list[Piece]  # in the order of `names`
    others: dict[str, Tensor]  # targets that no coefficient moves: whole numbers, statistics of normalisation layers
    reached: Tensor  # [tensors]: whether any gradient has come to it
    statistics: dict[str, Tensor] = field(default_factory=dict)  # the latter's values at present
    threads: int = 1

    @classmethod
    def of(
        cls, pool: ExpertPool, network: Network, steps: Sequence[Step] | None, storage: Storage, seed: int = 0
    ) -> Combination:
        """Reads all models once, and what is surveyed by the pool's steps and `steps`, which follow them, on top.

        Use inside `pool.opened()`.
        """
        pool = replace(pool, steps=(*pool.steps, *(steps or ())))
        aligned, tied = fitted(pool, network)
        network = replace(network, module=copy.deepcopy(network.module).requires_grad_(False))
        targets = _targets(network.module)
        running = statistics_of(network.module)
        combined = [t for t in aligned if t.arithmetic and t.name not in running]
        threads = torch.get_num_threads()
        pieces = held(pool, combined, targets, storage, seed, threads)
        others = {t.name: targets[t.name] for t in aligned if not t.arithmetic or t.name in running}
        reached = torch.zeros(len(pieces), dtype=torch.bool)
        made = cls(pool, network, aligned, tied, pieces, others, reached, threads=threads)
        for piece in pieces:
            if piece.target.is_floating_point() and isinstance(piece.target, torch.nn.Parameter):
                piece.target.requires_grad_(True)
        made.show(0)
        made.average_statistics()
        return made

    @property
    def names(self) -> list[str]:
        """Tensors that coefficients move, in natural order."""
        return [piece.name for piece in self.pieces]

    def write(self, factors: Tensor) -> None:
        """Set the weights: factors [tensors, experts]."""
        self._each(lambda i, start, stop: self.pieces[i].write(start, stop, factors[i]))
        for name, value in self.statistics.items():
            self.others[name].copy_(value)

    def projected(self) -> Tensor:
        """Gradient of the factors from what has accumulated in the weights, which is cleared: [tensors, experts], fp64."""
        experts = len(self.pool.experts)
        parts: dict[tuple[int, int], Tensor] = {}

        def project(i: int, start: int, stop: int) -> None:
            if self.pieces[i].target.grad is not None:
                parts[i, start] = self.pieces[i].project(start, stop, experts)

        self._each(project)
        total = torch.zeros(len(self.pieces), experts, dtype=torch.float64)
        for (i, _), part in sorted(parts.items(), key=lambda item: item[0]):  # in one order, whatever the threads
            total[i] += part
        for i, piece in enumerate(self.pieces):
            self.reached[i] |= piece.target.grad is not None
            piece.target.grad = None
        return total

    def show(self, model: int) -> None:
        """Set every weight to that of `pool.models[model]`; with a base, 0 is the base and k + 1 expert k."""
        for tensor in self.tensors:
            where = next((end for end in tensor.ends if end[0] == model), tensor.ends[0])
            _load(self._plane(where), self._target(tensor.name))

    def average_statistics(self) -> None:
        """Running statistics as the mean of the experts'."""
        running = statistics_of(self.network.module)
        for tensor in self.tensors:
            if tensor.name in running and tensor.arithmetic:
                each = torch.empty(len(tensor.experts), tensor.numel, dtype=torch.float64)
                for row, where in zip(each, tensor.experts, strict=True):
                    self._plane(where).read(0, tensor.numel, row)
                self.statistics[tensor.name] = each.mean(0).view(tensor.shape)

    def restate(self, statistics: dict[str, Tensor]) -> None:
        """Put running statistics in place of those at present."""
        self.statistics.update(statistics)
        for name, value in statistics.items():
            self.others[name].copy_(value)

    @property
    def unreached(self) -> list[str]:
        """Tensors that no gradient has come to so far: their coefficients stay at the start."""
        return [piece.name for i, piece in enumerate(self.pieces) if not self.reached[i]]

    def weights(self) -> dict[str, Tensor]:
        """The weights at present, in their stored types, by the first model's names and in its order."""
        found = {t.name: self._target(t.name) for t in self.tensors}
        kinds = {t.name: getattr(torch, t.stored.torch_name) for t in self.tensors}
        made = {name: value.detach().to(kinds[name], copy=True).cpu() for name, value in found.items()}
        made |= {alias: made[name] for alias, name in self.tied.items()}
        order = self.pool.models[0].weights.entries
        return {n: made[n] for n in [*(n for n in order if n in made), *(n for n in made if n not in order)]}

    def _plane(self, where: tuple[int, str]) -> Plane:
        model = self.pool.models[where[0]]
        return model.weights.plane(where[1], model.name)

    def _target(self, name: str) -> Tensor:
        return self.others[name] if name in self.others else next(p.target for p in self.pieces if p.name == name)

    def _each(self, work: Callable[[int, int, int], None]) -> None:
        """`work(piece, start, stop)` for all elements, in chunks on several threads where that pays."""
        sizes = [len(piece.base) for piece in self.pieces]
        chunked = self.threads > 1 and sum(sizes) > _SMALL and all(p.base.device.type == "cpu" for p in self.pieces)
        jobs = [
            (i, start, min(start + step, size))
            for i, size in enumerate(sizes)
            for step in [BLOCK if self.pieces[i].rows is not None and size > BLOCK and self._host(i) else max(size, 1)]
            for start in range(0, size, step)
        ]
        if chunked:
            in_parallel(jobs, lambda job, stop: work(*job), self.threads)
        else:
            for job in jobs:
                work(*job)

    def _host(self, i: int) -> bool:
        return self.pieces[i].base.device.type == "cpu"


def fitted(pool: ExpertPool, network: Network) -> tuple[list[Aligned], dict[str, str]]:
    """The pool's tensors, and those tied to others. SpoliaError where they are not the network's, before any is read."""
    problems = Problems()
    aligned, tied = align(pool, problems)
    problems.raise_if_any()
    own = network.module.state_dict(keep_vars=True)
    known = {t.name for t in aligned} | set(tied)
    mend = "give a network of the experts' own architecture, and the experts as modules where loading renames tensors"
    held = {id(own[name]) for name in known & own.keys()}  # files may hold what the module ties under one of its names
    lacking = {name for name in own.keys() - known if id(own[name]) not in held}
    for names, who in ((lacking, "the experts lack"), (known - own.keys(), "the module lacks")):
        if names:
            first = sorted(names)[0]
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            problems.add("network", f"{who} tensor `{first}`{more}", mend)
    for tensor in aligned:
        if tensor.name in own and tuple(own[tensor.name].shape) != tensor.shape:
            shapes = f"{list(own[tensor.name].shape)} in the module, {list(tensor.shape)} in the experts"
            problems.add("network", f"tensor `{tensor.name}` is {shapes}", mend)
    problems.raise_if_any()
    seen: dict[int, str] = {}
    for tensor in aligned:  # the module ties what the files hold twice
        first = seen.setdefault(id(own[tensor.name]), tensor.name)
        if first != tensor.name:
            tied[tensor.name] = first
    return [t for t in aligned if t.name not in tied], tied


def _targets(module: nn.Module) -> dict[str, Tensor]:
    for parameter in module.parameters():
        parameter.data = parameter.data.contiguous()  # a flat view of it is written to
        parameter.grad = None
    return dict(module.state_dict(keep_vars=True))


def _load(plane: Plane, target: Tensor) -> None:
    read = torch.empty(target.numel(), dtype=getattr(torch, plane.dtype.torch_name))
    plane.read(0, len(read), read)
    target.detach().copy_(read.view(target.shape))
