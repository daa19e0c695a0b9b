"""The task vectors of a pool held where coefficients are learned: rows of a stack, or factors where experts are adapters."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings
from spolia.core.stream import Block, FilePlane, Plane, Stack, TensorPlane, in_parallel, share_one_arena
from spolia.parts.align import Aligned
from spolia.parts.expert import ExpertPool
from spolia.parts.lora import LoraPlane
from spolia.parts.merging import Merge

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Storage:
    """Where the stack lies and in what type. "disk": a temporary file in `folder`, mapped; its pages come and go."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    place: Literal["device", "cpu", "disk"] = "device"
    folder: Path | None = None


@dataclass
class Piece:
    """One tensor: its base, where its weights go, and its task vectors, as rows or as factors."""

    name: str
    base: Tensor  # [n], in the arithmetic's type; only read, for it may be the given model's own memory
    target: Tensor  # the network's parameter or buffer
    rows: Tensor | None = None  # [experts, n]
    left: Tensor | None = None  # [out, ranks of all experts], scaled
    right: Tensor | None = None  # [ranks, in]
    owner: Tensor | None = None  # [ranks]: the expert

    def write(self, start: int, stop: int, factors: Tensor) -> None:
        """target[start:stop] = base + factors [experts] times task vectors. Factors of a low-rank piece come whole."""
        flat, base = self.target.detach().view(-1)[start:stop], self.base[start:stop]
        direct = flat.dtype == base.dtype and flat.device == base.device
        out = flat if direct else torch.empty_like(base)
        factors = factors.to(base)
        if self.rows is not None:
            torch.addmv(base, self.rows[:, start:stop].to(base.dtype).t(), factors, out=out)
        else:
            assert self.left is not None and self.right is not None and self.owner is not None
            shape = (len(self.left), self.right.shape[1])
            scaled = self.left * factors[self.owner]
            torch.addmm(base.view(shape), scaled, self.right, out=out.view(shape))
        if not direct:
            flat.copy_(out)

    def project(self, start: int, stop: int, experts: int) -> Tensor:
        """Inner products of the target's gradient with the task vectors over start:stop, fp64: [experts]."""
        assert self.target.grad is not None
        gradient = self.target.grad.reshape(-1)[start:stop].to(self.base)
        if self.rows is not None:
            return (self.rows[:, start:stop].to(gradient.dtype) @ gradient).double().cpu()
        assert self.left is not None and self.right is not None and self.owner is not None
        matrix = gradient.view(len(self.left), -1)
        of_ranks = (self.left.t() @ matrix).mul_(self.right).sum(1)  # <B a, G> = <a, B^T G>, rank by rank
        total = torch.zeros(experts, dtype=torch.float64)
        return total.index_add_(0, self.owner.cpu(), of_ranks.double().cpu())


def _changes(stack: Stack, settings: Any) -> Iterator[tuple[Block, Tensor]]:
    """The task vectors as they are."""
    for block in stack.blocks():
        yield block, block.deltas()


def held(
    pool: ExpertPool,
    tensors: list[Aligned],
    targets: dict[str, Tensor],
    storage: Storage,
    seed: int,
    threads: int,
) -> list[Piece]:
    """The task vectors of `tensors`, read once; what the pool's steps survey comes on top. Use inside `pool.opened()`."""
    merge = Merge(pool, tensors, _changes, None, lambda name: MergeSettings(), {}, seed, threads)
    share_one_arena()
    written = {target.untyped_storage().data_ptr() for target in targets.values()}
    pieces = [_piece(tensor, targets[tensor.name], merge, written) for tensor in tensors]
    _allot(pieces, len(pool.experts), storage)
    _fill(pieces, tensors, merge, threads)
    return pieces


