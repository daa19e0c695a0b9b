from __future__ import annotations

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from spolia.data.images import MEAN, STD, VARIABLE, data_folder, images, normalised, read_part, resized
from spolia.errors import SpoliaError

CLASSES = np.array(["left", "right", "straight"])


def colours(count: int, side: int = 32, seed: int = 0) -> np.ndarray:
    """uint8 [count, side, side, 3]: smooth, so that JPEG keeps them, with every value from 0 to 255."""
    draws = np.random.default_rng(seed)
    corners = draws.uniform(0, 255, (count, 2, 2, 3))
    at = np.linspace(0, 1, side)
    rows = corners[:, 0, None] * (1 - at)[:, None, None] + corners[:, 1, None] * at[:, None, None]  # [n, side, 2, 3]
    return (rows[:, :, 0, None] * (1 - at)[:, None] + rows[:, :, 1, None] * at[:, None]).round().astype(np.uint8)


def delta(pixels: np.ndarray) -> np.ndarray:
    """The lossless coding, one pixel at a time: [n, h, w, 3] to [n, 3, h, w]."""
    red, green, blue = (pixels[..., i].astype(int) for i in range(3))
    made = []
    for plane in (red - green, green, blue - green):
        before = np.concatenate([np.zeros_like(plane[..., :1]), plane[..., :-1]], -1)
        made.append((plane - before) % 256)
    return np.stack(made, 1).astype(np.uint8)


def jpeg(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    from PIL import Image

    files = []
    for image in pixels:
        stream = io.BytesIO()
        Image.fromarray(image).save(stream, "JPEG", quality=95)
        files.append(stream.getvalue())
    offsets = np.cumsum([0, *map(len, files)])
    return np.frombuffer(b"".join(files), np.uint8), offsets


def labels(count: int) -> np.ndarray:
    """Classes in turn."""
    return (np.arange(count) % len(CLASSES)).astype(np.uint8)


def write(folder: Path, name: str, arrays: Mapping[str, Any]) -> Path:
    np.savez_compressed(folder / f"{name}.npz", **arrays)
    return folder


def grey(folder: Path, count: int = 60, side: int = 28) -> Path:
    parts = {f"x_{part}": colours(n, side, n)[..., 0] for part, n in (("train", count), ("test", 12))}
    known = {"classes": CLASSES, "y_train": labels(count), "y_test": labels(12)}
    return write(folder, "grey", parts | known)


def coded(folder: Path, count: int = 12, **more: Any) -> Path:
    parts = {f"x_{part}_delta": delta(colours(count, seed=i)) for i, part in enumerate(("train", "test"))}
    known = {"classes": CLASSES, "y_train": labels(count), "y_test": labels(count)}
    return write(folder, "coded", parts | known | more)


def test_grey_images_come_three_times_with_a_black_border(tmp_path: Path):
    found = images("grey", folder=grey(tmp_path)).test
    assert found.x.shape == (12, 3, 32, 32) and found.x.dtype == torch.uint8 and found.y.dtype == torch.int64
    assert torch.equal(found.x[:, 0], found.x[:, 1]) and torch.equal(found.x[:, 0], found.x[:, 2])
    inner = torch.from_numpy(colours(12, 28, 12)[..., 0])
    assert torch.equal(found.x[:, 0, 2:30, 2:30], inner)
    assert int(found.x.long().sum()) == 3 * int(inner.long().sum()), "nothing outside"


def test_the_lossless_coding_gives_every_pixel_back(tmp_path: Path):
    wanted = colours(12)
    random = np.random.default_rng(3).integers(0, 256, (4, 32, 32, 3), dtype=np.uint8)  # wraps around everywhere
    wanted[:4] = random
    coded(tmp_path, x_train_delta=delta(wanted))
    found = read_part(tmp_path / "coded.npz", "train")
    assert np.array_equal(found.pixels.transpose(0, 2, 3, 1), wanted)
    assert found.labels.tolist() == labels(12).tolist() and found.groups.tolist() == list(range(12))


def test_jpeg_images_come_as_their_library_decodes_them(tmp_path: Path):
    wanted = colours(9, 64)
    data, offsets = jpeg(wanted)
    parts = {f"{name}_{part}": v for part in ("train", "test") for name, v in (("jpeg", data), ("offset", offsets))}
    write(tmp_path, "photos", {"classes": CLASSES, "y_train": labels(9), "y_test": labels(9)} | parts)
    found = read_part(tmp_path / "photos.npz", "train", 5)
    assert found.pixels.shape == (5, 3, 64, 64)
    # gradients at quality 95: colours are kept at half the resolution and rounded twice
    assert np.abs(found.pixels.transpose(0, 2, 3, 1).astype(int) - wanted[:5]).max() <= 12
    halved = images("photos", folder=tmp_path, most=5).test
    assert np.array_equal(halved.x.numpy(), resized(found.pixels, 32)) and len(halved) == 5


def test_splits_share_no_image_and_hold_their_shares_of_each_class(tmp_path: Path):
    folder = grey(tmp_path, 600)
    found = images("grey", 1, folder=folder, shares=(0.1, 0.2))
    parts = (found.train, found.validation, found.unlabelled)
    assert sorted(i for part in parts for i in part.index.tolist()) == list(range(600))
    assert all(part.index.tolist() == sorted(part.index.tolist()) for part in parts), "in the file's order"
    for part, size in zip(
        parts, (140, 20, 40), strict=True
    ):  # of 200 a class; what is due is carried, so one may pass on
        assert all(abs(count - size) <= 1 for count in torch.bincount(part.y).tolist())
        assert torch.equal(part.y, torch.from_numpy(labels(600))[part.index].long())
    assert found.classes == tuple(CLASSES)


def test_the_seed_shuffles_and_nothing_else_does(tmp_path: Path):
    folder = grey(tmp_path, 120)
    torch.manual_seed(1)
    first = images("grey", 3, folder=folder)
    torch.manual_seed(2)
    again, other = images("grey", 3, folder=folder), images("grey", 4, folder=folder)
    assert torch.equal(first.validation.index, again.validation.index)
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.validation.index, other.validation.index)
    assert torch.equal(first.test.x, other.test.x)


