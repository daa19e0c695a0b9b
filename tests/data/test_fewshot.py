from __future__ import annotations

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spolia.data.fewshot import dataset_classes, digit_classes, fitted, folder_classes, omniglot, packed
from spolia.errors import SpoliaError
from spolia.parts.classes import joined
from spolia.parts.episode import EpisodeSampler

REAL = pytest.mark.skipif(not os.environ.get("SPOLIA_DATA"), reason="SPOLIA_DATA is not set")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Tiny files in the form of the packed sets: two alphabets of three characters, a grey set with six classes."""
    x = np.arange(6 * 4, dtype=np.uint8).reshape(6, 4, 1, 1) * np.ones((28, 28), dtype=np.uint8)
    named = {
        "alphabet": np.repeat(["Tifinagh", "Gurmukhi"], 3),
        "character": np.tile(np.arange(1, 4, dtype=np.uint8), 2),
    }
    np.savez(tmp_path / "omniglot28.npz", x=x, is_eval=np.repeat([False, True], 3), **named)
    labels = np.arange(24, dtype=np.uint8) % 6
    parts = {"train": labels, "test": labels[:12]}
    held = {f"y_{p}": y for p, y in parts.items()}
    held |= {
        f"x_{p}": (y * 10 + (p == "test")).astype(np.uint8)[:, None, None] * np.ones((32, 32), np.uint8)
        for p, y in parts.items()
    }
    for name in ("gtsrb", "plain"):
        np.savez(tmp_path / f"{name}.npz", classes=np.array(list("abcdef")), **held)
    return tmp_path


def test_omniglot_has_its_official_parts_and_alphabets(folder):
    background, evaluation, whole = (omniglot(p, folder=folder) for p in ("background", "evaluation", "all"))
    assert background.names == ("Tifinagh/character01", "Tifinagh/character02", "Tifinagh/character03")
    assert set(evaluation.superclasses) == {"Gurmukhi"} and len(whole) == 6
    assert not set(background.names) & set(evaluation.names)
    assert background.inputs.shape == (12, 1, 28, 28) and background.inputs.dtype == torch.uint8
    e = EpisodeSampler(evaluation, ways=3, shots=1, queries=3).episode(0)
    for x, c in zip(e.support_x, e.classes[e.support_y].tolist(), strict=True):
        assert int(x[0, 0, 0]) // 4 == 3 + c, "a drawing of another character"
    wide = omniglot("all", folder=folder, size=32, channels=3)
    assert wide.shape == (3, 32, 32) and not wide.inputs[:, :, :2].any()
    a, b = whole.split((0.5, 0.5), by="superclass")
    assert len(set(a.superclasses)) == len(set(b.superclasses)) == 1
    with pytest.raises(SpoliaError, match="did you mean `evaluation`"):
        omniglot("evaluate", folder=folder)


def test_packed_sets_join_their_parts_or_keep_them_apart(folder):
    plain, signs = packed("plain", folder=folder), packed("gtsrb", folder=folder)
    assert len(plain) == 6 and plain.smallest == 6 and not plain.apart
    assert signs.apart and not packed("gtsrb", folder=folder, apart=False).apart
    e = EpisodeSampler(signs, ways=3, shots=3, queries=2).batch(range(10))
    assert not (e.support_x % 10).any() and (e.query_x % 10 == 1).all()
    grey = packed("plain", folder=folder, channels=1, size=16)
    assert grey.shape == (1, 16, 16) and torch.equal(grey.inputs[:, 0, 0, 0], plain.inputs[:, 0, 0, 0])
    with pytest.raises(SpoliaError, match="there is no plan"):
        packed("plan", folder=folder)


def test_sets_read_alike_meet_in_one_sampler(folder):
    letters, signs = omniglot("all", folder=folder, size=32, channels=3), packed("plain", folder=folder)
    assert len(joined({"letters": letters, "signs": signs})) == 12
    assert EpisodeSampler([letters, signs], ways=3, queries=2).draw(4, 0).support_x.shape == (4, 3, 3, 32, 32)
    with pytest.raises(SpoliaError, match="inputs differ"):
        EpisodeSampler([omniglot("all", folder=folder), signs], ways=3, queries=2)


def test_fitted_converts_as_it_says():
    colour = np.zeros((1, 3, 4, 4), dtype=np.uint8)
    colour[0, 0], colour[0, 1] = 100, 50
    assert fitted(colour, 4, 1)[0, 0, 0, 0] == round(0.299 * 100 + 0.587 * 50)
    equal = np.full((1, 3, 4, 4), 77, dtype=np.uint8)
    assert (fitted(equal, 4, 1) == 77).all() and fitted(equal[:, :1], 8, 3).shape == (1, 3, 8, 8)
    with pytest.raises(SpoliaError, match="1 for grey or 3"):
        fitted(equal, 4, 2)


def test_a_folder_of_images_by_class(tmp_path):
    image = pytest.importorskip("PIL.Image")
    for i, name in enumerate(["Greek/alpha", "Greek/beta", "Latin/a"]):
        (tmp_path / name).mkdir(parents=True)
        for k in range(3):
            image.new("RGB", (20, 10), (40 * i, k, 0)).save(tmp_path / name / f"{k}.png")
    (tmp_path / "Greek" / "alpha" / "notes.txt").write_text("no image")
    held = folder_classes(tmp_path, size=8)
    assert held.names == ("Greek/alpha", "Greek/beta", "Latin/a") and held.superclasses == ("Greek", "Greek", "Latin")
    assert held.shape == (3, 8, 8) and held.inputs.dtype == torch.uint8 and held.smallest == 3
    assert held.inputs[:, 0, 0, 0].tolist() == [0] * 3 + [40] * 3 + [80] * 3
    assert folder_classes(tmp_path / "Greek", size=8, channels=1).superclasses is None
    for k in (0, 1):
        (tmp_path / "Latin" / "a" / f"{k}.png").write_bytes(b"broken")
    with pytest.raises(SpoliaError, match=r"0.png: cannot be read(.|\n)*1.png: cannot be read"):
        folder_classes(tmp_path, size=8)


@pytest.mark.parametrize("make", [lambda p: p / "nowhere", lambda p: p])
def test_a_folder_without_images_is_told(tmp_path, make):
    with pytest.raises(SpoliaError, match=r"is no folder|holds no folders of images"):
        folder_classes(make(tmp_path), size=8)


class Table:
    """What the reader asks of a loaded set of `datasets`."""

    column_names = ("image", "fine_label")
    features = {"fine_label": SimpleNamespace(names=["ant", "bee", "cat"])}  # noqa: RUF012 - as theirs

    def __init__(self, image):
        self.rows = [(image.new("L", (9, 9), 10 * k), (0, 2)[k % 2]) for k in range(6)]

    def __getitem__(self, column):
        return [label for _, label in self.rows]

    def __iter__(self):
        return ({"image": image, "fine_label": label} for image, label in self.rows)


def test_a_set_of_datasets_by_object_and_by_name(monkeypatch):
    table = Table(pytest.importorskip("PIL.Image"))
    held = dataset_classes(table, size=9, channels=1, label="fine_label")
    assert held.names == ("ant", "cat") and held.inputs[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    with pytest.raises(SpoliaError, match="no column `label`"):
        dataset_classes(table, size=9)
    asked = []
    fake = SimpleNamespace(load_dataset=lambda name, split: asked.append((name, split)) or table)
    monkeypatch.setitem(sys.modules, "datasets", fake)
    assert len(dataset_classes("owner/set", size=9, label="fine_label", split="test")) == 2
    assert asked == [("owner/set", "test")]
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        SpoliaError, match="owner/set: is loaded by `datasets`, which is not installed\n  mend: pip install"
    ):
        dataset_classes("owner/set", size=9)


def test_digits_are_all_there_and_shares_of_ink():
    held = digit_classes()
    assert len(held) == 10 and held.inputs.shape == (1797, 1, 8, 8) and held.smallest == 174
    assert held.inputs.min() == 0 and held.inputs.max() == 1
    assert torch.equal(held.inputs, digit_classes().inputs)
    train, test = held.split((0.5, 0.5), seed=0)
    assert not set(train.names) & set(test.names)


@REAL
@pytest.mark.slow
def test_the_real_sets_are_what_their_papers_say():
    background, evaluation = omniglot("background"), omniglot("evaluation")
    assert (len(background), len(evaluation), background.smallest) == (964, 659, 20)
    assert (len(set(background.superclasses)), len(set(evaluation.superclasses))) == (30, 20)
    assert not set(background.superclasses) & set(evaluation.superclasses)
    signs = packed("gtsrb", most=430)
    assert len(signs) == 43 and signs.apart and signs.shape == (3, 32, 32)
    pytest.importorskip("PIL")
    small = packed("tiny_imagenet100", most=300)
    assert len(small) == 100 and small.shape == (3, 32, 32) and small.smallest == 6
