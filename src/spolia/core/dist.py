"""Several processes of one run, as torchrun starts them: who am I, and sums over all. One process needs none of it."""

from __future__ import annotations

import atexit
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from spolia.core.lazy import torch

if TYPE_CHECKING:
    from torch import Tensor


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


@contextmanager
def joined() -> Iterator[tuple[int, int]]:
    """Under torchrun, inside a process group: the one there is, or one formed now. Yields rank and number.

    A group formed here stays until the process ends: another one at the same address could meet what is left of it.
    """
    alone = int(os.environ.get("WORLD_SIZE", "1")) == 1 or not torch.distributed.is_available()
    if not (alone or torch.distributed.is_initialized()):
        torch.distributed.init_process_group("gloo")  # what is summed here lies in main memory
        atexit.register(_leave)
    yield world()


def _leave() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
