from __future__ import annotations

import sys

import pytest
import torch

from spolia.data import digits as module
from spolia.data.digits import DOMAINS, SIZES, digits
from spolia.errors import SpoliaError

PARTS = ("base", "train", "validation", "test")


def test_an_image_is_in_one_split_only_whatever_the_domain():
    for seed in (0, 5):
        every = [digits(domain, seed) for domain in DOMAINS]
        for part in PARTS:
            assert len({tuple(getattr(s, part).index.tolist()) for s in every}) == 1
        indices = [set(getattr(every[0], part).index.tolist()) for part in PARTS]
        assert [len(i) for i in indices] == list(SIZES.values())
        assert set.union(*indices) == set(range(1797))  # sizes add up to 1797, so none is in two


def test_the_seed_shuffles_and_nothing_else_does():
    torch.manual_seed(1)
    first = digits("noisy", 3)
    torch.manual_seed(2)
    again, other = digits("noisy", 3), digits("noisy", 4)
    assert torch.equal(first.train.x, again.train.x)
    assert not torch.equal(first.train.index, other.train.index)


def test_domains_show_the_same_scan_in_their_own_way():
    shown = {domain: digits(domain).test for domain in DOMAINS}
    upright = shown["upright"].x.reshape(-1, 8, 8)
    assert upright.min() == -1 and upright.max() == 1
    assert torch.equal(shown["inverted"].x.reshape(-1, 8, 8), -upright)
    assert torch.equal(shown["mirrored"].x.reshape(-1, 8, 8)[:, :, 0], upright[:, :, 7])
    assert torch.equal(shown["turned"].x.reshape(-1, 8, 8)[:, 7, :], upright[:, :, 0])  # the left edge lies below
    assert torch.equal(shown["permuted"].x.sort(1).values, shown["upright"].x.sort(1).values)
    assert not torch.equal(shown["permuted"].x, shown["upright"].x)
    noise = shown["noisy"].x - shown["upright"].x
    # 38,400 draws: the standard deviation is known to 0.3 / sqrt(2 * 38400) = 0.0011; six of those
    assert abs(noise.std().item() - module.NOISE) < 0.0065
    assert all(torch.equal(split.y, shown["upright"].y) for split in shown.values())
    assert set(shown["upright"].y.tolist()) == set(range(10))


def test_a_misspelt_domain_gets_the_near_one():
    with pytest.raises(SpoliaError, match="did you mean `turned`"):
        digits("turnd")


def test_without_scikit_learn_the_cure_is_named(monkeypatch):
    module._scans.cache_clear()
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(SpoliaError, match=r"pip install 'spolia\[digits\]'"):
        digits("upright")
