"""Rows with pictures: decoded when asked for, shown as CLIP wants them; labels without a picture."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from spolia.data.pictures import Look
from spolia.data.rows import RowPictures, labels
from spolia.parts.examples import Examples
from spolia.runs.importing import MEAN, STD, preprocessor


class Rows:
    """A data set that counts how often a picture is decoded."""

    def __init__(self, pictures: list[Any]):
        self.pictures, self.decoded = pictures, 0

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, place: int) -> dict[str, Any]:
        self.decoded += 1
        return {"image": self.pictures[place], "label": place % 3}

    def with_format(self, kind: str, columns: list[str]) -> Any:
        assert columns == ["label"]
        return _Column([i % 3 for i in range(len(self))])


class _Column:
    def __init__(self, values: list[int]):
        self.values = values

    def __getitem__(self, part: slice) -> dict[str, np.ndarray]:
        return {"label": np.array(self.values[part])}


@pytest.fixture
def rows() -> Rows:
    image = pytest.importorskip("PIL.Image")
    draws = np.random.default_rng(0)
    sizes = ((8, 8), (16, 12), (9, 30), (4, 4))
    return Rows([image.fromarray(draws.integers(0, 255, (h, w, 3)).astype(np.uint8)) for w, h in sizes])


def test_pictures_are_decoded_when_asked_for(rows: Rows) -> None:
    given = RowPictures(rows, [3, 0, 2], "image", Look.of(preprocessor(8), (8, 8), 3))
    examples = Examples(given, labels(rows, [3, 0, 2], "label"), name="x")
    assert len(examples) == 3 and rows.decoded == 0
    assert examples.labels_at([0, 1, 2]).tolist() == [0, 0, 2]
    assert rows.decoded == 0  # labels decode nothing
    assert examples.batch([1, 2]).shape == (2, 3, 8, 8) and rows.decoded == 2


def test_a_picture_of_the_right_size_is_only_whitened(rows: Rows) -> None:
    shown = RowPictures(rows, [0], "image", Look.of(preprocessor(8), (8, 8), 3))[0]
    pixels = torch.from_numpy(np.array(rows.pictures[0])).permute(2, 0, 1).double() / 255
    wanted = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert (shown - wanted).abs().max() < 1e-6  # fp32 rounding of numbers up to 2


def test_the_shorter_side_is_fitted_and_the_middle_kept(rows: Rows) -> None:
    """A wide picture of three stripes shows the middle one."""
    image = pytest.importorskip("PIL.Image")
    stripes = np.zeros((8, 24, 3), np.uint8)
    stripes[:, 8:16] = 255
    shown = Look.of(preprocessor(8), (8, 8), 3).shown(image.fromarray(stripes))
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    assert torch.allclose(shown, white.view(3, 1, 1).expand(3, 8, 8), atol=1e-6)  # fp32 rounding