def _piece(tensor: Aligned, target: Tensor, merge: Merge, written: set[int]) -> Piece:
    """A tensor with its base, and with its factors where every expert is an adapter on this base."""
    stack = merge.stack(tensor, (0, tensor.numel), None)
    assert stack.base is not None
    piece = Piece(tensor.name, _base(tensor, stack, merge, written), target)
    adapted = [plane for plane in stack.experts if isinstance(plane, LoraPlane)]
    under = [plane.under if isinstance(plane, LoraPlane) else plane for plane in stack.experts]
    if not merge.pool.steps and all(_same(plane, stack.base) for plane in under) and tensor.numel:
        out = adapted[0].left.shape[0] if adapted else 1
        left, right, owner = [torch.empty(out, 0)], [torch.empty(0, tensor.numel // out)], list[int]()
        for place, plane in zip(stack.places, stack.experts, strict=True):
            if isinstance(plane, LoraPlane):
                left.append(plane.left * plane.scale)
                right.append(plane.right)
                owner += [place] * len(plane.right)
        device = target.device
        piece.base = piece.base.to(device)
        piece.left, piece.right = (torch.cat(f, d).to(device, stack.dtype) for f, d in ((left, 1), (right, 0)))
        piece.owner = torch.tensor(owner, dtype=torch.int64, device=device)
    return piece


def _base(tensor: Aligned, stack: Stack, merge: Merge, written: set[int]) -> Tensor:
    """The base as it lies in memory, where it does so in the arithmetic's type, apart from what is `written`; or a copy.

    `written`: addresses of the network's storages. A file that is mapped may be cut while coefficients are learned.
    """
    plane = stack.base
    assert plane is not None and tensor.base is not None
    if (
        isinstance(plane, TensorPlane)
        and plane.flat.dtype == stack.dtype
        and merge.pool.models[tensor.base[0]].weights.checkpoint is None
        and plane.flat.untyped_storage().data_ptr() not in written
    ):
        return plane.flat
    base = torch.empty(tensor.numel, dtype=stack.dtype)
    plane.read(0, tensor.numel, base)
    return base


def _same(plane: Plane, base: Plane) -> bool:
    """Whether both read the same stored tensor."""
    if isinstance(plane, FilePlane) and isinstance(base, FilePlane):
        return plane.info == base.info
    if isinstance(plane, TensorPlane) and isinstance(base, TensorPlane):
        return plane.flat.data_ptr() == base.flat.data_ptr() and plane.dtype == base.dtype
    return False


def _allot(pieces: list[Piece], experts: int, storage: Storage) -> None:
    """Room for the rows of every piece that is no product of factors."""
    dense = [piece for piece in pieces if piece.left is None]
    whole = None
    if storage.place == "disk":
        sizes = sum(experts * len(piece.base) for piece in dense)
        wide = any(piece.base.dtype == torch.float64 for piece in dense)
        kind = torch.bfloat16 if storage.dtype == "bfloat16" else torch.float64 if wide else torch.float32
        with tempfile.NamedTemporaryFile(dir=storage.folder, prefix="spolia-stack-") as file:
            whole = torch.from_file(
                file.name, shared=True, size=max(sizes, 1), dtype=kind
            )  # stays mapped when unlinked
    at = 0
    for piece in dense:
        shape = (experts, len(piece.base))
        kind = torch.bfloat16 if storage.dtype == "bfloat16" else piece.base.dtype
        if whole is not None:
            piece.rows = whole[at : at + shape[0] * shape[1]].view(shape)
            at += shape[0] * shape[1]
            continue
        device = piece.target.device if storage.place == "device" else "cpu"
        piece.base = piece.base.to(device)
        piece.rows = torch.zeros(shape, dtype=kind, device=device)


def _fill(pieces: list[Piece], tensors: list[Aligned], merge: Merge, threads: int) -> None:
    """Read the task vectors into their rows, several tensors at a time."""
    merge.model(threads)  # so that the steps are surveyed
    jobs = []
    for piece, tensor in zip(pieces, tensors, strict=True):
        if piece.rows is not None:
            jobs += [(piece, tensor, span) for span in merge.spans(tensor)]

    def work(job: tuple[Piece, Aligned, tuple[int, int]], stop: Any) -> None:
        piece, tensor, span = job
        assert piece.rows is not None
        stack = merge.stack(tensor, span, stop, threads)
        for block, vectors in _changes(stack, None):
            if not bool(torch.isfinite(vectors.sum())):
                stack.blame(block.start, block.stop)
            piece.rows[tensor.places, block.start : block.stop] = vectors.to(piece.rows)

    in_parallel(jobs, work, max(1, min(threads, len(jobs))))
