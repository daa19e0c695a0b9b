"""Arrays, tables, data sets by name and folders of images: read by header first, refused by name."""

from __future__ import annotations

import gzip
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch

from spolia.data import tables
from spolia.data.pictures import Look, Pictures, classes_in
from spolia.errors import SpoliaError


def test_headers_of_arrays_are_read_without_values(tmp_path: Path) -> None:
    file = tmp_path / "a.npz"
    np.savez_compressed(file, x=np.zeros((7, 3, 2), np.float32), y=np.arange(7))
    heads = tables.array_heads(file)
    assert heads == {"x": ((7, 3, 2), np.dtype(np.float32)), "y": ((7,), np.dtype(np.int64))}
    assert tables.read_arrays(file, ["y"], 3)["y"].tolist() == [0, 1, 2]
    with file.open("r+b") as stream:
        stream.truncate(60)
    with pytest.raises(SpoliaError, match="cannot be read"):
        tables.array_heads(file)


def test_pickled_arrays_are_not_opened(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=np.array([{}], dtype=object))
    with pytest.raises(SpoliaError, match="cannot be read"):
        tables.read_arrays(tmp_path / "a.npz", ["x"])


def test_usual_names_are_found_and_others_must_be_said() -> None:
    assert tables.named_arrays(["y", "x"], None, None) == ["x"]
    assert tables.named_arrays(["attention_mask", "input_ids", "labels"], None, None) == ["input_ids", "attention_mask"]
    assert tables.named_arrays(["x_train", "x_test"], None, "test") == ["x_test"]
    assert tables.named_arrays(["a", "b"], ["b", "a"], None) == ["b", "a"]
    assert tables.named_labels(["x", "labels"], None, None, "array") == "labels"
    assert tables.named_labels(["x_test", "y_test"], None, "test", "array") == "y_test"
    assert tables.named_texts(["split", "sentence"], None) == ["sentence"]
    for call, what in (
        (lambda: tables.named_arrays(["a"], None, None), "none of the arrays"),
        (lambda: tables.named_arrays(["pixels"], "pixel", None), "no array `pixel`"),
        (lambda: tables.named_labels(["x"], None, None, "array"), "no array looks like labels"),
        (lambda: tables.named_texts(["a"], None), "none of the columns"),
    ):
        with pytest.raises(SpoliaError, match=what):
            call()


ROWS = [("train", "1", "one, two"), ("test", "0", 'three "four"'), ("test", "1", "five")]


@pytest.mark.parametrize("packed", [False, True])
def test_tables_of_every_form_hold_the_same(tmp_path: Path, packed: bool) -> None:
    quoted = [
        [f'"{cell}"' for cell in row] for row in (("train", "1", "one, two"), ("test", "0", 'three ""four""'), ROWS[2])
    ]
    texts = {
        "a.tsv": "split\tlabel\ttext\n" + "".join("\t".join(row) + "\n" for row in ROWS),
        "a.csv": "split,label,text\n" + "".join(",".join(row) + "\n" for row in quoted),
        "a.jsonl": "".join(
            f'{{"split": "{a}", "label": "{b}", "text": {c!r}}}\n'.replace("'", '"') for a, b, c in ROWS[::2]
        ),
    }
    for name, text in texts.items():
        file = tmp_path / (f"{name}.gz" if packed else name)
        file.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        assert tables.kind_of(file) == "table" and tables.columns(file) == ["split", "label", "text"]
        found = tables.read_columns(file, ["text", "label"], "test")
        assert found["text"][-1] == "five" and found["label"][-1] == "1"
        assert len(found["text"]) == (1 if "jsonl" in name else 2)
        if "jsonl" not in name:
            assert found["text"][0] == 'three "four"'
        assert len(tables.read_columns(file, ["text"], None, 1)["text"]) == 1


def test_a_text_file_is_one_column(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\n\ntwo\n")
    assert tables.columns(tmp_path / "a.txt") == ["text"]
    assert tables.read_columns(tmp_path / "a.txt", ["text"])["text"] == ["one", "two"]


def test_a_short_row_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("label\ttext\n1\n")
    with pytest.raises(SpoliaError, match="a row lacks `text`"):
        tables.read_columns(tmp_path / "a.tsv", ["text"])


def test_data_sets_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if it were not installed
    with pytest.raises(SpoliaError, match=r"which is not installed\n.*pip install .spolia\[data\]"):
        tables.read_dataset("glue", "sst2", "train")
    asked = []

    def load(name: str, config: str | None, split: str) -> list[str]:
        asked.append((name, config, split))
        if name == "gone":
            raise ConnectionError("no route")
        return ["row"]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    assert tables.read_dataset("glue", "sst2", "train") == ["row"] and asked == [("glue", "sst2", "train")]
    with pytest.raises(SpoliaError, match="ConnectionError: no route"):
        tables.read_dataset("gone", None, "train")
    with pytest.raises(SpoliaError, match="no part of it is named"):
        tables.read_dataset("glue", None, None)


# --- images ----------------------------------------------------------------------------------------------------------


def pictures(folder: Path) -> Path:
    image = pytest.importorskip("PIL.Image")
    draws = np.random.default_rng(0)
    for name, size in (("cat", (20, 30)), ("dog", (30, 20))):
        (folder / name).mkdir(parents=True)
        for k in range(2):
            image.fromarray(draws.integers(0, 256, (*size, 3), dtype=np.uint8)).save(folder / name / f"{k}.png")
    (folder / "empty").mkdir()
    return folder


def test_a_folder_a_class(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "set")
    assert {name: len(files) for name, files in classes_in(folder).items()} == {"cat": 2, "dog": 2}
    with pytest.raises(SpoliaError, match="no folders of images"):
        classes_in(folder / "empty")


@pytest.mark.slow
@pytest.mark.parametrize(
    "told",
    [
        {"size": {"height": 8, "width": 8}, "image_mean": [0.5] * 3, "image_std": [0.25] * 3, "resample": 2},
        {"size": {"shortest_edge": 10}, "crop_size": {"height": 8, "width": 8}, "do_center_crop": True, "resample": 3}
        | {"image_mean": [0.48, 0.45, 0.4], "image_std": [0.26, 0.26, 0.27]},
    ],
)
def test_images_look_as_transformers_shows_them(tmp_path: Path, told: dict) -> None:
    from PIL import Image

    hf = pytest.importorskip("transformers")
    kind = getattr(hf, "CLIPImageProcessorPil" if told.get("crop_size") else "ViTImageProcessorPil", None)
    if kind is None:
        pytest.skip("this release has no processor without torchvision")
    folder = pictures(tmp_path / "set")
    files = [file for group in classes_in(folder).values() for file in group]
    shown = Pictures(files, Look.of(told, (8, 8), 3))
    for place, file in enumerate(files):
        wanted = kind(**told)(Image.open(file), return_tensors="pt")["pixel_values"][0]
        torch.testing.assert_close(shown[place], wanted, rtol=0, atol=1e-5)  # fp32, in another order


def test_grey_models_and_plain_pixels(tmp_path: Path) -> None:
    folder = pictures(tmp_path / "set")
    shown = Pictures(classes_in(folder)["cat"], Look.of(None, (8, 8), 1))
    assert shown[0].shape == (1, 8, 8) and 0 <= shown[0].min() <= shown[0].max() <= 1
    (folder / "cat" / "0.png").write_bytes(b"no image")
    with pytest.raises(SpoliaError, match="cannot be read"):
        shown[0]
