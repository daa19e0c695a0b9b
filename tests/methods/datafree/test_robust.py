from __future__ import annotations

import copy
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from spolia.bench.attacks import mislabelled
from spolia.core.seeds import generator
from spolia.data.textures import texture_classes
from spolia.errors import SpoliaError
from spolia.methods.datafree.heads import distances
from spolia.methods.datafree.interpolation import mixed_gradient, mixed_images, mixed_logits, replayed, shares
from spolia.methods.datafree.inversion import Recovered
from spolia.methods.datafree.learner import FewShotLearner
from spolia.methods.datafree.policy import Policy
from spolia.methods.datafree.robust import Robust, robust
from spolia.methods.datafree.training import train
from spolia.methods.datafree.trusted import Trusted, held_out_reward
from spolia.parts.episode import Episodes
from spolia.parts.imagestore import ImageStore, StoreEpisodes
from spolia.parts.white import White, WhitePool
from spolia.zoo.conv2 import Conv2

QUICK = {"steps": 4, "warm_up": 1, "recovery_steps": 2, "per_class": 8, "generator_width": 4, "latent": 8, "replays": 1}
QUICK |= {"ways": 2, "shots": 2, "queries": 3, "experts": 2, "replay_tasks": 3, "check_every": 2, "bn": "batch"}


def embed(network, x):
    return network.features(x)


def net(seed: int, ways: int = 3) -> Conv2:
    """Weights drawn, and statistics of a batch of noise, so that it passes for trained."""
    draws = torch.Generator().manual_seed(seed)
    module = Conv2(ways, width=6, size=8, generator=draws).train()
    with torch.no_grad():
        for _ in range(5):
            module(torch.rand(30, 1, 8, 8, generator=draws))
        module.head.weight *= 8
    return module.eval()


def learner(**changed) -> FewShotLearner:
    return FewShotLearner(net(0, 2), Robust(**(QUICK | changed)), embed)


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator(seed, "images").random(shape, dtype="float32"))


def tasks(seed: int, count: int = 3, ways: int = 2, shots: int = 2, queries: int = 3) -> Episodes:
    labels = torch.arange(ways)
    support, query = random(seed, count, ways * shots, 1, 8, 8), random(seed + 1, count, ways * queries, 1, 8, 8)
    y, z = (labels.repeat_interleave(k).expand(count, -1) for k in (shots, queries))
    none = torch.zeros(count, ways, dtype=torch.long)
    return Episodes(support, y, query, z, none, none[:, 0], tuple(range(count)))


# --- tasks between tasks ---------------------------------------------------------------------------------------------


def test_the_ends_are_the_two_tasks():
    made, one, other = learner(), tasks(0), tasks(10)
    w = made.weights()
    for i in range(3):
        for share, task in ((0.0, one[i]), (1.0, other[i])):
            wanted = made.logits(w, task.support_x, task.support_y, task.query_x)
            torch.testing.assert_close(mixed_logits(made, w, one[i], other[i], share), wanted, rtol=1e-5, atol=1e-5)


def test_changing_places_and_shares_changes_nothing():
    made, one, other = learner(), tasks(0), tasks(10)
    there = mixed_logits(made, made.weights(), one[0], other[0], 0.3)
    back = mixed_logits(made, made.weights(), other[0], one[0], 0.7)
    torch.testing.assert_close(there, back, rtol=1e-4, atol=1e-5)


def test_means_of_mixed_features_are_mixed_means_and_gradients_reach_both():
    a, b = (random(s, 6, 4).double().requires_grad_() for s in (1, 2))
    y, share = torch.arange(2).repeat_interleave(3), 0.4
    mixed = (1 - share) * a + share * b
    mean = torch.stack([mixed[y == c].mean(0) for c in (0, 1)])
    apart = (1 - share) * torch.stack([a[y == c].mean(0) for c in (0, 1)])
    torch.testing.assert_close(mean, apart + share * torch.stack([b[y == c].mean(0) for c in (0, 1)]))
    distances(mixed, y, mixed).sum().backward()
    assert a.grad.any() and b.grad.any()


