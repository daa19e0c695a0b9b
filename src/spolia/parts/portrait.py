"""A portrait of a pool: how far each expert moved from the base, in which directions, and where they pull apart.

One streaming pass over all models gives, for every tensor, the Gram matrix of the task vectors, the share of elements on
whose sign two experts disagree, and the share they left untouched. Norms and cosines of any group of tensors follow by
adding Gram matrices. The effective rank of a matrix takes a second look, at `RANK_ROWS` of its rows.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.core.stream import Stack, in_parallel
from spolia.parts.align import Aligned
from spolia.parts.expert import ExpertPool

if TYPE_CHECKING:
    from torch import Tensor

RANK_ROWS = 256  # a matrix with more rows is judged by this many of them, evenly spaced


@dataclass
class Measured:
    """What one pass finds out about one tensor, or about several added up. Matrices are fp64, one row an expert."""

    numel: int
    gram: Tensor  # [experts, experts]: inner products of task vectors
    base: float  # squared norm of the base
    against: Tensor  # [experts]: inner product of each task vector with the base
    untouched: Tensor  # [experts]: elements equal to the base's
    moved: Tensor  # [experts, experts]: elements that both changed
    opposed: Tensor  # [experts, experts]: of those, elements that they moved in opposite directions
    rank: list[float] = field(default_factory=list)  # effective rank of each expert's change, matrices only

    def __add__(self, other: Measured) -> Measured:
        return Measured(
            self.numel + other.numel,
            self.gram + other.gram,
            self.base + other.base,
            self.against + other.against,
            self.untouched + other.untouched,
            self.moved + other.moved,
            self.opposed + other.opposed,
        )

    @property
    def norms(self) -> list[float]:
        """Length of each task vector; nan where a weight is NaN or infinite."""
        return self.gram.diagonal().sqrt().tolist()

    @property
    def relative(self) -> list[float]:
        """Length of each task vector over that of the base; nan for a base of zeros."""
        return [norm / math.sqrt(self.base) if self.base > 0 else math.nan for norm in self.norms]

    @property
    def kept(self) -> list[float]:
        """How much of the base each expert still holds: its projection onto the base, over the base. 1 for small moves,
        near 0 for weights that were drawn anew."""
        return [1 + inner / self.base if self.base > 0 else math.nan for inner in self.against.tolist()]

    @property
    def cosines(self) -> list[list[float]]:
        """Cosine between each two task vectors; nan where one is zero."""
        norms = self.gram.diagonal().sqrt()
        return (self.gram / norms.outer(norms)).clamp(-1, 1).tolist()

    @property
    def conflict(self) -> list[list[float]]:
        """For each two experts, the share of the elements both changed that they moved in opposite directions; unrelated
        changes give 0.5, nan where there are none."""
        return (self.opposed / self.moved).tolist()

    @property
    def shares_untouched(self) -> list[float]:
        """Share of the elements that each expert left as they are in the base."""
        return (self.untouched / max(self.numel, 1)).tolist()


def measure(stack: Stack) -> Measured:
    """One pass over one tensor."""
    count = len(stack.experts)
    square, line = (torch.zeros(*shape, dtype=torch.float64) for shape in ((count, count), (count,)))
    found = Measured(0, square, 0.0, line, line.clone(), square.clone(), square.clone())
    for block in stack.blocks():
        deltas = block.deltas()  # [experts, n]
        assert block.base is not None
        wide, base = deltas.double(), block.base.double()
        found.gram += wide @ wide.t()
        found.against += wide @ base
        found.base += float(base @ base)
        signs = deltas.sign_()
        moves = signs.abs()
        found.untouched += (signs == 0).sum(1)
        both = (moves @ moves.t()).double()  # counts below 2^24: exact in fp32
        found.moved += both
        found.opposed += (both - (signs @ signs.t()).double()) / 2
        found.numel += deltas.shape[1]
    return found


def effective_ranks(stack: Stack) -> list[float]:
    """exp(entropy of the normalised squared singular values) of each expert's change to a matrix, from `RANK_ROWS` rows.

    Roy & Vetterli, EUSIPCO 2007, with squared singular values, so that the Gram matrix suffices. At most `RANK_ROWS`.
    """
    assert stack.base is not None
    rows, columns = stack.shape
    taken = min(rows, RANK_ROWS)
    base, matrices = torch.empty(taken, columns, dtype=stack.dtype), []
    for plane, out in [(stack.base, base), *((plane, None) for plane in stack.experts)]:
        matrix = torch.empty_like(base) if out is None else out
        for i in range(taken):
            at = i * rows // taken * columns
            plane.read(at, at + columns, matrix[i])
        if out is None:
            matrices.append(_entropy_rank(matrix.sub_(base)))
    return matrices


def _entropy_rank(matrix: Tensor) -> float:
    """0 for a matrix of zeros, nan for one with NaN or Inf."""
    wide = matrix.double()
    gram = wide @ wide.t() if wide.shape[0] <= wide.shape[1] else wide.t() @ wide
    if not bool(torch.isfinite(gram).all()):
        return math.nan
    energy = torch.linalg.eigvalsh(gram).clamp_(min=0)
    total = energy.sum()
    if total <= 0:
        return 0.0
    share = energy[energy > 0] / total
    return float(torch.exp(-(share * share.log()).sum()))


@dataclass
class Portrait:
    """Measurements by tensor, in natural order."""

    experts: list[str]
    tensors: dict[str, Measured]
    matrices: set[str]  # names of those with two dimensions or more

    def total(self, names: Iterable[str] | None = None) -> Measured:
        """The measurements of some tensors (all of them) as one."""
        parts = [self.tensors[name] for name in names] if names is not None else list(self.tensors.values())
        whole = parts[0]
        for part in parts[1:]:
            whole = whole + part
        return whole

    def ranks(self, names: Iterable[str] | None = None) -> list[float]:
        """Mean effective rank of each expert's changes to some matrices (all of them); nan where there is none."""
        found = [self.tensors[name].rank for name in (self.tensors if names is None else names)]
        found = [rank for rank in found if rank]
        return [sum(column) / len(found) for column in zip(*found, strict=True)] or [math.nan] * len(self.experts)


def portray(pool: ExpertPool, aligned: Sequence[Aligned], threads: int, *, ranks: bool = True) -> Portrait:
    """Measure every tensor that base and experts share, inside `pool.opened()`. Reads all once, and with `ranks` at most
    `RANK_ROWS` rows of each matrix again."""
    models, found, lock = pool.models, dict[str, Measured](), threading.Lock()
    shared = [t for t in aligned if t.arithmetic and t.base is not None and len(t.experts) == len(pool.experts)]
    torch.get_num_threads()  # load torch before the threads start

    def work(tensor: Aligned, stop: threading.Event) -> None:
        assert tensor.base is not None
        base, *experts = (models[i].weights.plane(n, models[i].name) for i, n in (tensor.base, *tensor.experts))
        stack = Stack(tensor.name, tensor.shape, base, experts, list(tensor.places), 0, (0, tensor.numel), 0, stop)
        measured = measure(stack)
        if ranks and len(tensor.shape) == 2 and min(tensor.shape) > 1:
            measured.rank = effective_ranks(stack)
        with lock:
            found[tensor.name] = measured

    in_parallel(sorted(shared, key=lambda t: -t.numel), work, threads)
    matrices = {t.name for t in shared if len(t.shape) > 1}
    return Portrait([e.name for e in pool.experts], {t.name: found[t.name] for t in shared}, matrices)
