"""Streams: who owns which ids, what does not depend on what ran before, and boundaries that go away."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from spolia.errors import SpoliaError
from spolia.parts.domains import permutations, rotations
from spolia.parts.stream import Stream, class_incremental, domain_incremental, domains

Data = tuple[Tensor, Tensor]


def data(each: int = 10, classes: int = 6) -> tuple[Data, Data]:
    """Inputs that say their raw label and their number: train and test."""
    y = torch.arange(classes).repeat(each) + 100
    x = torch.stack([y.float(), torch.arange(len(y)).float()], 1)
    return (x, y), (x[: len(x) // 2] + 0.25, y[: len(y) // 2])


def labels(stream: Stream) -> list[list[int]]:
    return [sorted(set(e.batch(slice(None)).y.tolist())) for e in stream.experiences]


def test_every_task_owns_a_range_of_ids() -> None:
    stream = class_incremental(*data(), tasks=3)
    assert labels(stream) == [[0, 1], [2, 3], [4, 5]] == [list(e.classes) for e in stream.experiences]
    assert stream.order == (100, 101, 102, 103, 104, 105) and stream.classes == 6
    for experience, test in zip(stream.experiences, stream.tests, strict=True):
        for batch in (experience.batch(slice(None)), test.examples.batch(slice(None))):
            assert [stream.order[i] for i in batch.y.tolist()] == batch.x[:, 0].int().tolist()
    assert sum(len(e.train) for e in stream.experiences) == 60


def test_the_order_is_drawn_from_the_seed_alone_and_stored() -> None:
    np.random.seed(1)
    torch.manual_seed(1)
    first = class_incremental(*data(), tasks=3, shuffle=True, seed=5)
    np.random.seed(2)
    torch.manual_seed(2)
    again = class_incremental(*data(), tasks=3, shuffle=True, seed=5)
    other = class_incremental(*data(), tasks=3, shuffle=True, seed=6)
    assert first.order == again.order != other.order
    assert first.about() == again.about()
    given = class_incremental(*data(), tasks=3, order=first.order)
    assert [e.batch(slice(None)).x.tolist() for e in given.experiences] == [
        e.batch(slice(None)).x.tolist() for e in first.experiences
    ]


def test_an_epoch_has_every_example_once_and_a_batch_follows_from_its_step() -> None:
    experience = class_incremental(*data(), tasks=3).experiences[1]
    steps = experience.steps(7, 2)
    drawn = [experience.draw(7, 3, step).x[:, 1].int().tolist() for step in range(steps)]
    flat = [i for batch in drawn for i in batch]
    assert sorted(flat[:20]) == sorted(flat[20:40]) == sorted(experience.batch(slice(None)).x[:, 1].int().tolist())
    assert experience.draw(7, 3, 4).x[:, 1].int().tolist() == drawn[4]
    assert experience.draw(7, 4, 0).x[:, 1].int().tolist() != drawn[0]


def test_few_shots_after_the_base() -> None:
    stream = class_incremental(*data(), tasks=[4, 1, 1], shots=3, seed=2)
    assert [len(e.train) for e in stream.experiences] == [40, 3, 3]
    assert labels(stream) == [[0, 1, 2, 3], [4], [5]]
    assert [len(t.examples) for t in stream.tests] == [20, 5, 5]


def test_permuted_domains_share_their_orders_with_their_tests() -> None:
    x = torch.arange(24.0).view(4, 6)
    y = torch.tensor([0, 1, 0, 1])
    changes = permutations(3, 6, seed=4)
    stream = domain_incremental((x, y), (x, y), changes, seed=4)
    for experience, test in zip(stream.experiences, stream.tests, strict=True):
        shown = experience.batch(slice(None)).x
        assert torch.equal(shown, test.examples.batch(slice(None)).x)
        assert torch.equal(shown.sort(1).values, x) and not torch.equal(shown, x)
    again = permutations(3, 6, seed=4)
    assert all(torch.equal(changes[name](x), again[name](x)) for name in changes)
    assert next(iter(permutations(3, 6, first=False).values())) is None


def test_rotations_turn_images_and_keep_their_type() -> None:
    image = torch.zeros(1, 9, 9, dtype=torch.uint8)
    image[0, 4, 7] = 200  # right of the middle
    (change,) = rotations(1, most=180.0, seed=0).values()
    assert change(image).dtype == torch.uint8 and change(image).shape == image.shape
    from spolia.parts.domains import _Rotation

    turned = _Rotation(np.pi / 2)(image.float())
    assert turned[0, 1, 4] == pytest.approx(200, abs=0.1)  # to the left: now above; between pixels by fp32 sums
    assert torch.allclose(turned[0], torch.rot90(image[0].float()), atol=0.1)


def test_domains_of_several_sets() -> None:
    (x, y), (tx, ty) = data()
    stream = domains({"one": ((x, y - 100), (tx, ty - 100)), "two": ((x + 1, y - 100), (tx + 1, ty - 100))})
    assert (
        stream.scenario == "domain" and stream.classes == 6 and [e.name for e in stream.experiences] == ["one", "two"]
    )


@pytest.mark.parametrize("change", [False, True])
def test_without_boundaries_every_example_comes_once(change: bool) -> None:
    (x, y), test = data()
    stream = class_incremental((x, y), test, tasks=3)
    if change:
        stream = domain_incremental((x, y), test, [None, lambda x: x + 1000], seed=0)
    free = stream.without_boundaries()
    (only,) = free.experiences
    assert only.task is None and only.ordered and only.steps(8, 5) == -(-len(only.train) // 8)
    drawn = torch.cat([only.draw(8, 0, step).x[:, 1] for step in range(only.steps(8, 1))])
    parts = [e.batch(slice(None)).x[:, 1] for e in stream.experiences]
    assert sorted(drawn.tolist()) == sorted(torch.cat(parts).tolist())
    assert sorted(drawn[: len(parts[0])].tolist()) == sorted(parts[0].tolist())
    blurred = stream.without_boundaries(blur=0.3).experiences[0].batch(slice(None)).x[:, 1]
    assert sorted(blurred.tolist()) == sorted(drawn.tolist())
    assert sorted(blurred[: len(parts[0])].tolist()) != sorted(parts[0].tolist())


def test_arrays_serve_as_tensors_do() -> None:
    train, test = data()
    arrays = class_incremental(*((x.numpy(), y.numpy()) for x, y in (train, test)), tasks=2)
    tensors = class_incremental(train, test, tasks=2)
    assert torch.equal(arrays.experiences[1].batch(slice(None)).x, tensors.experiences[1].batch(slice(None)).x)


def test_what_is_wrong_is_said() -> None:
    (x, y), test = data()
    with pytest.raises(SpoliaError, match="6 classes into 4 tasks"):
        class_incremental((x, y), test, tasks=4)
    with pytest.raises(SpoliaError, match="order"):
        class_incremental((x, y), test, tasks=3, order=[100, 101])
    with pytest.raises(SpoliaError, match="in no training data"):
        class_incremental((x[y < 105], y[y < 105]), test, tasks=5)
    with pytest.raises(SpoliaError, match="labels"):
        class_incremental(x, test, tasks=3)
    with pytest.raises(SpoliaError, match="shots"):
        class_incremental((x, y), test, tasks=3, shots=11)
