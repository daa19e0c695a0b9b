"""Texts cut into frames, and frames into batches of one length: what links send."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from spolia.bench.link import Batch
from spolia.core.lazy import torch
from spolia.core.seeds import generator

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.parts.textcode_tokens import Tokenizer

SHORTEST, LONGEST = 4, 64  # tokens of a frame that is a sentence; longer ones are cut


@dataclass(frozen=True)
class Frame:
    """Tokens that are sent together, and those that the receiver knows to stand before them."""

    tokens: list[int]
    before: list[int]


def cut(texts: Iterable[str], tokenizer: Tokenizer, length: int | None, context: int = 0) -> list[Frame]:
    """Windows of `length` tokens that follow each other within a text; or whole texts, those too long in pieces."""
    found, before = [], list[int]()
    for text in texts:
        own, size = tokenizer.encode(text), length or LONGEST
        for start in range(0, len(own), size):
            piece = own[start : start + size]
            if len(piece) == length or (length is None and len(piece) >= SHORTEST):
                found.append(Frame(piece, before))
            before = [*before, *piece][-context:] if context else []
    return found


def chosen(frames: Sequence[Frame], most: int, seed: int, purpose: str) -> list[Frame]:
    """`most` of the frames, in random order."""
    order = generator(seed, "link", purpose).permutation(len(frames))[:most]
    return [frames[i] for i in order.tolist()]


def batches(frames: Sequence[Frame], size: int, seed: int) -> list[Batch]:
    """Batches of frames of one length, in random order: early batches are as mixed as late ones."""
    groups = by_length(frames)
    parts = [own[start : start + size] for own in groups.values() for start in range(0, len(own), size)]
    order = generator(seed, "link", "batches").permutation(len(parts)).tolist()
    return [Batch(tokens_of(parts[i]), [frame.before for frame in parts[i]]) for i in order]


def by_length(frames: Iterable[Frame]) -> dict[int, list[Frame]]:
    groups: dict[int, list[Frame]] = {}
    for frame in frames:
        groups.setdefault(len(frame.tokens), []).append(frame)
    return groups


def tokens_of(frames: Sequence[Frame]) -> Tensor:
    """Frames of one length as int64 [N, T]."""
    return torch.tensor([frame.tokens for frame in frames], dtype=torch.int64)
