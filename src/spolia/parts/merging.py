"""A merge as work for several threads: tensors in parts, read, merged, checked, cast once and handed to a sink."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from spolia.core.checkpoint import Dtype
from spolia.core.claims import Claims
from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, narrowed
from spolia.core.stream import BLOCK, WIDE_BLOCK, Stack, Stopped, in_parallel, worker_bytes
from spolia.errors import SpoliaError
from spolia.parts.align import Aligned
from spolia.parts.expert import ExpertPool
from spolia.parts.preprocessed import Changed, Step
from spolia.parts.surveyed import PART, WholeModel
from spolia.parts.together import together, units_of

if TYPE_CHECKING:
    from torch import Tensor

SettingsFor = Callable[[str], MergeSettings]
Rule = Callable[..., Iterator[tuple[Any, "Tensor"]]]


class Sink(Protocol):
    """Where merged elements go; called from several threads, each element once."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Elements start: of tensor `name`, in their final type."""
        ...

    def done(self, part: str) -> None:
        """The thread has written all of `part`, and of what came before it since its last call."""
        ...


@dataclass(frozen=True)
class Part:
    """Elements start:stop of tensor number `index`."""

    index: int
    start: int
    stop: int

    @property
    def key(self) -> str:
        return f"{self.index}:{self.start}"


@dataclass
class Merge:
    """Everything a merge needs once the models are known to fit. Use inside `pool.opened()`."""

    pool: ExpertPool
    tensors: Sequence[Aligned]
    rule: Rule
    survey: Callable[..., Any] | None
    settings_for: SettingsFor
    dtypes: dict[str, Dtype]  # output type by name
    seed: int = 0
    threads: int = 1
    memory: int = 1_000_000_000  # bytes for blocks and what methods keep between sweeps
    allow_nonfinite: bool = False
    found: list[Any] = field(default_factory=list)  # by the pool's steps, as far as they are surveyed

    def settings(self, tensor: Aligned) -> MergeSettings:
        """The tensor's settings, per-model fields reduced to the experts that have it, in its order."""
        settings = self.settings_for(tensor.name)
        everyone = tensor.places == tuple(range(len(self.pool.experts)))
        return settings if everyone else narrowed(settings, tensor.places)

    def parts(self) -> list[Part]:
        """Units of work, largest first; the same list for the same request."""
        parts = []
        for index, tensor in enumerate(self.tensors):
            split = not tensor.arithmetic or self.settings(tensor).elementwise
            spans = self.spans(tensor) if split else [(0, tensor.numel)]
            parts += [Part(index, start, stop) for start, stop in spans if stop > start]
        return sorted(parts, key=lambda part: part.stop - part.start, reverse=True)

    def spans(self, tensor: Aligned) -> list[tuple[int, int]]:
        """The tensor in pieces of work; in one where a step of the pool wants it whole."""
        split = all(step.settings.elementwise for step in self.pool.steps)
        size = PART if split else max(tensor.numel, 1)
        return [(start, min(start + size, tensor.numel)) for start in range(0, tensor.numel, size)]

    def workers(self) -> int:
        """Threads that fit the memory. SpoliaError when not even one does."""
        count, steps = len(self.pool.experts), self.pool.steps
        return affordable_workers(self.tensors, count, self.threads, self.memory, self.settings_for, steps)

    def run(self, sink: Sink, done: Collection[str] = (), progress: Any = None, claims: Claims | None = None) -> None:
        """Merge every part not in `done`, or with `claims` those that no other process merges, until all are merged.

        Raises what the first failing worker raised.
        """
        torch.get_num_threads()  # load torch before the threads start
        parts = [part for part in self.parts() if part.key not in done]
        workers = self.workers()
        survey = None
        if (self.survey is not None or self.pool.steps) and any(tensor.arithmetic for tensor in self.tensors):
            model = self.model(workers, claims, progress)
            if self.survey is not None:
                survey = self.survey(model, self.settings_for(self.tensors[0].name))
        counted = threading.Lock()

        def work(part: Part, stop: threading.Event) -> None:
            if self.tensors[part.index].arithmetic:
                self._merge(part, survey, sink, stop, workers)
            else:
                self._copy(part, sink, stop)

        def alone(part: Part, stop: threading.Event) -> None:
            work(part, stop)
            sink.done(part.key)
            if progress is not None:
                with counted:
                    progress.advance(self._bytes(part))

        def shared(unit: list[Part], stop: threading.Event) -> None:
            for part in unit:
                work(part, stop)
            sink.done(unit[0].key)

        def told(unit: list[Part], others: int) -> None:
            if progress is not None:
                progress.advance(sum(map(self._bytes, unit)), others=others)

        if claims is None:
            in_parallel(parts, alone, min(workers, max(len(parts), 1)))
        else:
            together(claims, "merge", units_of(parts, lambda p: p.stop - p.start), shared, workers, told)

    def _bytes(self, part: Part) -> int:
        return (part.stop - part.start) * self.dtypes[self.tensors[part.index].name].size

    def model(self, workers: int, claims: Claims | None = None, progress: Any = None) -> WholeModel:
        """All its tensors, as a survey sees them once the pool's steps are surveyed, each behind those before it.

        With `claims` each sweep is shared with the other processes.
        """
        model = WholeModel(self, workers, claims, progress)
        for step in self.pool.steps[len(self.found) :]:
            self.found.append(step.survey(model, step.settings))
        return model

    def stack(self, tensor: Aligned, span: tuple[int, int], stop: threading.Event | None, workers: int = 1) -> Stack:
        models = self.pool.models

        def plane(where: tuple[int, str]) -> Any:
            return models[where[0]].weights.plane(where[1], models[where[0]].name)

        spare = self.memory // workers - worker_bytes(len(models))
        stack = Stack(
            tensor.name,
            tensor.shape,
            plane(tensor.base) if tensor.base is not None else None,
            [plane(where) for where in tensor.experts],
            list(tensor.places),
            self.seed,
            span,
            max(spare, 0),
            stop,
        )
        for step, found in zip(self.pool.steps, self.found, strict=False):  # those that are surveyed
            stack = Changed.of(stack, step, found)
        return stack

    def _merge(self, part: Part, survey: Any, sink: Sink, stop: threading.Event, workers: int) -> None:
        tensor = self.tensors[part.index]
        stack = self.stack(tensor, (part.start, part.stop), stop, workers)
        final = getattr(torch, self.dtypes[tensor.name].torch_name)
        settings = self.settings(tensor)
        if settings.elementwise:
            stack.block = WIDE_BLOCK
        merged = self.rule(stack, settings) if self.survey is None else self.rule(stack, settings, survey)
        for block, values in merged:
            cast = values if values.dtype == final else values.to(final)
            if not self.allow_nonfinite and not bool(torch.isfinite(cast.sum(dtype=torch.float32))):
                self._judge(stack, block, values, cast)
            sink.write(tensor.name, block.start, cast)

    def _judge(self, stack: Stack, block: Any, values: Tensor, cast: Tensor) -> None:
        """A block's sum is not finite: find out whether an element is not, and whose fault it is."""
        if bool(torch.isfinite(cast).all()):
            return
        stack.blame(block.start, block.stop)
        if bool(torch.isfinite(values).all()):
            raise _too_large(stack.name, values, cast)
        raise SpoliaError(
            "the merge gives NaN or Inf though all inputs are finite",
            where=stack.name,
            mend="use smaller scale and weights",
        )

    def _copy(self, part: Part, sink: Sink, stop: threading.Event) -> None:
        """Integers and what only one model has: the bits as they are."""
        tensor = self.tensors[part.index]
        source = tensor.base if tensor.base is not None else tensor.experts[0]
        expert = self.pool.models[source[0]]
        plane = expert.weights.plane(source[1], expert.name)
        for start in range(part.start, part.stop, BLOCK):
            if stop.is_set():
                raise Stopped
            end = min(start + BLOCK, part.stop)
            out = torch.empty(end - start, dtype=getattr(torch, tensor.stored.torch_name))
            plane.read(start, end, out)
            cast = out.to(getattr(torch, self.dtypes[tensor.name].torch_name))
            if cast.dtype != out.dtype and bool((torch.isfinite(out) & ~torch.isfinite(cast)).any()):
                raise _too_large(tensor.name, out, cast)
            sink.write(tensor.name, start, cast)


