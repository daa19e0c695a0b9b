from __future__ import annotations

import copy
from functools import cache

import pytest
import torch
from torch import nn

from spolia.bench.fewshot import evaluate
from spolia.core.alignment import sequential
from spolia.core.journal import Interrupted, Journal
from spolia.data.textures import texture_classes
from spolia.errors import SpoliaError
from spolia.methods.datafree.free import PAPER_CODE, Free, free
from spolia.methods.datafree.inversion import Fresh, Inverting, invert
from spolia.methods.datafree.learner import FewShotLearner
from spolia.methods.datafree.metagenerator import MetaGenerator
from spolia.methods.datafree.training import Uniform, audited, train
from spolia.parts.episode import EpisodeSampler
from spolia.parts.white import White, WhitePool
from spolia.zoo.conv2 import Conv2

SHAPE, WAYS = (1, 12, 12), 3
TINY = {
    "generator_width": 4,
    "latent": 6,
    "per_class": 6,
    "recovery_steps": 2,
    "shift": 1,
    "steps": 4,
    "warm_up": 1,
    "experts": 2,
    "ways": WAYS,
    "shots": 1,
    "queries": 3,
    "replays": 2,
    "replay_tasks": 2,
    "inner_steps": 1,
    "test_steps": 2,
}


RELEASED = PAPER_CODE | {"patience": 2, "replay_tasks": 2}  # in small


def network(seed: int = 0, classes: int = WAYS, width: int = 4) -> Conv2:
    return Conv2(classes, width=width, size=12, generator=torch.Generator().manual_seed(seed))


def expert(seed: int, classes=("a", "b", "c"), trained: bool = True) -> White:
    module = network(seed)
    if trained:
        with torch.no_grad():
            for layer in module.modules():
                if isinstance(layer, nn.BatchNorm2d):
                    layer.running_mean.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return White(f"{seed}", module, shape=SHAPE, classes=classes)


def pool(count: int = 3) -> WhitePool:
    lists = [("a", "b", "c"), ("c", "d", "e"), ("b", "e", "a")]
    return WhitePool([expert(i, lists[i % 3]) for i in range(count)])


