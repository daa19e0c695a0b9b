from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.journal import Journal
from spolia.errors import SpoliaError
from spolia.parts.imagestore import ImageStore, StoreEpisodes

SHAPE = (1, 2, 2)


def filled(classes: int = 4, each: int = 6, experts: int = 2, per_class: int = 12) -> ImageStore:
    """Every image is of one grey that no other image has."""
    store, grey = ImageStore(classes, SHAPE, per_class), 0
    for expert in range(experts):
        for key in range(classes):
            for _ in range(each):
                store.add(torch.full((1, *SHAPE), grey / 255), torch.tensor([key]), expert=expert, step=expert)
                grey += 1
    return store


def greys(store: ImageStore, key: int) -> list[int]:
    return [int(image[0, 0, 0]) for image in store.at(key, store.places(key))]


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5), st.integers(0, 3)), max_size=12), st.integers(1, 6))
def test_a_class_holds_its_newest_images_and_no_more(visits, per_class):
    store, seen, grey = ImageStore(3, SHAPE, per_class), {0: [], 1: [], 2: []}, 0
    for key, count, expert in visits:
        new = [(grey + i) % 256 for i in range(count)]
        images = torch.tensor(new).view(-1, 1, 1, 1).expand(-1, *SHAPE) / 255
        store.add(images, torch.full((count,), key), expert=expert, step=0)
        seen[key] += new
        grey += count
    for key, wanted in seen.items():
        assert greys(store, key) == wanted[-per_class:]
    assert len(store) <= 3 * per_class


def test_eviction_takes_an_experts_images_and_no_others():
    store = filled()
    before = [greys(store, key) for key in range(4)]
    assert store.evict(0) == 4 * 6
    assert [greys(store, key) for key in range(4)] == [row[6:] for row in before]
    assert store.evict(0) == 0
    store.add(torch.ones(2, *SHAPE), torch.tensor([1, 1]), expert=5, step=9)
    assert greys(store, 1) == [*before[1][6:], 255, 255]  # into the holes: nobody else had to go


def test_images_are_kept_to_half_a_grey():
    x = torch.rand(5, *SHAPE, generator=torch.Generator().manual_seed(0))
    store = ImageStore(1, SHAPE)
    store.add(x, torch.zeros(5, dtype=torch.long), expert=0, step=0)
    assert float((store.at(0, store.places(0)).float() / 255 - x).abs().max()) <= 0.5 / 255 + 1e-6


def test_a_kept_store_draws_the_same_episodes(tmp_path):
    store = filled()
    store.evict(1)
    for folder in (Journal(tmp_path, save_every=0), Journal(tmp_path)):
        other = store if folder.folder is not None and not any(tmp_path.iterdir()) else ImageStore(4, SHAPE, 12)
        for _ in folder.steps(1, keep={"store": other}):
            pass
    one, two = (StoreEpisodes(s, ways=3, shots=1, queries=2, seed=7).draw(4, 3) for s in (store, other))
    assert other is not store and torch.equal(one.query_x, two.query_x) and torch.equal(one.classes, two.classes)
    for s in (store, other):
        s.add(torch.ones(3, *SHAPE), torch.tensor([0, 1, 1]), expert=3, step=4)
    assert [greys(store, k) for k in range(4)] == [greys(other, k) for k in range(4)]


def test_episodes_have_different_images_of_their_classes():
    store = filled()
    episodes = StoreEpisodes(store, ways=3, shots=2, queries=3, seed=0).draw(20, 1)
    for e in episodes:
        assert len(set(e.classes.tolist())) == 3 and e.support_y.tolist() == [0, 0, 1, 1, 2, 2]
        for label, key in enumerate(e.classes.tolist()):
            drawn = [
                *e.support_x[e.support_y == label, 0, 0, 0].tolist(),
                *e.query_x[e.query_y == label, 0, 0, 0].tolist(),
            ]
            assert len(set(drawn)) == 5 and set(drawn) <= set(greys(store, key))
    assert set(episodes.sets.tolist()) == {-1}


def test_tasks_within_an_expert_are_of_its_images_alone():
    store = filled()
    episodes = StoreEpisodes(store, ways=3, shots=2, queries=3, seed=0, shared=False).draw(20, 0)
    assert set(episodes.sets.tolist()) == {0, 1}
    for e, expert in zip(episodes, episodes.sets.tolist(), strict=True):
        for label, key in enumerate(e.classes.tolist()):
            own = [int(i[0, 0, 0]) for i in store.at(key, store.places(key, expert))]
            assert set(e.query_x[e.query_y == label, 0, 0, 0].tolist()) <= set(own)


def test_the_latest_images_alone():
    store = filled()
    episodes = StoreEpisodes(store, ways=3, shots=2, queries=3, latest=True).draw(10, 0)
    newest = {g for key in range(4) for g in greys(store, key)[6:]}
    assert set(episodes.query_x[..., 0, 0, 0].flatten().tolist()) <= newest


def test_too_few_images_are_told():
    episodes = StoreEpisodes(filled(each=1), ways=3, shots=2, queries=3)
    assert not episodes.ready
    with pytest.raises(SpoliaError, match="too few images"):
        episodes.draw(1, 0)
    assert StoreEpisodes(filled(), ways=3, shots=2, queries=3).ready


def test_the_sheet_shows_the_newest_of_each_class():
    store = filled(classes=3)
    store.evict(0)
    keys, sheet = store.sheet(4)
    assert keys == [0, 1, 2] and sheet.shape == (3, 4, *SHAPE)
    assert sheet[1, :, 0, 0, 0].tolist() == greys(store, 1)[-4:]


def test_a_wrong_shape_is_told():
    with pytest.raises(SpoliaError, match="the pool's shape"):
        ImageStore(2, SHAPE).add(torch.ones(1, 3, 2, 2), torch.tensor([0]), expert=0, step=0)
