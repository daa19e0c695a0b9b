"""asp: its prompts, bound, anchors and means by hand, and what is left of it without prompts."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from spolia.bench.continual import Protocol, run
from spolia.errors import SpoliaError
from spolia.methods.continual.asp import Asp, AspLearner, divergence
from spolia.methods.continual.ncm import Ncm, NcmLearner
from spolia.parts.encoder import Encoder, Prompts
from spolia.parts.stream import Stream, class_incremental
from spolia.zoo.vit import ViT

SMALL = Asp(half=2, hidden=8, lr=0.1, readings=3)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(ViT(8, 4, 16, 2, 2, generator=torch.Generator().manual_seed(0)))


def images(each: int, seed: int) -> tuple[Tensor, Tensor]:
    draws = torch.Generator().manual_seed(seed)
    y = torch.arange(6).repeat(each)
    x = 0.7 * torch.randn(len(y), 3, 8, 8, generator=draws)
    for i, label in enumerate(y.tolist()):
        x[i, label % 3, :4, 4 * (label // 3) :] += 1.5
    return x, y


@pytest.fixture(scope="module")
def stream() -> Stream:
    return class_incremental(images(10, 0), images(6, 1), tasks=[4, 1, 1], shots=3)


def learner(encoder: Encoder, settings: Asp = SMALL, seed: int = 0, **more: Any) -> AspLearner:
    """One whose invariant prompts have left zero, so that every part of it shows."""
    own = AspLearner(encoder, settings, classes=6, seed=seed, **more)
    if settings.half:
        with torch.no_grad():
            own.network["invariant"].normal_(generator=torch.Generator().manual_seed(5))
        own.state["mean"] = torch.randn(2, settings.half, 16, generator=torch.Generator().manual_seed(6))
    return own


def based(own: AspLearner, stream: Stream) -> AspLearner:
    """Inside the base session, after its first look at the data."""
    own.begin(stream.experiences[0])
    own._look()
    return own


# --- equations ---------------------------------------------------------------------------------------------------------


def test_prompts_and_features_by_hand(encoder) -> None:
    own, x = learner(encoder), images(1, 3)[0][:3]
    p = {name: t.detach() for name, t in own.network.items()}
    f = encoder.module(x)
    tokens = {}
    for block in range(2):
        u = torch.cat([p["invariant"][block, 0].expand(3, -1), f], 1)
        mu = (u @ p["mu_weight0"].T + p["mu_bias0"]) @ p["mu_weight1"].T + p["mu_bias1"]
        s = nn.functional.softplus(
            (u @ p["sigma_weight0"].T + p["sigma_bias0"]) @ p["sigma_weight1"].T + p["sigma_bias1"] - 5
        )
        found = own.specific(f, deviations=True)
        torch.testing.assert_close(found[0][:, block].flatten(1), mu, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(found[1][:, block].flatten(1), s, rtol=1e-4, atol=1e-6)
        mixed = 0.8 * own.state["mean"][block] + 0.2 * mu.view(3, 2, 16)
        tokens[block] = torch.cat([p["invariant"][block].expand(3, -1, -1), mixed], 1)
    torch.testing.assert_close(own.features(x), encoder.features(x, Prompts(tokens=tokens)), rtol=1e-4, atol=1e-5)


def test_what_is_learned_is_what_the_paper_counts() -> None:
    """P = 6 on ViT-B: two encoders of 985,600 numbers and 27,648 of the invariant prompts; then head and scale."""
    module = nn.Module()
    module.blocks = nn.ModuleList(nn.Sequential(nn.LayerNorm(768, device="meta")) for _ in range(12))
    module.place = nn.Parameter(torch.zeros(1))
    own = AspLearner(Encoder(module), Asp(), classes=60)
    sizes = {name: p.numel() for name, p in own.network.items()}
    assert sum(n for name, n in sizes.items() if name.startswith("mu")) == 985_600
    assert sum(n for name, n in sizes.items() if name.startswith("sigma")) == 985_600
    assert (sizes["invariant"], sizes["head"], sizes["scale"]) == (27_648, 46_080, 1)


def test_the_bound_is_the_divergence_of_gaussians() -> None:
    draws = torch.Generator().manual_seed(0)
    mu, s = torch.randn(3, 2, 2, 4, generator=draws), torch.rand(3, 2, 2, 4, generator=draws) + 0.1
    normal = torch.distributions.Normal
    each = torch.distributions.kl_divergence(normal(mu, s), normal(0.0, 1.0))
    torch.testing.assert_close(divergence(mu, s), each.sum((2, 3)).mean())
    torch.testing.assert_close(divergence(mu, s, "mean"), each.mean())
    assert divergence(torch.zeros(2, 1, 1, 3), torch.ones(2, 1, 1, 3)) == 0
    one, count = (mu[:1, :1, :1, :1], s[:1, :1, :1, :1]), 200_000
    drawn = one[0] + one[1] * torch.randn(count, 1, 1, 1, generator=draws)
    ratio = normal(*one).log_prob(drawn) - normal(0.0, 1.0).log_prob(drawn)
    error = float(ratio.std()) / math.sqrt(count)
    assert abs(float(divergence(*one)) - float(ratio.mean())) < 4 * error  # four standard errors


def test_the_bound_at_the_start_is_above_the_cross_entropy(encoder, stream) -> None:
    """softplus(-5): about 4.5 for each number of a prompt, so 0.001 of the sum over 3 x 768 is about 10."""
    mu, s = torch.zeros(1, 12, 3, 768), nn.functional.softplus(torch.full((1, 12, 3, 768), -5.0))
    assert float(divergence(mu, s)) * 1e-3 == pytest.approx(3 * 768 * 4.5 * 1e-3, rel=0.01)


def test_the_loss_by_hand_with_an_anchor_for_every_example(encoder, stream) -> None:
    """The program sends an anchor through for each example; once a class is the same, where no noise is."""
    own = based(learner(encoder, SMALL.model_copy(update={"anchor": 0.5, "bottleneck": 0.01})), stream)
    batch, base = stream.experiences[0].draw(9, 0, 0), stream.experiences[0]
    draws = copy.deepcopy(own.draws)
    loss, scores = own.loss(batch)
    noise = torch.from_numpy(draws.standard_normal((9, 2, 2, 16), dtype="float32"))
    mu, s = own.specific(encoder.plain(batch.x), deviations=True)
    features = encoder.features(batch.x, own.prompts(mu + s * noise))
    anchors = torch.stack([own.features(base.batch([own.state["anchors"][y]]).x)[0] for y in batch.y.tolist()])
    cosine = nn.functional.cosine_similarity(features, own.network["head"].unsqueeze(1), dim=2).T
    torch.testing.assert_close(scores, own.network["scale"] * cosine, rtol=1e-4, atol=1e-5)
    by_hand = nn.functional.cross_entropy(scores[:, :4], batch.y) + 0.01 * divergence(mu, s)
    by_hand = by_hand + 0.5 * (1 - nn.functional.cosine_similarity(features, anchors, dim=1)).mean()
    torch.testing.assert_close(loss, by_hand, rtol=1e-4, atol=1e-5)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in own.parameters)
    assert (own.network["head"].grad.abs().sum(1) > 0).tolist() == [True] * 4 + [False] * 2


def test_gradients_agree_with_differences(encoder, stream) -> None:
    own = based(
        learner(encoder, SMALL.model_copy(update={"anchor": 0.0})), stream
    )  # anchors move with prompts, unasked
    batch, state = stream.experiences[0].draw(6, 0, 0), copy.deepcopy(own.draws.bit_generator.state)

    def value() -> float:
        own.draws.bit_generator.state = copy.deepcopy(state)
        with torch.no_grad():
            return float(own.loss(batch)[0].double())

    own.draws.bit_generator.state = copy.deepcopy(state)
    own.loss(batch)[0].backward()
    for name in ("mu_weight1", "sigma_bias1", "head", "scale"):
        p = own.network[name]
        way = p.grad / p.grad.norm()
        step, ends = 3e-2, []
        for side in (1, -1):
            with torch.no_grad():
                p.add_(side * step * way)
                ends.append(value())
                p.sub_(side * step * way)
        by_difference = (ends[0] - ends[1]) / (2 * step)
        # fp32 losses of about 2 carry 1e-7 of them, here over 0.06; the third derivative is the rest
        assert float(p.grad.norm()) == pytest.approx(by_difference, rel=0.03, abs=1e-5)


def test_invariant_prompts_learn_through_the_blocks_alone(encoder) -> None:
    """The prompt encoder reads the first of them without a gradient."""
    own = learner(encoder)
    mu, _ = own.specific(torch.randn(3, 16))
    assert torch.autograd.grad(mu.sum(), own.network["invariant"], allow_unused=True) == (None,)
    fresh = AspLearner(encoder, SMALL, classes=6)
    assert not fresh.network["invariant"].any()


# --- anchors, means, prototypes ------------------------------------------------------------------------------------------


def test_anchors_are_the_examples_nearest_their_classs_mean(encoder, stream) -> None:
    own = based(learner(encoder), stream)
    batch = stream.experiences[0].batch(slice(None))
    features = own.features(batch.x)
    for label in range(4):
        places = (batch.y == label).nonzero().squeeze(1)
        near = nn.functional.cosine_similarity(features[places], features[places].mean(0, keepdim=True))
        assert own.state["anchors"][label] == int(places[near.argmax()])
    assert own.state["anchors"][4:] == [-1, -1]


def test_the_mean_and_how_it_moves(encoder, stream) -> None:
    own = learner(encoder)
    base, later = stream.experiences[0], stream.experiences[1]
    own.begin(base)
    own.end(base)
    mean = own.specific(encoder.plain(base.batch(slice(None)).x))[0].mean(0)
    torch.testing.assert_close(own.state["mean"], mean, rtol=1e-4, atol=1e-5)
    own.begin(later)
    own.end(later)
    new = own.specific(encoder.plain(later.batch(slice(None)).x))[0].mean(0)
    torch.testing.assert_close(own.state["mean"], 0.99 * mean + 0.01 * new, rtol=1e-4, atol=1e-5)
    prototype = own.features(later.batch(slice(None)).x).mean(0)  # by the mean as it is now
    torch.testing.assert_close(own.prototypes.means[4], prototype, rtol=1e-4, atol=1e-5)


def test_after_many_sessions_the_base_weighs_by_the_power(encoder, stream) -> None:
    own = learner(encoder)
    own.begin(stream.experiences[0])
    own.end(stream.experiences[0])
    base = own.state["mean"].clone()
    new = own.specific(encoder.plain(stream.experiences[1].batch(slice(None)).x))[0].mean(0)
    for _ in range(5):
        own.begin(stream.experiences[1])
        own.end(stream.experiences[1])
    weight = 0.99**5
    torch.testing.assert_close(own.state["mean"], weight * base + (1 - weight) * new, rtol=1e-4, atol=1e-5)


# --- limits ------------------------------------------------------------------------------------------------------------


def test_without_prompts_it_is_ncm(encoder, stream) -> None:
    own = AspLearner(encoder, Asp(half=0, readings=1), classes=6)
    other = NcmLearner(encoder, Ncm(), classes=6)
    found = [run(one, stream, Protocol(batch=8)) for one in (own, other)]
    x = stream.tests[0].examples.batch(slice(None)).x
    assert torch.equal(own.predict(x), other.predict(x)) and found[0].matrix[-1] == found[1].matrix[-1]


def test_with_the_mean_alone_inputs_prompts_do_not_matter(encoder) -> None:
    own, x = learner(encoder, SMALL.model_copy(update={"mix": 1.0})), images(1, 3)[0]
    before = own.features(x)
    with torch.no_grad():
        own.network["mu_weight1"].add_(1.0)
    assert torch.equal(own.features(x), before)
    mixed = learner(encoder, SMALL.model_copy(update={"mix": 0.5}))
    before = mixed.features(x)
    with torch.no_grad():
        mixed.network["mu_weight1"].add_(1.0)
    assert not torch.allclose(mixed.features(x), before)


@pytest.mark.slow
def test_training_lowers_the_base_loss(encoder, stream) -> None:
    for seed in range(3):
        own = AspLearner(encoder, SMALL.model_copy(update={"bottleneck": 0.0, "readings": 8}), classes=6, seed=seed)
        first = stream.experiences[0]
        own.begin(first)
        losses = [float(own.observe(first.draw(20, seed, step))) for step in range(16)]
        assert sum(losses[-4:]) < sum(losses[:4]) - 0.05


def test_a_learner_loaded_inside_the_session_asks_for_its_data(encoder, stream) -> None:
    own = learner(encoder)
    own.begin(stream.experiences[0])
    other = learner(encoder)
    other.load_state_dict(own.state_dict())
    with pytest.raises(SpoliaError, match="inside the base session"):
        other.observe(stream.experiences[0].draw(8, 0, 0))
    given = learner(encoder, base=stream.experiences[0].train)
    given.load_state_dict(own.state_dict())
    assert given.observe(stream.experiences[0].draw(8, 0, 0)) > 0
