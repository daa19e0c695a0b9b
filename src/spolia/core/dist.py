"""Several processes of one run, as torchrun starts them: who am I, and sums over all. One process needs none of it."""

from __future__ import annotations

import atexit
import io
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor

_PATIENCE = timedelta(days=7)  # others wait while the first does alone what cannot be shared; one that dies is noticed
_ERROR = "spolia error"
_stores: list[Any] = []  # of the group formed here: where its processes found each other


def asked() -> tuple[int, int]:
    """Rank and number of processes by the environment, as torchrun sets it, whether a group was formed or not."""
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    return int(os.environ.get("RANK", "0")) if ranks > 1 else 0, ranks


def world() -> tuple[int, int]:
    """This process's rank and the number of processes: (0, 1) where no group was formed."""
    group = torch.distributed
    if not (group.is_available() and group.is_initialized()):
        return 0, 1
    return group.get_rank(), group.get_world_size()


def summed(tensor: Tensor) -> Tensor:
    """The sum over all processes, in place, the same bits in each."""
    if world()[1] > 1:
        on_gpu = torch.distributed.get_backend() == "nccl"  # which reduces nothing that lies elsewhere
        shared = tensor.cuda() if on_gpu else tensor
        torch.distributed.all_reduce(shared)
        tensor.copy_(shared)
    return tensor


def told(value: Any = None, by: int = 0) -> Any:
    """One process's `value` in all of them: numbers, text, bytes, None. Nobody goes on before that one has come here."""
    if world()[1] == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=by)
    return box[0]


def handed(value: Any, by: int, device: torch.device) -> Any:
    """As `told`, of anything that holds tensors; they come to `device`."""
    held = io.BytesIO()
    if world()[0] == by:
        torch.save(value, held)
    return torch.load(io.BytesIO(told(held.getvalue(), by)), map_location=device, weights_only=False)


def anyone(flag: bool) -> bool:
    """Whether `flag` holds in any process."""
    return flag if world()[1] == 1 else bool(summed(torch.tensor([int(flag)])).item())


def by_shares(compute: Callable[[Any], Tensor], x: Any) -> Tensor:
    """compute(x) of all rows of x, of which every process makes its own and is given the others'.

    A loss of the result is the same number in every process, and the mean over processes of its gradients in what
    `compute` used is the whole gradient. Rows must not depend on each other.
    """
    rank, ranks = world()
    count = rows_in(x)
    if ranks == 1 or count < ranks:
        return compute(x)
    return _gathering().apply(compute(rows_of(x, slice(rank, None, ranks))), count)


def rows_in(x: Any) -> int:
    """How many inputs a batch holds: a tensor, or a mapping or tuple of tensors."""
    if isinstance(x, Mapping):
        return rows_in(next(part for part in x.values() if torch.is_tensor(part)))
    return rows_in(x[0]) if isinstance(x, list | tuple) else len(x)


def rows_of(x: Any, which: slice) -> Any:
    """Some inputs of a batch."""
    if isinstance(x, Mapping):
        return {name: rows_of(part, which) for name, part in x.items()}
    if isinstance(x, list | tuple):
        return tuple(rows_of(part, which) for part in x)
    return x[which] if torch.is_tensor(x) else x


@cache
def _gathering() -> Any:
    class Gathered(torch.autograd.Function):
        """Every ranks-th row from each process. Going back, own rows alone, times the number of processes."""

        @staticmethod
        def forward(ctx: Any, own: Tensor, count: int) -> Tensor:
            rank, ranks = world()
            whole = own.new_zeros(count, *own.shape[1:])
            whole[rank::ranks] = own
            return summed(whole)  # zeros elsewhere: exact

        @staticmethod
        def backward(ctx: Any, *slopes: Tensor) -> tuple[Tensor, None]:
            rank, ranks = world()
            return slopes[0][rank::ranks] * ranks, None

    return Gathered


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Under torchrun, inside a process group: the one there is, or one formed now. Yields rank and number.

    A group formed here stays until the process ends: another one at the same address could meet what is left of it.
    Where every process of this machine has a GPU of its own, `cuda` means that one, and what lies there is summed by NCCL.
    """
    alone = asked()[1] == 1 or not torch.distributed.is_available()
    if not (alone or torch.distributed.is_initialized()):
        store, rank, ranks = next(torch.distributed.rendezvous("env://"))
        store.set_timeout(_PATIENCE)
        _stores.append(store)
        own = torch.distributed.PrefixStore("spolia", store)
        torch.distributed.init_process_group(_backend(), store=own, rank=rank, world_size=ranks, timeout=_PATIENCE)
        atexit.register(_leave)
    yield world()


def first_error(text: str) -> str:
    """The error of whichever process says one first, in the words it gave; `text` where no group was formed here."""
    return _stores[0].compare_set(_ERROR, "", text).decode() if _stores else text


def error_in(store: Any) -> str:
    """What `first_error` was told in a store; empty where nothing was."""
    return store.get(_ERROR).decode() if store.check([_ERROR]) else ""


def _backend() -> str:
    if not torch.cuda.is_available():
        return "gloo"
    gpus, here = torch.cuda.device_count(), os.environ.get("LOCAL_WORLD_SIZE")
    torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % gpus)
    fits = here is not None and int(here) <= gpus and torch.distributed.is_nccl_available()
    return "cpu:gloo,cuda:nccl" if fits else "gloo"  # NCCL refuses two processes on one GPU


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