def _too_large(name: str, values: Tensor, cast: Tensor) -> SpoliaError:
    dtype = str(cast.dtype).removeprefix("torch.")
    what = f"the value {float(values.abs().max()):g} of `{name}` is too large for {dtype}"
    return SpoliaError(what, where=name, mend="write bfloat16 or float32 instead (`dtype`)")


def affordable_workers(
    tensors: Sequence[Aligned],
    experts: int,
    threads: int,
    memory: int,
    settings_for: SettingsFor,
    steps: Sequence[Step] = (),
) -> int:
    """Threads of at most `threads` whose blocks fit `memory` bytes. SpoliaError when not even one does."""
    need, largest = bytes_needed(tensors, experts, settings_for, steps)
    if memory < need:
        what = f": tensor `{largest}` is merged in one piece" if largest else ""
        raise SpoliaError(
            f"{memory / 1e6:.0f} MB of chunk memory are too few for {experts} experts{what}",
            where="chunk_memory",
            mend=f"allow at least {math.ceil(need / 1e6)} MB",
        )
    return max(1, min(threads, memory // need))


def bytes_needed(
    tensors: Sequence[Aligned], experts: int, settings_for: SettingsFor, steps: Sequence[Step] = ()
) -> tuple[int, str]:
    """Memory of one worker, and the tensor that asks for so much when it is merged in one piece."""
    need, largest = 0, ""
    for tensor in tensors:
        settings = settings_for(tensor.name)
        row = WIDE_BLOCK if settings.elementwise else 0
        if tensor.arithmetic and settings.whole_rows:
            row = tensor.shape[-1] if len(tensor.shape) > 1 else tensor.numel
        if tensor.arithmetic and any(step.settings.whole_rows for step in steps):
            row = max(row, tensor.numel // max(tensor.shape[0], 1) if len(tensor.shape) > 1 else tensor.numel)
        need = max(need, worker_bytes(experts, tensor.wide, row))
    for tensor in tensors:
        held = settings_for(tensor.name).copies_held(tensor.name, tensor.shape, experts) if tensor.arithmetic else 0
        size = int(held * tensor.numel * (8 if tensor.wide else 4))
        if size > need:
            need, largest = size, tensor.name
    return need, largest


@dataclass
class MemorySink:
    """Merged tensors in memory. Tied names get the very tensor they repeat."""

    tensors: dict[str, Tensor]

    @classmethod
    def like(cls, aligned: Sequence[Aligned], dtypes: dict[str, Dtype]) -> MemorySink:
        return cls({t.name: torch.empty(t.shape, dtype=getattr(torch, dtypes[t.name].torch_name)) for t in aligned})

    def write(self, name: str, start: int, values: Tensor) -> None:
        self.tensors[name].view(-1)[start : start + len(values)] = values

    def done(self, part: str) -> None:
        pass
