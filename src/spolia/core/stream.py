"""One tensor of all models at a time, in blocks: how merging stays within a memory budget and keeps every core busy.

A `Stack` is one tensor of the base and the experts, lying in files or in memory. A method reads it block by block, as
often as it likes, in fp32 (fp64 when a model is stored so), and yields merged blocks. Blocks have one size whatever the
budget and the number of threads, so neither changes a bit of the result.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from spolia.core.checkpoint import Dtype, TensorInfo, read_into
from spolia.core.lazy import torch
from spolia.core.seeds import TILE
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor

BLOCK = TILE  # elements
WIDE_BLOCK = 2 * BLOCK  # for methods whose few temporaries leave room in the cache
AHEAD = 8 * BLOCK  # elements asked of the disk at a time
T = TypeVar("T")


class Plane(Protocol):
    """One model's copy of a tensor, seen as a flat row."""

    model: str

    @property
    def dtype(self) -> Dtype: ...

    def read(self, start: int, stop: int, out: Tensor) -> None:
        """Elements start:stop, converted into `out` [stop - start]."""
        ...

    def expect(self, start: int, stop: int) -> None:
        """These elements are wanted soon: start fetching them."""
        ...


@dataclass
class TensorPlane:
    """A tensor in memory."""

    model: str
    dtype: Dtype
    flat: Tensor

    def read(self, start: int, stop: int, out: Tensor) -> None:
        out.copy_(self.flat[start:stop])

    def expect(self, start: int, stop: int) -> None:
        pass


@dataclass
class FilePlane:
    """A tensor in an open safetensors file."""

    model: str
    info: TensorInfo
    fd: int

    @property
    def dtype(self) -> Dtype:
        return self.info.dtype

    def read(self, start: int, stop: int, out: Tensor) -> None:
        stored, at = getattr(torch, self.dtype.torch_name), start * self.dtype.size
        if stored == out.dtype:
            read_into(self.fd, self.info, at, memoryview(out.view(torch.uint8).numpy()))
        else:
            raw = torch.empty(stop - start, dtype=stored)
            read_into(self.fd, self.info, at, memoryview(raw.view(torch.uint8).numpy()))
            out.copy_(raw)

    def expect(self, start: int, stop: int) -> None:
        size = self.dtype.size
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self.fd, self.info.start + start * size, (stop - start) * size, os.POSIX_FADV_WILLNEED)


@dataclass
class Block:
    """Elements start:stop of a stack. Its tensors are valid until the next block and may be written to."""

    start: int
    stop: int
    base: Tensor | None  # [n]
    experts: Tensor  # [experts, n]

    def deltas(self) -> Tensor:
        """Task vectors [experts, n]; takes the place of `experts`."""
        assert self.base is not None
        return self.experts.sub_(self.base)