@pytest.mark.slow
def test_images_of_one_track_stay_together(tmp_path: Path):
    count, track = 300, np.arange(300) // 3 // 10  # ten of each class show one thing; numbers start anew in each class
    for seed in range(5):
        found = images("coded", seed, folder=coded(tmp_path, count, track_train=track.astype(np.uint8)))
        owner = np.empty(count, dtype=int)
        for number, part in enumerate((found.train, found.validation, found.unlabelled)):
            owner[part.index.numpy()] = number
        things = {(int(y), int(t)): set() for y, t in zip(labels(count), track, strict=True)}
        for y, t, own in zip(labels(count), track, owner, strict=True):
            things[int(y), int(t)].add(int(own))
        assert len(things) == 30 and all(len(own) == 1 for own in things.values())
        # 10 % and 15 % of 300, to half a thing
        assert abs(len(found.validation) - 30) <= 10 and abs(len(found.unlabelled) - 45) <= 10
        assert set(found.train.y.tolist()) == {0, 1, 2}


def test_a_class_of_one_thing_is_left_to_training(tmp_path: Path):
    track = np.zeros(12, np.uint8)
    found = images("coded", folder=coded(tmp_path, track_train=track), shares=(0.4, 0.4))
    assert len(found.train) == 12 and len(found.validation) == len(found.unlabelled) == 0
    assert found.validation.x.shape == (0, 3, 32, 32)


def test_sizes():
    x = np.arange(2 * 3 * 4 * 4, dtype=np.uint8).reshape(2, 3, 4, 4)
    assert resized(x, 4) is x
    half = resized(x, 2)
    assert half[0, 0].tolist() == [[3, 5], [11, 13]], "0 1 4 5 is 2.5 on average, and halves go up"
    assert resized(x, 8)[1, 2].tolist() == np.kron(x[1, 2], np.ones((2, 2), np.uint8)).tolist()
    assert resized(x, 7)[:, :, 1:5, 1:5].tolist() == x.tolist()
    assert resized(np.full((1, 3, 4, 4), 255, np.uint8), 2).min() == 255
    with pytest.raises(SpoliaError, match="images of 4 x 4"):
        resized(x, 3)


def test_normalised_pixels():
    x = torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 3, 1, 1)
    found = normalised(x)
    for i, (mean, std) in enumerate(zip(MEAN, STD, strict=True)):
        assert found[:, i].flatten().tolist() == pytest.approx([-mean / std, (1 - mean) / std], rel=1e-6)
    assert found.dtype == torch.float32


# --- mistakes --------------------------------------------------------------------------------------------------------


