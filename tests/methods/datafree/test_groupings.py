from __future__ import annotations

import pytest
import torch

from spolia.core.grouping import within
from spolia.core.journal import Interrupted, Journal
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.datafree.embedding import by_filter, cka, head, similarity, task_vectors
from spolia.methods.datafree.grouped import Grouped
from spolia.methods.datafree.groupings import Groupings, groupings
from spolia.methods.datafree.in_turn import InTurn
from spolia.methods.datafree.inversion import Recovered
from spolia.methods.datafree.learner import FewShotLearner
from spolia.parts.white import White, WhitePool
from spolia.zoo.conv2 import Conv2

QUICK = {"steps": 4, "warm_up": 1, "recovery_steps": 2, "per_class": 8, "generator_width": 4, "latent": 8, "replays": 1}
QUICK |= {"ways": 2, "shots": 2, "queries": 3, "experts": 2, "replay_tasks": 2, "check_every": 2}


def net(seed: int, ways: int = 3, size: int = 8, width: int = 6) -> Conv2:
    """Weights drawn, and statistics of a batch of noise, so that it passes for trained."""
    draws = torch.Generator().manual_seed(seed)
    module = Conv2(ways, width=width, size=size, generator=draws).train()
    with torch.no_grad():
        for _ in range(5):
            module(torch.rand(30, 1, size, size, generator=draws))
        module.head.weight *= 8  # answers that differ from image to image
    return module.eval()


def pool(count: int = 6, families: int = 1) -> WhitePool:
    """Families have other networks, sizes and domains."""
    made = []
    for place in range(count):
        family = place % families
        size = 8 + 4 * family
        classes = [f"c{(place + i) % 5}" for i in range(3)]
        module = net(place, size=size, width=6 + 2 * family)
        made.append(White(f"e{place}", module, shape=(1, size, size), classes=classes, domain=f"d{family}"))
    return WhitePool(made, (1, 8, 8))


def embed(network, x):
    return network.features(x)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator(seed, "images").random(shape, dtype="float32"))


# --- how alike two models are ----------------------------------------------------------------------------------------


def vectors(count: int, seed: int = 0) -> list[list[torch.Tensor]]:
    draws = generator(seed, "vectors")
    return [[torch.from_numpy(draws.random(n)) for n in (5, 3)] for _ in range(count)]


def test_similarity_is_symmetric_and_one_for_equal_models():
    made = vectors(5)
    made.append(made[2])
    s = similarity(made)
    assert torch.equal(s, s.T) and torch.equal(s.diagonal(), torch.ones(6, dtype=torch.float64))
    assert s[2, 5] == pytest.approx(1.0, abs=1e-12)
    assert (s >= 0).all() and (s <= 1).all()


def test_similarity_follows_the_order_of_models_and_not_the_scale():
    made = vectors(5)
    s, order = similarity(made), [3, 0, 4, 1, 2]
    torch.testing.assert_close(similarity([made[i] for i in order]), s[order][:, order], rtol=0, atol=1e-12)
    for factor in (1e-9, 1e6):  # an absolute epsilon would turn the ratio into a plain cosine for small ones
        scaled = [[factor * t for t in one] for one in made]
        torch.testing.assert_close(similarity(scaled), s, rtol=0, atol=1e-9)


def test_similarity_by_hand():
    one, other = [torch.tensor([1.0, 3.0])], [torch.tensor([1.0, 1.0])]
    a, b = torch.tensor([0.5, 0.75]), torch.tensor([0.5, 0.25])
    wanted = float(a @ b / (a.norm() * b.norm()))
    assert float(similarity([one, other])[0, 1]) == pytest.approx(wanted, abs=1e-5)  # epsilon is 1e-6 of the mean


def test_what_no_task_moves_does_not_count():
    made = vectors(3)
    dead = [[*one, torch.zeros(4)] for one in made]
    torch.testing.assert_close(similarity(dead), similarity(made), rtol=0, atol=0)


def test_the_embedding_does_not_see_which_class_stands_where():
    probe, x = net(9), random(0, 24, 1, 8, 8)
    y = torch.arange(3).repeat_interleave(8)
    turned = torch.tensor([2, 0, 1])[y]
    one, other = task_vectors(probe, [(x, y), (x, turned)], embed)
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)  # sums over classes in another order, in fp32
    before = {name: t.clone() for name, t in net(9).state_dict().items()}
    assert all(torch.equal(t, before[name]) for name, t in probe.state_dict().items()), "the probe has changed"


def test_the_head_separates_what_can_be_separated():
    x = torch.cat([random(0, 10, 4), random(1, 10, 4) + 2])
    y = torch.arange(2).repeat_interleave(10)
    matrix, shift = head(x, y)
    assert ((x @ matrix + shift).argmax(1) == y).all()
    assert by_filter(torch.ones(3, 2, 2)).shape == (3,) and by_filter(torch.ones(3)).shape == (3,)


def test_cka_sees_neither_turns_nor_scale_and_tells_others_apart():
    draws = generator(0, "outputs")
    x = torch.from_numpy(draws.standard_normal((40, 4)))
    turn = torch.linalg.qr(torch.from_numpy(draws.standard_normal((4, 4))))[0]
    s = cka([x, 3 * x @ turn + 1, torch.from_numpy(draws.standard_normal((40, 4)))])
    assert s[0, 1] == pytest.approx(1.0, abs=1e-9) and s[0, 2] < 0.5
    assert torch.equal(s, s.T)


# --- who is drawn ----------------------------------------------------------------------------------------------------


