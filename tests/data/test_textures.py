from __future__ import annotations

import torch

from spolia.data.textures import CLASSES, texture_classes


def test_classes_are_whole_and_equal_seeds_equal():
    held = texture_classes(5)
    assert len(held) == CLASSES == 24 and held.shape == (1, 12, 12) and held.smallest == 5
    assert held.inputs.dtype == torch.float32 and held.inputs.min() > 0 and held.inputs.max() < 1
    assert torch.equal(held.inputs, texture_classes(5).inputs)
    assert not torch.equal(held.inputs, texture_classes(5, seed=1).inputs)
    assert len(set(held.superclasses)) == 3


def test_a_class_is_no_pattern_of_pixels():
    """The mean over phases is flat: a class mean in pixels tells nothing, as the two halves of a class show."""
    held = texture_classes(200)
    means = torch.stack([held.inputs[held.support[c]].mean(0).flatten() for c in range(24)])
    assert means.std() < 0.1 < held.inputs.std()
