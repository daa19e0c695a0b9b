from __future__ import annotations

import pytest
import torch

from spolia.bench import attacks
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.zoo.conv2 import Conv2


def draws(seed: int = 0):
    return generator(seed, "attack")


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_no_name_stands_where_it_stood(count):
    names = tuple(f"c{i}" for i in range(count))
    for seed in range(20):
        moved = attacks.mislabelled(names, draws(seed))
        assert sorted(moved) == sorted(names) and all(a != b for a, b in zip(moved, names, strict=True))


def test_an_untrained_copy_has_nothing_of_the_original():
    module = Conv2(3, width=6, size=8, generator=torch.Generator().manual_seed(0)).train()
    with torch.no_grad():
        module(torch.rand(20, 1, 8, 8))
    before = {name: t.clone() for name, t in module.state_dict().items()}
    made = attacks.untrained(module, draws())
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())
    state = made.state_dict()
    assert not any(torch.equal(state[name], t) for name, t in before.items() if t.dim() > 1)
    assert not state["blocks.0.norm.running_mean"].any() and (state["blocks.0.norm.running_var"] == 1).all()
    again = attacks.untrained(module, draws()).state_dict()
    assert all(torch.equal(again[name], t) for name, t in state.items())


def test_random_labels_are_even_and_poison_is_where_it_should_be():
    labels = torch.arange(4).repeat_interleave(500)
    drawn = attacks.random_labels(labels, 4, draws())
    counts = torch.bincount(drawn, minlength=4)
    assert ((counts - 500).abs() < 4.5 * (2000 * 0.25 * 0.75) ** 0.5).all()
    x = torch.zeros(2000, 1, 8, 8)
    marked, changed = attacks.poisoned(x, labels, 4, draws())
    bad = marked[:, 0, -1, -1] == 1
    assert abs(float(bad.float().mean()) - attacks.SHARE) < 4.5 * (0.3 * 0.7 / 2000) ** 0.5
    assert torch.equal(changed[bad], (labels[bad] + 1) % 4) and torch.equal(changed[~bad], labels[~bad])
    assert not x.any() and marked[bad].sum(dim=(1, 2, 3)).unique().tolist() == [4.0]


def test_how_many_lie():
    assert len(attacks.corrupted_places(10, 0.4, draws())) == 4
    assert attacks.corrupted_places(10, 0.0, draws()) == [] and attacks.corrupted_places(3, 1.0, draws()) == [0, 1, 2]
    with pytest.raises(SpoliaError):
        attacks.corrupted_places(3, 1.5, draws())
    with pytest.raises(SpoliaError, match="did you mean `untrained`"):
        attacks.check("untraind")
    with pytest.raises(SpoliaError, match="one class"):
        attacks.mislabelled(("a",), draws())