def recovered(place: int, seed: int) -> Recovered:
    y = torch.arange(3).repeat_interleave(8)
    return Recovered(place, random(seed, 24, 1, 8, 8), y, torch.zeros(24, 3), 0.0, 0.0, 1.0, 0.0)


def met(models: WhitePool, **changed) -> tuple[Grouped, FewShotLearner]:
    """A selection that has met the whole pool, and the learner that it looked through."""
    settings = Groupings(**(QUICK | {"embedding": "cka", "groups": 3} | changed))
    learner = FewShotLearner(net(99, ways=2), settings, embed)
    chosen = Grouped(models, settings, 0)
    for step in range(99):
        if chosen.groups:
            return chosen, learner
        chosen.feedback(step, [recovered(p, p) for p in chosen.choose(step, 2)], learner, None, None)
    raise AssertionError("no groups were made")


@pytest.mark.slow
@pytest.mark.parametrize("embedding", ["cka", "student"])
def test_the_whole_pool_is_met_grouped_and_drawn(embedding):
    models = pool(7, families=2)
    chosen, _ = met(models, embedding=embedding)
    assert sorted(place for group in chosen.groups for place in group) == list(range(7))
    assert chosen.dissimilarity.shape == (7, 7)
    seen = {place for step in range(100, 200) for place in chosen.choose(step, 2)}
    assert seen == set(range(7)), "both families are drawn"
    for step in range(100, 140):
        places = chosen.choose(step, 2)
        assert len(set(places)) == 2 and any(set(places) <= set(group) for group in chosen.groups)
    assert chosen.gain == pytest.approx(within(chosen.dissimilarity, chosen.groups) - chosen.chance)


@pytest.mark.slow
def test_every_model_is_as_likely_as_any_other():
    chosen, _ = met(pool(7))
    assert sorted(map(len, chosen.groups)) == [2, 2, 3]
    counts = torch.zeros(7)
    for step in range(3000):
        counts[chosen.choose(step, 1)] += 1
    assert ((counts / 3000 - 1 / 7).abs() < 4.5 * (1 / 7 * 6 / 7 / 3000) ** 0.5).all()


def test_its_state_says_everything():
    models = pool(6)
    chosen, _ = met(models)
    other = Grouped(models, chosen.settings, 0)
    other.load_state_dict(chosen.state_dict())
    assert other.groups == chosen.groups and torch.equal(other.dissimilarity, chosen.dissimilarity)
    assert [other.choose(step, 2) for step in range(50, 60)] == [chosen.choose(step, 2) for step in range(50, 60)]


def test_a_probe_must_be_there():
    with pytest.raises(SpoliaError, match="no probe is given"):
        Grouped(pool(4), Groupings(embedding="probe"), 0)


def test_models_in_turn_come_once_each():
    settings = Groupings(**(QUICK | {"steps": 12, "selection": "in_turn"}))
    chosen = InTurn(pool(4), settings, 0)
    seen = [chosen.choose(step, 4) for step in range(12)]
    assert [len(places) for places in seen] == [1] * 12
    order = list(dict.fromkeys(place for places in seen for place in places))
    assert sorted(order) == [0, 1, 2, 3] and seen == sorted(seen, key=lambda places: order.index(places[0]))


# --- the loop --------------------------------------------------------------------------------------------------------


def weights(learner) -> dict[str, torch.Tensor]:
    return {name: t.clone() for name, t in learner.network.state_dict().items()}


@pytest.mark.slow
def test_it_trains_and_leaves_what_it_was_given():
    models, network = pool(5, families=2), net(50, ways=2)
    before = [{n: t.clone() for n, t in one.module().state_dict().items()} for one in models]
    start = {name: t.clone() for name, t in network.state_dict().items()}
    learner = groupings(models, network, Groupings(**QUICK), seed=1, embed=embed)
    assert all(torch.equal(t, start[name]) for name, t in network.state_dict().items())
    assert any(not torch.equal(t, start[name]) for name, t in weights(learner).items())
    for one, state in zip(models, before, strict=True):
        assert all(torch.equal(t, state[name]) for name, t in one.module().state_dict().items())
    again = groupings(models, network, Groupings(**QUICK), seed=1, embed=embed)
    assert all(torch.equal(t, weights(again)[name]) for name, t in weights(learner).items())


@pytest.mark.slow
def test_it_goes_on_after_a_stop_to_the_bit(tmp_path):
    models, network, settings = pool(5), net(50, ways=2), Groupings(**(QUICK | {"steps": 6}))
    whole = groupings(models, network, settings, seed=1, embed=embed)
    stopped = Journal(tmp_path, save_every=0.0)
    chosen = Grouped(models, settings, 1, embed=embed)
    ask, count = chosen.choose, [0]

    def choose(step, many):
        count[0] += 1
        if count[0] == 5:
            stopped.request_stop()
        return ask(step, many)

    chosen.choose = choose
    with pytest.raises(Interrupted):
        groupings(models, network, settings, stopped, seed=1, embed=embed, selection=chosen)
    ended = groupings(models, network, settings, Journal(tmp_path), seed=1, embed=embed)
    assert all(torch.equal(t, weights(whole)[name]) for name, t in weights(ended).items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "changed", [{"selection": "uniform", "align": "mean"}, {"align": "sequential"}, {"recovery": "fresh"}]
)
def test_words_of_the_other_methods_are_taken(changed):
    learner = groupings(pool(4), net(50, ways=2), Groupings(**(QUICK | changed)), embed=embed)
    assert all(torch.isfinite(t).all() for t in weights(learner).values())
