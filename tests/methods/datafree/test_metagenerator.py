from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spolia.methods.datafree.metagenerator import LEAST, MetaGenerator
from spolia.methods.datafree.training import Training
from spolia.parts.white import White, WhitePool

SHAPE = (3, 8, 8)


def settings(**given) -> Training:
    tiny = {"generator_width": 4, "latent": 6, "per_class": 3, "recovery_steps": 3, "shift": 1}
    return Training(**(tiny | given))


def pool(count: int = 2) -> WhitePool:
    experts = []
    for i in range(count):
        draws = torch.Generator().manual_seed(i)
        module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
        with torch.no_grad():
            for p in module.parameters():
                p.copy_(torch.randn(p.shape, generator=draws) / max(1, p[0].numel()) ** 0.5)
            module[1].running_mean.normal_(0, 0.3, generator=draws)
        experts.append(White(f"{i}", module, shape=SHAPE))
    return WhitePool(experts)


def weights(recovery: MetaGenerator) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in recovery.generator.named_parameters()}


def ends(recovery: MetaGenerator, places: list[int]) -> list[dict[str, torch.Tensor]]:
    """Where the steps on each expert lead, each asked for alone but in its own turn."""
    from spolia.methods.datafree.inversion import recovered

    phi = weights(recovery)
    parts = (recovery.pool, places, recovery.settings, lambda turn: phi, recovery.generator, recovery.seed, 5)
    _, fits = recovered(*parts)
    return [{n: t[i] for n, t in one.ends.items()} for one in fits for i in range(len(one.images))]


@pytest.mark.parametrize(("visits", "epsilon"), [(0, 1.0), (50, 0.55), (1000, LEAST)])
def test_reptile_moves_the_stated_share_of_the_way_to_the_mean_end(visits, epsilon):
    recovery = MetaGenerator(pool(), settings())
    recovery.visits = visits
    assert recovery.epsilon == pytest.approx(epsilon)
    start, reached = weights(recovery), ends(recovery, [1, 0])
    recovery.recover([1, 0], 5)
    for name, new in weights(recovery).items():
        mean = (reached[0][name] + reached[1][name]) / 2
        assert torch.allclose(new, start[name] + epsilon * (mean - start[name]), atol=1e-6)  # fp32: one more rounding
    assert recovery.visits == visits + 1


def test_one_expert_and_the_whole_way_end_where_it_ends():
    recovery = MetaGenerator(pool(), settings())
    (reached,) = ends(recovery, [1])
    recovery.recover([1], 5)
    assert all(torch.allclose(p, reached[n], atol=1e-7) for n, p in weights(recovery).items())


def test_a_visit_that_only_looks_moves_nothing():
    recovery = MetaGenerator(pool(), settings())
    before = weights(recovery)
    recovery.recover([0, 1], 5, learn=False)
    assert all(torch.equal(before[n], p) for n, p in weights(recovery).items()) and recovery.visits == 0


def test_as_released_a_step_is_the_rate_times_the_sign():
    recovery = MetaGenerator(pool(), settings(meta="released", meta_lr=1e-3))
    for step in range(2):  # with one optimizer for both the second would be shorter where the sign changes
        before = weights(recovery)
        recovery.recover([0, 1], step)
        move = torch.cat([(before[n] - p).flatten() for n, p in weights(recovery).items()])
        moved = move[move != 0].abs()
        assert float((moved - 1e-3).abs().median()) < 1e-6  # Adam's eps matters for slopes near 1e-8 alone


@pytest.mark.parametrize("meta", ["fomaml_last", "fomaml_sum"])
def test_an_optimizer_that_stays_follows_the_mean_slope(meta):
    recovery = MetaGenerator(pool(), settings(meta=meta, recovery_steps=1, augment="none", flip=False))
    twin = MetaGenerator(pool(), settings(meta="released", recovery_steps=1, augment="none", flip=False))
    recovery.recover([0, 1], 0)
    twin.recover([0, 1], 0)
    for p, q in zip(recovery.generator.parameters(), twin.generator.parameters(), strict=True):
        # first steps of Adam: mean and sum have one sign; where eps counts, they differ by less than a step
        assert torch.allclose(p, q, atol=1e-3) and float((p - q).detach().abs().mean()) < 1e-4


@pytest.mark.parametrize("meta", ["reptile", "fomaml_last"])
def test_its_state_is_all_that_it_knows(meta):
    one = MetaGenerator(pool(), settings(meta=meta))
    one.recover([0, 1], 0)
    other = MetaGenerator(pool(), settings(meta=meta), seed=0)
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in (1, 2):
        a, b = one.recover([1, 0], step), other.recover([1, 0], step)
        assert all(torch.equal(x.images, y.images) for x, y in zip(a, b, strict=True))
