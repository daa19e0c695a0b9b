"""What the methods that work on whole weight matrices share: which tensors those are, how they are read, and the two
linear-algebra steps of several of them, the thin SVD and the nearest orthonormal factor."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from pydantic import field_validator

from spolia.core.lazy import torch
from spolia.core.settings import MergeSettings, setting
from spolia.core.stream import AHEAD, BLOCK, Block, Plane, Stack, Stopped

if TYPE_CHECKING:
    from torch import Tensor

FLOOR = 1e-12  # eigenvalues of a Gram matrix below this share of the largest count as zero: singular values below 1e-6
VOCABULARY = (
    "text_projection|embed_tokens|tok_embeddings|word_embeddings|token_embedding|embed_in|embed_out|wte|lm_head"
)
ROWS = 1 << 20  # elements of a slab in fp64


class MatrixMerge(MergeSettings):
    """Settings that the matrix methods share."""

    scale: float = setting(1.0, "factor of the merged task vector", source="untuned; the papers tune it")
    exclude: str = setting(
        VOCABULARY,
        "regular expression; matrices whose name it finds are merged as vectors are",
        source="text_projection: published code; vocabulary tensors: our choice",
    )
    precision: Literal["float32", "float64"] = setting(
        "float32", "type the matrices are decomposed in", source="published code"
    )

    @field_validator("exclude")
    @classmethod
    def _compiles(cls, value: str) -> str:
        try:
            re.compile(value)
        except re.error as error:
            raise ValueError(f"is no regular expression: {error}") from None
        return value

    def is_matrix(self, name: str, shape: tuple[int, ...], experts: int) -> bool:
        """Whether the method proper merges this tensor."""
        return len(shape) == 2 and min(shape) > 0 and not (self.exclude and re.search(self.exclude, name))

    def wide(self) -> int:
        """Elements of 4 bytes that one element of the decomposed matrices takes."""
        return 2 if self.precision == "float64" else 1


def working(stack: Stack, settings: MatrixMerge) -> torch.dtype:
    """The type matrices are decomposed in: fp64 models stay so."""
    return torch.float64 if settings.precision == "float64" else stack.dtype


def changes(stack: Stack, dtype: torch.dtype) -> Iterator[Tensor]:
    """Each task vector as a matrix [out, in], one at a time; it may be written to."""
    assert stack.base is not None
    base = read(stack, stack.base)
    for plane in stack.experts:
        yield read(stack, plane).sub_(base).to(dtype)


def read(stack: Stack, plane: Plane) -> Tensor:
    """One model's whole matrix [out, in]."""
    flat = torch.empty(stack.numel, dtype=stack.dtype)
    for start in range(0, stack.numel, AHEAD):
        if stack.stop is not None and stack.stop.is_set():
            raise Stopped
        end = min(start + AHEAD, stack.numel)
        plane.expect(end, min(end + AHEAD, stack.numel))
        plane.read(start, end, flat[start:end])
        if not bool(torch.isfinite(flat[start:end].sum())):  # decompositions fail on NaN and Inf in their own words
            stack.blame(start, end)
    return flat.view(stack.shape)


def added(stack: Stack, change: Tensor, scale: float) -> Iterator[tuple[Block, Tensor]]:
    """The base plus `scale` times a whole merged change [out, in], in slices."""
    assert stack.base is not None
    flat = change.reshape(-1)
    nothing = torch.empty(0, 0)
    for start in range(0, stack.numel, 8 * BLOCK):
        stop = min(start + 8 * BLOCK, stack.numel)
        out = torch.empty(stop - start, dtype=stack.dtype)
        stack.base.read(start, stop, out)
        yield Block(start, stop, None, nothing), out.add_(flat[start:stop], alpha=scale)


def mean_added(stack: Stack, scale: float) -> Iterator[tuple[Block, Tensor]]:
    """The rule for everything that is no matrix: the base plus `scale` times the mean task vector, streamed."""
    for block in stack.blocks():
        assert block.base is not None
        yield block, block.base.add_(block.deltas().mean(0), alpha=scale)


def thin_svd(matrix: Tensor, rank: int, size: float | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The first `rank` singular triples: U [out, r], S [r], V^T [r, in].

    Those that rounding alone made are left out, so r may be smaller, down to 0. `size`: the norm of what `matrix` was
    computed from, where that is larger than the matrix.
    """
    u, s, vt = torch.linalg.svd(matrix, full_matrices=False)
    noise = 4 * torch.finfo(s.dtype).eps * max(matrix.shape) ** 0.5
    rank = min(rank, int((s > noise * (float(s[0]) if size is None else size)).sum()))
    return u[:, :rank].clone(), s[:rank].clone(), vt[:rank].clone()


def gram(columns: Tensor) -> Tensor:
    """X^T X in fp64, a slab of rows at a time."""
    found = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64)
    step = max(1, ROWS // max(columns.shape[1], 1))
    for start in range(0, columns.shape[0], step):
        slab = columns[start : start + step].double()
        found.addmm_(slab.t(), slab)
    return found


def inverse_root(squares: Tensor) -> tuple[Tensor, Tensor]:
    """G^(-1/2) of a Gram matrix (fp64), its null space left at zero, and the square roots of all its eigenvalues.

    X G^(-1/2) is the matrix with orthonormal columns nearest to X. Squaring costs digits: a direction of relative size s
    comes out with an error of about 2e-16 / s^2, so all are exact to fp32 down to s = 1e-4; below 1e-6 they are dropped.
    """
    values, vectors = torch.linalg.eigh(squares)
    values.clamp_(min=0)
    vectors *= torch.where(values > FLOOR * values[-1:], values.pow(-0.25), 0.0)
    return vectors @ vectors.t(), values.sqrt_()


def svd_copies(shape: tuple[int, ...]) -> float:
    """Copies of a matrix that its thin SVD takes: itself, LAPACK's copy, the factors and a workspace of 4 min(o, i)^2."""
    return 3 + 5 * squareness(shape)


def squareness(shape: tuple[int, ...]) -> float:
    """What a square matrix of the smaller side takes, in copies of this one: 1 where it is square itself."""
    return min(shape) / max(shape)
