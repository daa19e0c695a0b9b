"""All tensors of a merge at once, as the methods see them that take one statistic over the whole model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from spolia.core.claims import Claims
from spolia.core.lazy import torch
from spolia.core.stream import BLOCK, Stack, in_parallel
from spolia.parts.align import Aligned
from spolia.parts.together import found, together, units_of

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.merging import Merge

PART = 32 * BLOCK  # elements of one unit of work where a tensor may be split


class WholeModel:
    """All tensors, as a survey sees them. An expert that lacks a tensor counts as unchanged there.

    With claims every sweep is a step of the shared work. All processes make the same sweeps, for each follows from
    what the ones before have found, and add up the same integers.
    """

    def __init__(self, merge: Merge, workers: int, claims: Claims | None, progress: Any):
        self._merge, self._workers, self._claims, self._progress = merge, workers, claims, progress
        self._tensors = [t for t in merge.tensors if t.arithmetic]
        self._steps = 0
        self.sizes = [sum(t.numel for t in self._tensors)] * len(merge.pool.experts)

    def dtype(self) -> torch.dtype:
        wide = any(self._merge.stack(t, (0, 0), None).dtype == torch.float64 for t in self._tensors)
        return torch.float64 if wide else torch.float32

    def sweep(self, count: Callable[[Tensor, Tensor], None], totals: Tensor) -> None:
        lock, dtype, experts = threading.Lock(), self.dtype(), len(self.sizes)

        def counted(job: tuple[Aligned, tuple[int, int]], stop: threading.Event, own: Tensor) -> None:
            tensor, span = job
            stack = self._merge.stack(tensor, span, stop)

            def padded(deltas: Tensor, own: Tensor) -> None:
                if stack.places == list(range(experts)) and deltas.dtype == dtype:
                    return count(deltas, own)
                full = torch.zeros(experts, deltas.shape[1], dtype=dtype)
                full[stack.places] = deltas.to(dtype)
                return count(full, own)

            stack.sweep(padded, own)

        def work(jobs: list[tuple[Aligned, tuple[int, int]]], stop: threading.Event) -> Tensor:
            own = torch.zeros_like(totals)
            for job in jobs:
                counted(job, stop, own)
            return own

        def add(jobs: list[tuple[Aligned, tuple[int, int]]], stop: threading.Event) -> None:
            own = work(jobs, stop)
            with lock:
                totals.add_(own)

        jobs = [(t, span) for t in self._tensors for span in self._merge.spans(t)]
        if self._claims is None:
            in_parallel([[job] for job in jobs], add, self._workers)
            return
        units = units_of(jobs, lambda job: job[1][1] - job[1][0])
        for places, numbers in self._shared(units, lambda jobs, stop: _sparse(work(jobs, stop))):
            totals.view(-1)[places] += numbers

    def each(self, function: Callable[[Stack], Any]) -> dict[str, Any]:
        results: dict[str, Any] = {}

        def work(tensor: Aligned, stop: threading.Event) -> Any:
            results[tensor.name] = function(self._merge.stack(tensor, (0, tensor.numel), stop))
            return results[tensor.name]

        tensors = sorted(self._tensors, key=lambda t: -t.numel)
        if self._claims is None:
            in_parallel(tensors, work, self._workers)
        else:
            units = units_of(tensors, lambda tensor: tensor.numel)
            answers = self._shared(units, lambda unit, stop: [work(tensor, stop) for tensor in unit])
            for unit, answer in zip(units, answers, strict=True):
                results |= {tensor.name: value for tensor, value in zip(unit, answer, strict=True)}
        return {tensor.name: results[tensor.name] for tensor in self._tensors}

    def _shared(self, units: list[Any], work: Callable[[Any, threading.Event], Any]) -> list[Any]:
        """What all processes together find in the units."""
        assert self._claims is not None
        self._steps += 1
        step = f"sweep{self._steps}"

        def told(unit: Any, others: int) -> None:
            if self._progress is not None:
                self._progress.advance(0, sweep=self._steps, others=others)

        together(self._claims, step, units, work, self._workers, told)
        return found(self._claims, step, len(units))


def _sparse(totals: Tensor) -> tuple[Tensor, Tensor]:
    """Places and values of what is not zero: most bins of a histogram of floats are empty."""
    places = totals.view(-1).nonzero().view(-1)
    return places, totals.view(-1)[places]