def features(module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return module.features(x)


def run(journal: Journal | None = None, seed: int = 0, **given) -> FewShotLearner:
    return free(pool(), network(9), Free(**(TINY | given)), journal, seed=seed, embed=features)


def equal(one: FewShotLearner, other: FewShotLearner) -> bool:
    pairs = zip(one.network.parameters(), other.network.parameters(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"recovery": "fresh", "align": "mean"},
        pytest.param({"head": "linear", "patience": 2}, marks=pytest.mark.slow),
        pytest.param(RELEASED, marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_goes_on_with_the_same_bits(tmp_path, given):
    whole = run(**given)
    journal = Journal(
        tmp_path, save_every=0, progress=lambda label, done, n, numbers: done == 2 and journal.request_stop()
    )
    with pytest.raises(Interrupted):
        run(journal, **given)
    again = run(Journal(tmp_path), **given)
    assert equal(whole, again) and torch.equal(whole.losses, again.losses)
    assert whole.recovered.keys() == again.recovered.keys()
    a, b = (learner.store.sheet(4) for learner in (whole, again))
    assert a[0] == b[0] and torch.equal(a[1], b[1])


def test_neither_pool_nor_network_is_changed():
    experts, start = pool(), network(9)
    before = [copy.deepcopy(e.module().state_dict()) for e in experts], copy.deepcopy(start.state_dict())
    learner = free(experts, start, Free(**TINY), embed=features)
    assert not equal(learner, FewShotLearner(start, learner.settings))
    for e, state in zip(experts, before[0], strict=True):
        assert all(torch.equal(state[n], t) for n, t in e.module().state_dict().items())
        assert not any(part._forward_pre_hooks for part in e.module().modules())
    assert all(torch.equal(before[1][n], t) for n, t in start.state_dict().items())


@pytest.mark.slow
def test_images_of_all_experts_of_a_step_are_stored_under_their_classes():
    learner, experts = run(experts=3, steps=2), pool()
    assert set(learner.recovered) == {0, 1, 2}
    for key, name in enumerate(experts.names):
        owners = {i for i, e in enumerate(experts) if name in e.classes}
        held = learner.store.expert[key]
        assert set(held[held >= 0].tolist()) == owners and (held >= 0).sum() == 6 * len(owners)
    last = run(experts=3, steps=2, stored="last")
    assert len(set(last.store.expert[last.store.expert >= 0].tolist())) == 1


def test_the_whole_way_ends_where_the_steps_end_and_no_way_nowhere():
    chosen = {"steps": 1, "warm_up": 0, "replays": 0, "experts": 1, "align_optimizer": "sgd", "align_rate": 0.1}
    still = run(**chosen, reach=0.0)
    assert equal(still, FewShotLearner(network(9), still.settings))
    moved = run(**chosen)
    settings = moved.settings
    recovery = MetaGenerator(pool(), settings)
    begun = FewShotLearner(network(9), settings, features)
    found = recovery.recover(Uniform(pool(), settings).choose(0, 1), 0)
    one = sequential([begun.teacher_loss(found[0])], begun.weights(), 0.1).gradient
    for name, w in begun.weights().items():
        assert torch.allclose(moved.weights()[name], w - one[name], atol=1e-7)  # fp32: one subtraction


@pytest.mark.slow
@pytest.mark.parametrize("head", ["prototypes", "linear"])
@pytest.mark.parametrize("bn", ["batch", "support"])
def test_an_episode_is_answered_as_if_it_were_the_first(head, bn):
    learner = run(head=head, bn=bn)
    episodes = EpisodeSampler(texture_classes(20), ways=WAYS, shots=2, queries=3)
    assert len(evaluate(learner.predict, episodes, 4, modules=[learner.network]).values["accuracy"]) == 4
    batch = episodes.batch([0, 1])
    both = learner.predict(batch.support_x, batch.support_y, batch.query_x)
    one = learner.predict(batch[1].support_x, batch[1].support_y, batch[1].query_x)
    assert both.shape == (2, 9, WAYS) and torch.allclose(both[1], one, atol=1e-5)  # fp32
    if bn == "support":  # then a query's answer is its own
        alone = learner.predict(batch[1].support_x, batch[1].support_y, batch[1].query_x[:1])
        assert torch.allclose(alone, one[:1], atol=1e-4)  # fp32


@pytest.mark.slow
def test_the_students_answers_are_the_losss_own():
    learner = run()
    (found,) = invert(pool(), [1], Inverting(**{k: v for k, v in TINY.items() if k in Inverting.model_fields}))
    weights = learner.weights()
    both = learner.features(weights, found.images)
    means = both.view(3, -1, both.shape[1]).mean(1)
    wanted = -torch.cdist(both, means).square() / both.shape[1] ** 0.5
    assert torch.allclose(learner.student(found.images, found.labels), wanted, atol=1e-3, rtol=1e-3)  # fp32 squares


def test_an_untrained_expert_stops_the_run_or_is_dropped():
    mixed = WhitePool([expert(0), expert(1, trained=False), expert(2)])
    with pytest.raises(SpoliaError, match="expert 1: was never trained"):
        free(mixed, network(9), Free(**TINY), embed=features)
    assert [e.name for e in audited(mixed, Free(**TINY, suspects="drop"))] == ["0", "2"]
    assert len(audited(mixed, Free(**TINY, suspects="keep"))) == 3


def test_a_linear_head_of_another_width_is_told_before_any_step():
    with pytest.raises(SpoliaError, match=r"gives \[4\] outputs"):
        free(pool(), network(9, classes=4), Free(**TINY, head="linear"), embed=features)
    with pytest.raises(SpoliaError, match="tasks 2 ways"):
        free(pool(), network(9, classes=2), Free(**(TINY | {"ways": 2}), head="linear"), embed=features)


def test_the_preset_is_the_released_code_whatever_else_is_written():
    chosen = Free(preset="paper-code", bn_weight=1.0, experts=2)
    assert all(getattr(chosen, name) == value for name, value in PAPER_CODE.items())
    assert chosen.experts == 2 and Free(**chosen.model_dump()) == chosen
    assert Free().bn_weight == 1.0 and Free().meta == "reptile"


def test_without_class_lists_tasks_stay_within_an_expert():
    experts = WhitePool([expert(0, None), expert(1, None)])
    learner = free(experts, network(9), Free(**TINY), embed=features)
    assert learner.store.classes == 6 and (learner.store.counts() > 0).all()


# --- the toy benchmark -----------------------------------------------------------------------------------------------


def trained(classes, seed: int) -> White:
    """A five-way classifier of textures."""
    draws = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(classes), generator=draws)[:5].tolist()
    held = classes.pick(order)
    x = torch.cat([held.inputs[torch.from_numpy(row)] for row in held.support])
    y = torch.arange(5).repeat_interleave(held.support.shape[1])
    module = network(seed, classes=5, width=12).train()
    adam = torch.optim.Adam(module.parameters(), lr=0.01)
    for _ in range(4):
        for rows in torch.randperm(len(y), generator=draws).split(100):
            adam.zero_grad()
            nn.functional.cross_entropy(module((x[rows] - 0.5) / 0.25), y[rows]).backward()
            adam.step()
    return White(f"t{seed}", module, shape=SHAPE, classes=held.names, mean=(0.5,), std=(0.25,))


@cache
def toy() -> tuple[WhitePool, EpisodeSampler]:
    train, test = texture_classes(100).split((2 / 3, 1 / 3), seed=0)
    return WhitePool([trained(train, i) for i in range(8)]), EpisodeSampler(test, ways=5, shots=5, queries=10)


TOY = {
    "generator_width": 10,
    "latent": 32,
    "generator_lr": 4e-3,
    "latent_lr": 1e-2,
    "per_class": 7,
    "warm_up": 0,
    "steps": 5,
    "experts": 4,
    "shots": 2,
    "queries": 5,
    "replays": 6,
    "replay_tasks": 2,
    "lr": 2e-3,
}


def mean(found, part: str) -> float:
    return sum(getattr(one, part) for one in found) / len(found)


@pytest.mark.slow
def test_on_textures_the_generator_learns_to_adapt_and_the_learner_is_better_for_it():
    """Over three seeds: five steps on two experts never met, before and after 16 visits of the others; and the learner of
    as many steps on what those five steps give, beside five steps of a fresh generator."""
    (experts, test), start = toy(), network(99, classes=5, width=12)
    settings, ratios, gained = Free(**TOY), [], []
    for seed in range(3):
        recovery = MetaGenerator(experts, settings, seed)
        before = recovery.recover([6, 7], 1000, learn=False)
        for step in range(16):
            recovery.recover([2 * step % 6, (2 * step + 1) % 6], step)
        after = recovery.recover([6, 7], 1000, learn=False)
        ratios.append([mean(after, part) / mean(before, part) for part in ("ce", "bn")])
        scores = []
        for made in (recovery, Fresh(experts, settings, seed)):
            learner = train(experts, start, settings, seed=seed, embed=features, recovery=made)
            scores.append(evaluate(learner.predict, test, 80).mean())
        gained.append(scores[0] - scores[1])
    ce, bn = (sum(column) / 3 for column in zip(*ratios, strict=True))
    assert ce < 0.5 and bn < 0.5  # seen: 0.19 and 0.25
    assert sum(gained) / 3 > 2.3  # points; half of what was seen