def test_a_gradient_is_that_of_the_mean_loss():
    made, one, other = learner(), tasks(0), tasks(10)
    mix = [0.0, 0.25, 0.9]
    loss, accuracy, gradient = mixed_gradient(made, one, other, mix)
    w = {name: t.detach().requires_grad_() for name, t in made.weights().items()}
    parts = [mixed_logits(made, w, one[i], other[i], share) for i, share in enumerate(mix)]
    whole = torch.stack([torch.nn.functional.cross_entropy(p, one[i].query_y) for i, p in enumerate(parts)]).mean()
    assert loss == pytest.approx(whole.item(), rel=1e-5) and 0 <= accuracy <= 1
    slopes = torch.autograd.grad(whole, list(w.values()), allow_unused=True)
    for (name, _), slope in zip(w.items(), slopes, strict=True):
        if slope is not None:
            torch.testing.assert_close(gradient[name], slope, rtol=1e-4, atol=1e-6)


def test_shares_are_as_often_and_where_beta_puts_them():
    drawn = shares(20000, 0.5, 0.5, generator(0, "beta"))
    assert abs((drawn > 0).mean() - 0.5) < 4.5 * 0.5 / 20000**0.5
    inside = drawn[drawn > 0]
    assert abs(inside.mean() - 0.5) < 4.5 * (0.125 / len(inside)) ** 0.5  # Beta(.5, .5) has variance 1 / 8
    assert not shares(10, 0.0, 0.5, generator(0, "none")).any()


def test_without_interpolation_a_replay_is_the_plain_one():
    made = learner(interpolate=0.0)
    store = ImageStore(3, (1, 8, 8), 20)
    store.add(random(0, 30, 1, 8, 8), torch.arange(3).repeat_interleave(10), expert=0, step=0)
    episodes = StoreEpisodes(store, ways=2, shots=2, queries=3)
    plain = made.gradient(episodes.draw(3, 5).floats())
    found = replayed(made, episodes, 5)
    assert found[:2] == plain[:2] and all(torch.equal(found[2][n], g) for n, g in plain[2].items())
    assert replayed(learner(interpolate=1.0), episodes, 5)[0] != plain[0]


def test_images_are_mixed_for_heads_that_are_adapted():
    one, other = tasks(0), tasks(10)
    mixed = mixed_images(one, other, torch.tensor([0.0, 1.0, 0.5]))
    torch.testing.assert_close(mixed.support_x[0], one.support_x[0])
    torch.testing.assert_close(mixed.query_x[1], other.query_x[1])
    torch.testing.assert_close(mixed.support_x[2], (one.support_x[2] + other.support_x[2]) / 2)


# --- whom to trust ---------------------------------------------------------------------------------------------------


def bandit(seed: int, joint: bool, updates: int = 400, entropy: float = 0.01) -> Policy:
    """20 models, the last 8 lie, 4 a step. One reward for all of them, or one each, with a deviation of 4 points."""
    draws, policy = generator(seed, "bandit"), Policy(20, explore=0.0, entropy=entropy, seed=seed)
    for step in range(updates):
        order = policy.draw(4, step)
        good = np.array([place < 12 for place in order], dtype=float)
        noise = 4 * draws.standard_normal(4)
        rewards = [40 + 8 * (good.mean() - 0.5) + noise[0]] if joint else (40 + 8 * (good - 0.5) + noise).tolist()
        policy.tell(order, rewards)
    return policy


@pytest.mark.slow
@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize("seed", range(4))
def test_the_honest_are_found(seed, joint):
    """A mass of .6 is an even share. Below .9 no seed of 20 has come; with a reward each it is found sooner."""
    share = bandit(seed, joint).scores.detach().softmax(0)
    assert share[:12].sum() >= 0.9
    if not joint:
        assert bandit(seed, joint, 60).scores.detach().softmax(0)[:12].sum() >= 0.75