@dataclass
class Stack:
    """One tensor of every model: `base` and `experts` as planes, restricted to the elements of `span`."""

    name: str
    shape: tuple[int, ...]
    base: Plane | None
    experts: list[Plane]
    places: list[int] = field(default_factory=list)  # which of the pool's experts these are
    seed: int = 0
    span: tuple[int, int] = (0, 0)
    spare_bytes: int = 0  # memory a method may keep between sweeps
    stop: threading.Event | None = None
    block: int = BLOCK
    grain: int = 1  # elements that no block parts: whole rows of whoever reads this stack

    @property
    def numel(self) -> int:
        count = 1
        for extent in self.shape:
            count *= extent
        return count

    @property
    def row(self) -> int:
        """Length of a row (the last dimension); a vector or scalar is one row."""
        return self.shape[-1] if len(self.shape) > 1 else self.numel

    @property
    def dtype(self) -> torch.dtype:
        """What arithmetic is done in."""
        planes = self.experts if self.base is None else [self.base, *self.experts]
        return torch.float64 if any(plane.dtype.code == "F64" for plane in planes) else torch.float32

    def blocks(self, whole_rows: bool = False) -> Iterator[Block]:
        """The span in blocks of `block` elements, or of as many whole rows, or grains, as come near it (one at least)."""
        low, high = self.span
        grain = max(self.grain, self.row if whole_rows else 1)
        step = max(1, self.block // grain) * grain
        size = min(step, high - low)
        base = torch.empty(size, dtype=self.dtype) if self.base is not None else None
        experts = torch.empty(len(self.experts), size, dtype=self.dtype)
        for start in range(low, high, step):
            if self.stop is not None and self.stop.is_set():
                raise Stopped
            stop = min(start + step, high)
            n = stop - start
            if (start - low) % AHEAD < step:  # the disk works while we compute
                for plane in [*self.experts, *([self.base] if self.base is not None else [])]:
                    plane.expect(start, min(start + 2 * AHEAD, high))
            if n < size:
                experts = experts.reshape(-1)[: len(self.experts) * n].view(len(self.experts), n)
                base = base[:n] if base is not None else None
            if self.base is not None and base is not None:
                self.base.read(start, stop, base)
            for row, plane in enumerate(self.experts):
                plane.read(start, stop, experts[row])
            yield Block(start, stop, base, experts)

    def blame(self, start: int, stop: int) -> None:
        """SpoliaError when an input holds NaN or Inf among elements start:stop, naming it."""
        for plane in [self.base, *self.experts]:
            if plane is None:
                continue
            given = torch.empty(stop - start, dtype=self.dtype)
            plane.read(start, stop, given)
            bad = (~torch.isfinite(given)).nonzero()
            if len(bad):
                raise SpoliaError(
                    f"tensor `{self.name}` holds NaN or Inf, first at element {start + int(bad[0])}",
                    where=plane.model,
                    mend="this expert is broken: leave it out or get a sound copy",
                )

    def sample(self, count: int) -> Tensor | None:
        """About `count` elements of each task vector [experts, n], from 64 places spread over the tensor; None where that
        would be no saving."""
        low, high = self.span
        piece = count // 64
        if self.base is None or high - low < 8 * count:
            return None
        base = torch.empty(64, piece, dtype=self.dtype)
        experts = torch.empty(len(self.experts), 64, piece, dtype=self.dtype)
        for i in range(64):
            start = low + (high - low - piece) * i // 63
            self.base.read(start, start + piece, base[i])
            for plane, row in zip(self.experts, experts, strict=True):
                plane.read(start, start + piece, row[i])
        return (experts - base).view(len(self.experts), -1)

    def sweep(self, count: Callable[[Tensor, Tensor], None], totals: Tensor) -> None:
        """`count(task vectors, totals)` for every block."""
        for block in self.blocks():
            count(block.deltas(), totals)


class Stopped(Exception):
    """Another worker failed or the user interrupted: leave at the next block."""


def worker_bytes(experts: int, wide: bool = False, row: int = 0) -> int:
    """Memory one worker needs: planes, about three temporaries of the same size, the counts and the raw bytes."""
    elements = max(BLOCK, row)
    return (4 * experts + 4) * elements * (8 if wide else 4) + 2 * experts * (1 << 16) * 8


def cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def in_parallel(jobs: Iterable[T], work: Callable[[T, threading.Event], Any], threads: int) -> None:
    """Run `work(job, stop)` on worker threads, each with one intra-op thread. The first error stops all and is raised.

    An interrupt of the main thread stops the workers at their next block and is raised once they have.
    """
    torch.empty(1 << 22, dtype=torch.uint8)  # freed at once: glibc then keeps temporaries of up to 4 MB instead of
    # mapping and faulting them anew for every block
    queue, lock, stop = iter(jobs), threading.Lock(), threading.Event()
    errors: list[BaseException] = []
    before = torch.get_num_threads()

    def worker() -> None:
        torch.set_num_threads(1)
        while not stop.is_set():
            with lock:
                job = next(queue, None)
            if job is None:
                return
            try:
                work(job, stop)
            except Stopped:
                return
            except BaseException as error:
                errors.append(error)
                stop.set()

    workers = [threading.Thread(target=worker, name=f"spolia-{n}", daemon=True) for n in range(threads)]
    try:
        for thread in workers:
            thread.start()
        for thread in workers:
            while thread.is_alive():
                thread.join(0.2)
    except BaseException:
        stop.set()
        for thread in workers:
            thread.join()
        raise
    finally:
        torch.set_num_threads(before)
    if errors:
        raise errors[0]


def share_one_arena() -> None:
    """Tells glibc to give all threads one heap: with one for each, what a thread has freed no other can use.

    For threads that fill arrays which stay: a stack of task vectors took 6.1 GB where 3.5 do. Streaming is a little slower so.
    """
    import ctypes

    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt is not None:
        mallopt(-8, 1)  # M_ARENA_MAX
