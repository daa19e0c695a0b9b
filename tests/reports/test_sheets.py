from __future__ import annotations

import base64

import numpy as np
import pytest

from spolia.reports.figures import describe, drawable, read_figure, to_csv
from spolia.reports.plots import draw, is_wide
from spolia.reports.sheets import tiled


def sheet(columns: int = 3, shape=(3, 4, 5), **changed) -> dict:
    rows = 2
    pixels = np.arange(rows * columns * np.prod(shape), dtype=np.int64) % 251
    data = {
        "kind": "images",
        "title": "Images",
        "rows": [f"class {i}" for i in range(rows)],
        "columns": [str(i) for i in range(columns)],
        "shape": list(shape),
        "pixels": base64.b64encode(pixels.astype(np.uint8).tobytes()).decode(),
    }
    return data | changed


def test_pixels_stand_where_they_belong():
    figure = read_figure(sheet())
    whole = tiled(2, 3, figure.shape, figure.pixels)
    assert whole.shape == (2 * 5 - 1, 3 * 6 - 1, 3)
    raw = np.frombuffer(figure.pixels, dtype=np.uint8).reshape(2, 3, 3, 4, 5)
    np.testing.assert_array_equal(whole[5:9, 6:11], raw[1, 1].transpose(1, 2, 0))
    assert (whole[4] == 128).all() and (whole[:, 5] == 128).all(), "gaps"
    grey = read_figure(sheet(shape=(1, 4, 4)))
    shown = tiled(2, 3, grey.shape, grey.pixels)
    assert (shown[..., 0] == shown[..., 2]).all()


def test_a_sheet_is_drawn_described_and_written():
    figure = read_figure(sheet())
    svg = draw(figure, "one")
    assert svg.startswith("<svg") and "<image" in svg and "class 1" in svg and svg == draw(figure, "one")
    assert describe(figure) == "3 images each of class 0, class 1."
    lines = to_csv(figure).splitlines()
    assert lines[0] == "row,column,mean,deviation" and len(lines) == 7
    assert drawable(figure) == (figure, "") and not is_wide(figure)
    assert is_wide(read_figure(sheet(columns=10)))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"shape": [3, 4]}, "channels, height, width"),
        ({"shape": [2, 4, 5]}, "2 channels"),
        ({"pixels": "#"}, "base64"),
        ({"pixels": ""}, "0 pixels, 360 are named"),
        ({"rows": []}, "no rows"),
    ],
)
def test_what_cannot_be_drawn_says_why(changed, said):
    with pytest.raises(ValueError, match=said):
        read_figure(sheet(**changed))