@pytest.mark.slow
def test_entropy_spreads_the_trust():
    ends = [bandit(0, True, 100, weight).scores.detach().softmax(0).max() for weight in (0.0, 1.0)]
    assert ends[1] < ends[0]


def test_a_constant_reward_teaches_nothing():
    policy = Policy(6, entropy=0.0, seed=0)
    for step in range(50):
        policy.tell(policy.draw(3, step), [0.7])
    assert not policy.scores.detach().any()


def test_draws_go_by_seed_and_step_and_state_by_what_was_told():
    one, other = Policy(6, seed=3), Policy(6, seed=3)
    for step in range(5):
        order = one.draw(3, step)
        one.tell(order, [float(place) for place in order])
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    assert [other.draw(3, s) for s in range(9)] == [one.draw(3, s) for s in range(9)]
    other.tell([0, 1], [0.1])
    one.tell([0, 1], [0.1])
    assert torch.equal(one.scores, other.scores)
    assert sorted(one.draw(99, 0)) == list(range(6))


def test_chance_draws_stay_however_little_a_model_is_trusted():
    policy = Policy(5, explore=0.2)
    with torch.no_grad():
        policy.scores[0] = -50.0
    assert policy.probabilities[0] == pytest.approx(0.04) and policy.probabilities.sum() == pytest.approx(1.0)
    assert policy.distrusted == [0]


def test_rewards_that_do_not_fit_are_told():
    for wrong in ([1.0, 2.0], [float("nan")]):
        with pytest.raises(SpoliaError, match="rewards"):
            Policy(5).tell([0, 1, 2], wrong)


def kind(label: int, count: int, seed: int) -> torch.Tensor:
    """Images of a class: a bright half, left or right, above or below, and a little noise."""
    x = 0.1 * random(seed, count, 1, 8, 8)
    x[(..., slice(None), slice(0, 4)) if label == 0 else (..., slice(4, 8), slice(None))] += 0.8
    return x.clamp(0, 1)


def test_the_reward_is_high_for_those_whose_images_agree_with_others():
    made, store = learner(), ImageStore(2, (1, 8, 8), 40)
    for expert, seed in ((1, 1), (2, 3)):
        for label in (0, 1):
            images = kind(label, 10, seed + label)
            store.add(images, torch.full((10,), label), expert=expert, step=0)
    y = torch.arange(2).repeat_interleave(6)

    def reward(*labels: int, keys=(0, 1)) -> float:
        images = torch.cat([kind(label, 6, 9 + label) for label in labels])
        found = Recovered(0, images, y, torch.zeros(12, 2), 0.0, 0.0, 1.0, 0.0)
        return held_out_reward(made, store, found, keys, [0], generator(0, "r"))

    assert reward(0, 1) > 0.6, "an honest model"
    assert reward(1, 0) < -0.6, "one that says left for right"
    assert reward(0, 0) < 0.6, "one that knows no difference"
    assert reward(0, 1, keys=(0, 1)) == reward(0, 1, keys=(0, 1))


def test_real_rewards_need_real_episodes():
    with pytest.raises(SpoliaError, match="no real episodes"):
        Trusted([1, 2], Robust(reward="real"), 0)


def test_images_of_the_distrusted_leave_the_store():
    made = learner()
    store = ImageStore(4, (1, 8, 8), 40)
    models = SimpleNamespace(keys=[(0, 1), (2, 3)], __len__=lambda: 2)
    chosen = Trusted([None, None], Robust(**QUICK), 0)
    chosen.pool = models
    with torch.no_grad():
        chosen.policy.scores[1] = -9.0
    store.add(random(0, 8, 1, 8, 8), torch.arange(2).repeat_interleave(4) + 2, expert=1, step=0)
    store.add(random(1, 8, 1, 8, 8), torch.arange(2).repeat_interleave(4), expert=0, step=0)
    y = torch.arange(2).repeat_interleave(4)
    found = [Recovered(0, random(1, 8, 1, 8, 8), y, torch.zeros(8, 2), 0.0, 0.0, 1.0, 0.0)]
    chosen.feedback(7, found, made, store, None)
    assert len(store) == 8 and chosen.evicted == {1: 7} and len(chosen.rewards) == 1


