from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from spolia.bench.fewshot import evaluate
from spolia.bench.fewshot_scores import difference
from spolia.core.journal import Interrupted, Journal
from spolia.core.seeds import generator
from spolia.data.augment import Augment
from spolia.data.fewshot import digit_classes
from spolia.methods.meta.protonet import Protonet, ProtonetLearner, protonet, prototypes, ridge, squared
from spolia.parts.classes import ClassSet
from spolia.parts.episode import EpisodeSampler


def network(seed: int = 0, width: int = 32) -> torch.nn.Module:
    draws = torch.Generator().manual_seed(seed)
    layers = [torch.nn.Flatten(), torch.nn.Linear(64, width), torch.nn.BatchNorm1d(width), torch.nn.ReLU()]
    module = torch.nn.Sequential(*layers, torch.nn.Linear(width, width))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn(parameter.shape, generator=draws) / parameter.shape[1] ** 0.5)
        for layer in (module[1], module[-1]):
            layer.bias.zero_()
    return module


def pixels() -> ProtonetLearner:
    return ProtonetLearner(torch.nn.Sequential(torch.nn.Flatten(), _Identity()), Protonet(steps=1))


class _Identity(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x


def samples(shots: int, ways: int = 5) -> EpisodeSampler:
    return EpisodeSampler(digit_classes(), ways=ways, shots=shots, queries=6, seed=2)


def random(*shape: int) -> torch.Tensor:
    return torch.from_numpy(generator(0, "features").standard_normal(shape))


def test_it_is_the_nearest_mean():
    e = samples(4).episode(0)
    logits = pixels().predict(e.support_x, e.support_y, e.query_x)
    means = e.support_x.view(5, 4, -1).mean(1)
    distances = (e.query_x.flatten(1)[:, None] - means[None]).square().sum(2)
    assert torch.allclose(logits, -distances, atol=1e-4)  # fp32 sums of 64 squares up to 1


def test_with_one_shot_it_is_the_nearest_neighbour():
    neighbours = pytest.importorskip("sklearn.neighbors")
    e = samples(1).batch(range(5))
    for task in e:
        wanted = neighbours.KNeighborsClassifier(1).fit(task.support_x.flatten(1).numpy(), task.support_y.numpy())
        logits = pixels().predict(task.support_x, task.support_y, task.query_x)
        assert logits.argmax(1).tolist() == wanted.predict(task.query_x.flatten(1).numpy()).tolist()


def test_labels_may_stand_in_any_order_and_tasks_be_stacked():
    e = samples(3).batch(range(4))
    learner = pixels()
    order = torch.from_numpy(generator(0).permutation(15))
    stacked = learner.predict(e.support_x, e.support_y, e.query_x)
    for row, task in zip(stacked, e, strict=True):
        shuffled = learner.predict(task.support_x[order], task.support_y[order], task.query_x)
        assert torch.allclose(row, shuffled, atol=1e-4)  # fp32 sums in another order


@pytest.mark.parametrize(("items", "width"), [(10, 40), (30, 8)])
def test_ridge_solves_the_normal_equations(items, width):
    """Twice (F'F + lambda I)^-1 F'Y, solved among the features."""
    support, query = random(2, items, width), random(2, 7, width)
    labels = torch.arange(5).repeat(items // 5).expand(2, -1)
    y = torch.nn.functional.one_hot(labels).double()
    gram = support.transpose(1, 2) @ support + 0.7 * torch.eye(width, dtype=torch.float64)
    wanted = 2 * query @ torch.linalg.solve(gram, support.transpose(1, 2) @ y)
    assert torch.allclose(ridge(support, labels, query, 0.7), wanted, atol=1e-10)  # fp64, condition below 1e3
    assert ridge(support, labels, query, 1e12).abs().max() < 1e-9, "an endless penalty leaves nothing"


def test_heads_differ_as_their_settings_say():
    e = samples(2).batch(range(3))
    module = network().eval()
    made = {
        name: ProtonetLearner(module, Protonet(steps=1, **settings)).predict(e.support_x, e.support_y, e.query_x)
        for name, settings in {
            "plain": {},
            "divided": {"divide": True},
            "scaled": {"scale": 3.0},
            "cosine": {"distance": "cosine", "scale": 10.0},
            "ridge": {"head": "ridge"},
        }.items()
    }
    assert torch.allclose(made["divided"], made["plain"] / 32) and torch.allclose(made["scaled"], 3 * made["plain"])
    assert made["cosine"].abs().max() <= 10 + 1e-4 and made["cosine"].max() > 0  # rounding of a cosine of one
    assert not torch.allclose(made["ridge"], made["plain"])
    support, query = random(2, 6, 9), random(2, 4, 9)
    means = prototypes(support, torch.tensor([0, 1, 2, 2, 1, 0]).expand(2, -1))
    assert torch.allclose(means[:, 2], support[:, 2:4].mean(1))
    assert torch.allclose(squared(query, means), torch.cdist(query, means) ** 2)


def test_predicting_leaves_no_trace():
    learner = ProtonetLearner(network().train(), Protonet(steps=1))
    before = {n: v.clone() for n, v in learner.state_dict().items()}
    evaluate(learner.predict, samples(1), 4)
    assert all(torch.equal(v, before[n]) for n, v in learner.state_dict().items()) and learner.network.training


def train(journal=None, steps=40, watch=None, **settings):
    train_set, _ = digit_classes().split((0.5, 0.5), seed=0)
    episodes = EpisodeSampler(train_set.turned(), ways=5, shots=1, queries=5, seed=1)
    chosen = Protonet(steps=steps, check_every=10, learn_scale=True, divide=True, **settings)
    return protonet(network(), episodes, chosen, journal, augment=Augment(noise=0.1), watch=watch)


def test_the_network_given_is_not_changed_and_the_loss_falls():
    given = network()
    before = {n: v.clone() for n, v in given.state_dict().items()}
    train_set, _ = digit_classes().split((0.5, 0.5), seed=0)
    episodes = EpisodeSampler(train_set, ways=5, shots=1, queries=5, seed=1)
    learner = protonet(given, episodes, Protonet(steps=60, lr=3e-3))
    assert all(torch.equal(v, before[n]) for n, v in given.state_dict().items())
    assert learner.losses[-10:].mean() < learner.losses[:10].mean()
    assert not learner.scale.requires_grad and learner.scale == 1


def test_an_interrupted_training_ends_with_the_same_bits(tmp_path):
    def score(step, learner):
        return float(-((step - 20) ** 2))

    whole = train(watch=score)
    journal = Journal(
        tmp_path, save_every=0, progress=lambda phase, done, n, numbers: done == 17 and journal.request_stop()
    )
    with pytest.raises(Interrupted):
        train(journal, watch=score)
    again = train(Journal(tmp_path), watch=score)
    for one, other in ((whole, again), (whole.chosen(), again.chosen())):
        state = other.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in one.state_dict().items())
    assert torch.equal(whole.losses, again.losses) and whole.scale != 1
    assert whole.selection.best_step == again.selection.best_step == 20
    assert [step for step, _ in again.selection.scores] == [10, 20, 30, 40]
    assert not torch.equal(whole.chosen().scale, whole.scale)


def clusters(seed: int) -> ClassSet:
    """40 classes that differ in 8 of 32 numbers; the others are noise three times as strong."""
    draws = generator(seed, "clusters")
    middles = np.pad(draws.standard_normal((40, 8)) * 2, ((0, 0), (0, 24)))
    spread = np.repeat([1.0, 3.0], [8, 24])
    x = middles[:, None] + spread * draws.standard_normal((40, 30, 32))
    return ClassSet.of(torch.from_numpy(x.reshape(-1, 32)).float(), np.repeat(np.arange(40), 30))


@pytest.mark.slow
def test_training_learns_what_to_leave_out():
    """The start sees all 32 numbers alike; what tells classes apart is the same in classes never seen."""
    for seed in range(3):
        train_set, test_set = clusters(seed).split((0.5, 0.5), seed=seed)
        judge = EpisodeSampler(test_set, ways=5, shots=1, queries=5, seed=9)
        asked = Protonet(steps=150, tasks=4, lr=1e-2, divide=True)
        start = torch.nn.Linear(32, 32, bias=False)
        torch.nn.init.eye_(start.weight)
        trained = protonet(start, EpisodeSampler(train_set, ways=5, shots=1, queries=5, seed=seed), asked)
        ask = partial(evaluate, sampler=judge, episodes=100)
        gain = difference(ask(trained.predict), ask(ProtonetLearner(start, asked).predict))
        assert gain.low > 10, f"seed {seed}: {gain}"


@pytest.mark.parametrize("wrong", [{"head": "svm"}, {"scale": 0}, {"lr": -1}, {"ways": 5}])
def test_settings_are_checked(wrong):
    with pytest.raises(ValidationError):
        Protonet(**wrong)
