"""Where tasks are worked on: one after the other, by worker threads with a replica each, or stacked under vmap.

Results are taken in the order of the tasks, so that sums do not depend on which worker was quicker.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, TypeVar

from spolia.core.inner_problems import Replica, Single, Stack, views
from spolia.core.lazy import torch
from spolia.core.stream import cores, in_parallel
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor, nn

    from spolia.core.inner_rules import Execution, Task
    from spolia.core.norms import Statistics

T = TypeVar("T")
Job = Callable[[Any], T]  # of a Single or a Stack


@dataclass(frozen=True)
class Plan:
    """How tasks are run: `chunk` tasks in one vmap, `workers` threads."""

    mode: str
    chunk: int = 1
    workers: int = 1


class Replicas:
    """Copies of a module over its own parameters, one a thread; made anew when the module's parts have changed."""

    def __init__(self, module: nn.Module, bn: Statistics):
        self.module, self.bn = module, bn
        self._made: list[nn.Module] = []
        self._key: Any = None

    def get(self, count: int) -> list[nn.Module]:
        """So many replicas, with the module's buffers and its layers' training flags of now."""
        from spolia.core.norms import exact

        key = [id(p) for p in self.module.parameters()], [(b.device, b.dtype) for b in self.module.buffers()]
        if key != self._key:
            self._made, self._key = [], key
        while len(self._made) < count:
            self._made.append(exact(self.module, self.bn))
        for replica in self._made[:count]:
            with torch.no_grad():
                for mine, theirs in zip(replica.buffers(), self.module.buffers(), strict=True):
                    mine.copy_(theirs)
            for mine, theirs in zip(replica.modules(), self.module.modules(), strict=True):
                mine.training = theirs.training
        return self._made[:count]


def run(plan: Plan, replicas: Sequence[Replica], tasks: Sequence[Task], job: Job[T], take: Callable[[T], None]) -> None:
    """`take(job(problem))` for every task, or stack of tasks, in their order."""
    if plan.mode == "vmap":
        for low in range(0, len(tasks), plan.chunk):
            take(job(Stack(replicas[0], tasks[low : low + plan.chunk])))
    elif plan.mode == "loop":
        for task in tasks:
            take(job(Single(replicas[0], task)))
    else:
        _by_workers(plan.workers, replicas, tasks, job, take)


def _by_workers(
    workers: int, replicas: Sequence[Replica], tasks: Sequence[Task], job: Job[T], take: Callable[[T], None]
) -> None:
    free: SimpleQueue[Replica] = SimpleQueue()
    for replica in replicas:
        free.put(replica)
    waiting: dict[int, T] = {}
    lock, taken = threading.Lock(), 0

    def work(i: int, stop: threading.Event) -> None:
        nonlocal taken
        replica = free.get()
        try:
            made = job(Single(replica, tasks[i]))
        finally:
            free.put(replica)
        with lock:
            waiting[i] = made
            while taken in waiting:
                take(waiting.pop(taken))
                taken += 1

    in_parallel(range(len(tasks)), work, min(workers, len(tasks)))


# --- which way, and how many at once ---------------------------------------------------------------------------------


def planned(mode: str, how: Execution, tasks: Sequence[Task], held: Callable[[], int]) -> Plan:
    """The plan of a mode within the budget of memory; `held` counts the bytes that one task keeps."""
    if mode == "loop":
        return Plan("loop")
    if mode == "vmap":
        chunk = how.chunk or max(1, how.memory // max(1, held()))
        return Plan("vmap", chunk=min(chunk, max(1, len(tasks))))
    asked = how.workers or cores()
    if asked > 1 and len(tasks) > 1:
        asked = min(asked, max(1, how.memory // max(1, held())))
    return Plan("workers", workers=max(1, min(asked, len(tasks))))


def candidates(tasks: Sequence[Task], how: Execution, random: bool) -> list[str]:
    """Modes that are worth a measurement. `random`: dropout is active."""
    found = ["loop"]
    if len(tasks) > 1 and (how.workers or cores()) > 1 and not random:
        found.append("workers")
    if len(tasks) * views(tasks[0]) > 1:
        found.append("vmap")
    return found


def measured(modes: Sequence[str], trial: Callable[[str], int], device: str) -> dict[str, Any]:
    """The quickest mode. `trial(mode)` runs a sample and says how many tasks it was; twice after a first run."""
    seconds, refused = {}, {}
    for mode in modes:
        try:
            trial(mode)
            rounds = []
            for _ in range(2):
                start = time.perf_counter()
                count = trial(mode)
                if device == "cuda":
                    torch.cuda.synchronize()
                rounds.append((time.perf_counter() - start) / count)
            seconds[mode] = min(rounds)
        except (SpoliaError, RuntimeError) as error:
            if mode == modes[0]:
                raise  # the plain loop: it is not the mode that fails
            refused[mode] = str(error).splitlines()[0]
    best = min(seconds, key=seconds.__getitem__)
    return {"mode": best, "seconds": seconds, "refused": refused, "device": device, "threads": torch.get_num_threads()}


# --- memory ----------------------------------------------------------------------------------------------------------


class Saved:
    """Bytes that graphs keep for their backward passes while `with saved.counted()`: now, and at most.

    A storage kept by several operations counts once. Nothing under vmap is seen: the framework has no hooks there.
    """

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: dict[int, int] = {}

    def counted(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(lambda t: _Kept(self, t), lambda kept: kept.tensor)

    def hold(self, key: int, size: int) -> None:
        self._holders[key] = self._holders.get(key, 0) + 1
        if self._holders[key] == 1:
            self.now += size
            self.peak = max(self.peak, self.now)

    def release(self, key: int, size: int) -> None:
        self._holders[key] -= 1
        if not self._holders[key]:
            del self._holders[key]
            self.now -= size


class _Kept:
    """A tensor kept by a graph; it is released with it."""

    def __init__(self, saved: Saved, tensor: Tensor):
        storage = tensor.untyped_storage()
        self.saved, self.tensor, self.place = saved, tensor, (storage.data_ptr(), storage.nbytes())
        saved.hold(*self.place)

    def __del__(self) -> None:
        self.saved.release(*self.place)


def held_by(job: Job[Any], problem: Single, path: int) -> int:
    """Bytes that one task keeps at its peak: of graphs, and `path` for each view."""
    saved = Saved()
    with saved.counted():
        job(problem)
    return saved.peak + path * problem.count