def test_where_the_data_are_must_be_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(SpoliaError, match=r"SPOLIA_DATA: is not set\n  mend: export SPOLIA_DATA="):
        images("grey")
    monkeypatch.setenv(VARIABLE, str(tmp_path / "nowhere"))
    with pytest.raises(SpoliaError, match="is no folder"):
        data_folder()
    monkeypatch.setenv(VARIABLE, str(grey(tmp_path)))
    assert data_folder() == tmp_path and len(images("grey").test) == 12


def test_a_misspelt_set_gets_the_near_one(tmp_path: Path):
    with pytest.raises(SpoliaError, match=r"there is no gray\.npz\n  mend: did you mean `grey`"):
        images("gray", folder=grey(tmp_path))


def test_shares_must_leave_something(tmp_path: Path):
    for shares in ((0.5, 0.5), (-0.1, 0.2)):
        with pytest.raises(SpoliaError, match="leaves nothing to train on"):
            images("grey", folder=tmp_path, shares=shares)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"y_train": labels(11)}, "11 labels beside images"),
        ({"y_train": np.full(12, 3, np.uint8)}, "labels from 3 to 3 for 3 classes"),
        ({"x_train_delta": delta(colours(12))[:, :2]}, "cannot be read"),
        ({"y_test": np.array([None] * 12)}, "cannot be read"),  # pickled: not unpacked
    ],
)
def test_an_unsound_file_is_named(tmp_path: Path, change: Mapping[str, Any], said: str):
    with pytest.raises(SpoliaError, match=said) as told:
        images("coded", folder=coded(tmp_path, **change))
    assert str(tmp_path / "coded.npz") in str(told.value)


def test_a_file_of_something_else_is_named(tmp_path: Path):
    write(tmp_path, "other", {"classes": CLASSES, "y_train": labels(3)})
    with pytest.raises(SpoliaError, match="jpeg_train is not a file in the archive"):
        images("other", folder=tmp_path)
    (tmp_path / "cut.npz").write_bytes((grey(tmp_path) / "grey.npz").read_bytes()[:-30])
    with pytest.raises(SpoliaError, match="cannot be read"):
        images("cut", folder=tmp_path)


def test_without_pillow_the_cure_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    data, offsets = jpeg(colours(3))
    write(tmp_path, "photos", {"classes": CLASSES, "y_train": labels(3), "jpeg_train": data, "offset_train": offsets})
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SpoliaError, match=r"Pillow is not installed\n  mend: pip install pillow"):
        read_part(tmp_path / "photos.npz", "train")


# --- the real files --------------------------------------------------------------------------------------------------

DATA = Path(os.environ.get(VARIABLE, "nowhere"))
REAL = {  # what the folder's own page says: classes, images of train and of test
    "cifar10": (10, 4000, 1000),
    "gtsrb": (43, 6180, 2090),
    "eurosat": (10, 6000, 2000),
    "rsscn7": (7, 4200, 1400),
    "dtd10": (10, 4000, 2000),
    "mnist": (10, 10_000, 10_000),
    "fashion_mnist": (10, 10_000, 10_000),
    "kmnist": (10, 8000, 2000),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_the_real_sets(name: str):
    if not (DATA / f"{name}.npz").is_file():
        pytest.skip(f"SPOLIA_DATA names no folder with {name}.npz")
    classes, train, test = REAL[name]
    found = images(name)
    parts = (found.train, found.validation, found.unlabelled)
    assert len(found.classes) == classes and len(found.test) == test and sum(map(len, parts)) == train
    for part in (*parts, found.test):
        assert part.x.shape[1:] == (3, 32, 32) and 0 < part.x.float().std() < 128
        assert len(part.y.unique()) == classes or part is not found.train
    # 10 % and 15 %, to half of the largest group: a traffic sign is seen 30 times
    assert abs(len(found.validation) - 0.1 * train) <= 15 and abs(len(found.unlabelled) - 0.15 * train) <= 15


@pytest.mark.slow
def test_the_real_photographs():
    if not (DATA / "tiny_imagenet100.npz").is_file():
        pytest.skip("SPOLIA_DATA names no folder with tiny_imagenet100.npz")
    found = images("tiny_imagenet100", most=200)
    assert len(found.classes) == 100 and len(found.test) == 200 and found.test.x.shape == (200, 3, 32, 32)
    assert len(found.test.y.unique()) == 100, "classes in turn"
