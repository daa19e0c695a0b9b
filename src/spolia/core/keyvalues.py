"""Keys and values of the tokens a decoder has read: memory set aside once, rows chosen anew only where they move.

    [positions, layers, 2, rows, heads, size], filled up to `length`

Positions come first, so that what was read is one piece: a new choice of rows is one copy into a spare of equal size. Rows
of unequal length are filled up on the left; `fill` says by how much, and `mask` hides it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from spolia.core.lazy import torch
from spolia.errors import SpoliaError

if TYPE_CHECKING:
    from torch import Tensor


class KeyValues:
    """Room for `positions` tokens of up to `rows` sequences; grows when more rows are chosen."""

    def __init__(self, positions: int, layers: int, rows: int, heads: int, size: int, like: Tensor):
        self.positions, self.rows, self.length = positions, rows, 0
        self.fill: Tensor | None = None  # [rows], filling on the left; None where there is none
        self._shape = (positions, layers, 2, rows, heads, size)
        self._held = like.new_empty(self._shape)
        self._spare: Tensor | None = None

    def reserve(self, count: int) -> None:
        """`count` more positions begin; every layer then writes its own."""
        if self.length + count > self.positions:
            what = f"{self.length + count} tokens, where room was made for {self.positions}"
            raise SpoliaError(what, where="cache", mend="start again with more positions")
        self.length += count

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """Keep key and value [rows, heads, new, size] of the newest positions; all so far [rows, heads, length, size]."""
        new = key.shape[2]
        held = self._held[: self.length, layer, :, : self.rows]  # [length, 2, rows, heads, size]
        held[-new:, 0], held[-new:, 1] = key.permute(2, 0, 1, 3), value.permute(2, 0, 1, 3)
        return held[:, 0].permute(1, 2, 0, 3), held[:, 1].permute(1, 2, 0, 3)

    def select(self, parents: Tensor) -> None:
        """Rows become rows `parents` [rows']: copied only where that moves any."""
        count = len(parents)
        if count == self.rows and torch.equal(parents, torch.arange(count, device=parents.device)):
            return
        if self.fill is not None:
            self.fill = self.fill[parents]
        room = self._held.shape[3]
        if self._spare is None or self._spare.shape[3] < count:
            shape = (*self._shape[:3], max(count, room), *self._shape[4:])
            self._spare = self._held.new_empty(shape)
        spare = self._spare[: self.length, :, :, :count]
        spare.copy_(self._held[: self.length].index_select(3, parents))
        self._held, self._spare = self._spare, self._held
        self.rows = count

    def places(self, count: int, device: torch.device) -> Tensor:
        """Positions of the newest `count` tokens, filling not counted: [count], or [rows, count]."""
        places = torch.arange(self.length - count, self.length, device=device)
        return places if self.fill is None else (places - self.fill[:, None]).clamp(min=0)

    def mask(self, count: int, device: torch.device) -> Tensor | None:
        """Who of the newest `count` tokens sees whom, bool [rows or 1, 1, count, length]; None where all see all."""
        if self.fill is None and count == 1:
            return None
        now = torch.arange(self.length - count, self.length, device=device)[:, None]
        then = torch.arange(self.length, device=device)
        seen = then <= now  # [count, length]
        if self.fill is None:
            return seen[None, None]
        own = seen & (then >= self.fill[:, None, None])  # [rows, count, length]
        return (own | (then == now))[:, None]  # filling sees itself: a softmax over nothing is no number
