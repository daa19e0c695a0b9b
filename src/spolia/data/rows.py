"""Data sets of rows with a picture in them, as `datasets` gives them: pictures are decoded one at a time, when asked for.

So no set has to fit into memory. How a picture is shown is said by a Look (data/pictures.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from spolia.core.lazy import np, torch
from spolia.data.pictures import Look

if TYPE_CHECKING:
    from torch import Tensor


class RowPictures:
    """The pictures of `rows[places]` as inputs [channels, h, w]. Rows are mappings with a PIL image in `column`."""

    def __init__(self, rows: Any, places: Sequence[int], column: str, look: Look):
        self.rows, self.places, self.column, self.look = rows, places, column, look

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, place: int) -> Tensor:
        return self.look.shown(self.rows[int(self.places[place])][self.column])


def labels(rows: Any, places: Sequence[int], column: str) -> Tensor:
    """The labels [n] of `rows[places]`. Only their column is read: no picture is decoded."""
    whole = np.asarray(rows.with_format("numpy", columns=[column])[:][column])
    return torch.from_numpy(whole[np.asarray(places, dtype=np.int64)].astype(np.int64))