# --- the loop --------------------------------------------------------------------------------------------------------


def pool(count: int = 4) -> WhitePool:
    return WhitePool(
        [White(f"e{i}", net(i), shape=(1, 8, 8), classes=[f"c{(i + k) % 5}" for k in range(3)]) for i in range(count)]
    )


@pytest.mark.slow
def test_it_trains_and_equal_seeds_have_equal_bits():
    ends = [robust(pool(), net(50, 2), Robust(**QUICK), seed=1, embed=embed) for _ in range(2)]
    one, other = (end.network.state_dict() for end in ends)
    start = net(50, 2).state_dict()
    assert all(torch.equal(t, other[name]) for name, t in one.items())
    assert any(not torch.equal(t, start[name]) for name, t in one.items())


def test_untrained_models_are_dropped_before_any_step():
    draws = torch.Generator().manual_seed(3)
    fresh = White("fresh", Conv2(3, width=6, size=8, generator=draws), shape=(1, 8, 8), classes=["c0", "c1", "c2"])
    models = WhitePool([*pool(3), fresh])
    made = robust(models, net(50, 2), Robust(**QUICK), embed=embed)
    assert set(made.recovered) <= {0, 1, 2}
    with pytest.raises(SpoliaError):
        robust(models, net(50, 2), Robust(**(QUICK | {"suspects": "stop"})), embed=embed)


class Perfect:
    """In the place of a generator: real images of what each model learned, whatever it says of them."""

    def __init__(self, held, learned):
        self.held, self.learned = held, learned

    def recover(self, places, step, student=None):
        found = []
        for place in places:
            draws = generator(0, "perfect", place, step)
            rows = [torch.from_numpy(draws.choice(self.held.support[c], 8, replace=False)) for c in self.learned[place]]
            y = torch.arange(5).repeat_interleave(8)
            answers = 6.0 * torch.nn.functional.one_hot(y, 5).float()
            found.append(Recovered(place, self.held.inputs[torch.cat(rows)], y, answers, 0.0, 0.0, 1.0, 0.0))
        return found

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
def test_models_that_exchanged_their_classes_are_found_out(seed):
    """Ten models, four of which lie; images as an exact inversion would have them. An even share of trust is .6."""
    held, draws = texture_classes(40), generator(seed, "pool")
    learned = [draws.choice(10, 5, replace=False).tolist() for _ in range(10)]
    claimed = [mislabelled(own, draws) if place < 4 else tuple(own) for place, own in enumerate(learned)]
    module = Conv2(5, width=4, size=12, generator=torch.Generator().manual_seed(0))
    models = WhitePool([White(f"e{i}", module, shape=(1, 12, 12), classes=one) for i, one in enumerate(claimed)])
    changed = {
        "steps": 60,
        "per_class": 8,
        "replays": 1,
        "replay_tasks": 2,
        "shots": 3,
        "queries": 4,
        "interpolate": 0.0,
    }
    settings = Robust(**changed, warm_up=0, suspects="keep", recovery="fresh", generator_width=4)
    chosen = Trusted(models, settings, seed)
    network = Conv2(5, width=12, size=12, generator=torch.Generator().manual_seed(seed))
    train(models, network, settings, seed=seed, embed=embed, selection=chosen, recovery=Perfect(held, learned))
    trust = chosen.policy.scores.detach().softmax(0)
    assert trust[4:].sum() > 0.7
    assert trust[:4].mean() < trust[4:].mean() / 2
