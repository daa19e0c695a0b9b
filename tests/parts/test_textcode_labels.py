"""Labels: told apart, scored as the density is, and assigned so that a model's receiver errs less."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from spolia.core.modulation import constellation, modulate
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.parts.channel import Channel
from spolia.parts.textcode_confusion import Dense, of_bigrams, of_contexts
from spolia.parts.textcode_labels import (
    Labels,
    _Swaps,
    aware_labels,
    bound,
    index_labels,
    permuted_labels,
    protected,
    width_of,
)


def model(size: int, seed: int = 0, sharpness: float = 2.0) -> torch.Tensor:
    """A bigram model [V, V] in which tokens have likes: rows are softmaxes of normal scores of rank 4."""
    rng = generator(seed, "model", size)
    scores = torch.from_numpy(rng.standard_normal((size, 4)) @ rng.standard_normal((4, size)))
    return (sharpness * scores).softmax(-1)


@pytest.mark.parametrize("size", [1, 2, 3, 100, 130])
def test_labels_tell_tokens_apart(size: int) -> None:
    assert width_of(size) == max(math.ceil(math.log2(size)), 1)
    aware = aware_labels(of_bigrams(torch.ones(size) / size, model(size)), 2.0, generator(0), sweeps=1)
    for labels in (index_labels(size), permuted_labels(size, generator(0)), aware):
        assert labels.bits.shape == (size, labels.width)
        assert torch.equal(labels.inverse[labels.codes], torch.arange(size))
        assert int((labels.inverse >= 0).sum()) == size
        assert len(torch.unique(labels.bits, dim=0)) == size
    assert index_labels(size).codes.tolist() == list(range(size))


def test_permutations_go_by_seed() -> None:
    first, same, other = (permuted_labels(100, generator(seed)) for seed in (0, 0, 1))
    assert first.fingerprint == same.fingerprint != other.fingerprint


def test_doubled_labels_are_refused() -> None:
    for codes, width in (([0, 1, 1], 2), ([0, 4], 2), ([-1, 0], 2)):
        with pytest.raises(SpoliaError, match="tell tokens apart"):
            Labels(torch.tensor(codes), width)


def test_scores_are_log_likelihoods_but_for_a_constant() -> None:
    """Against the density of the symbols of each token's label, BPSK and QPSK under fading, fp64."""
    labels = permuted_labels(50, generator(1))
    for name in ("bpsk", "qpsk"):
        c = constellation(name, torch.complex128)
        x = modulate(labels.bits[[3, 17, 49]], c)
        received = Channel("rayleigh").transmit(x, 0.4, generator(2))
        sent = modulate(labels.bits, c)  # [V, n]
        off = received.y[:, None] - received.gain[:, None] * sent
        exact = -(off.abs().square() / 0.4).sum(-1)
        apart = labels.scores(received.llrs(c)) - exact
        assert (apart - apart[:, :1]).abs().max() < 1e-9  # of numbers of order 100


def test_confusion_of_bigrams_is_its_definition() -> None:
    following, shares = model(5), torch.tensor([0.1, 0.2, 0.3, 0.3, 0.1], dtype=torch.float64)
    found = of_bigrams(shares, following).values
    for u, v in itertools.product(range(5), repeat=2):
        expected = sum(float(shares[c] * (following[c, u] * following[c, v]).sqrt()) for c in range(5))
        assert float(found[u, v]) == pytest.approx(0 if u == v else expected)


def test_confusion_of_contexts_is_that_of_bigrams() -> None:
    following = model(6)
    shares = torch.tensor([1, 2, 0, 3, 1, 1], dtype=torch.float64) / 8
    contexts = following.log().repeat_interleave(torch.tensor([1, 2, 0, 3, 1, 1]), dim=0)
    dense = of_bigrams(shares, following).values
    torch.testing.assert_close(of_contexts([contexts[:3], contexts[3:]]).values, dense)
    sparse = of_contexts([contexts[:3], contexts[3:]], top=6)
    torch.testing.assert_close(torch.stack([sparse.row(token) for token in range(6)]), dense)
    few = of_contexts([contexts], top=2)
    assert few.values.numel() <= 8 * 2
    for row in range(6):
        assert (few.row(row) <= dense[row] + 1e-12).all()


@pytest.mark.parametrize("size", [5, 16])
@pytest.mark.parametrize("top", [None, 3])
def test_a_swap_changes_the_bound_by_what_was_foreseen(size: int, top: int | None) -> None:
    confusion = of_contexts([model(size).log()], top)
    swaps = _Swaps(confusion, permuted_labels(size, generator(3)), 1.0)
    before = bound(confusion, Labels(swaps.codes[:size].clone(), swaps.width), 1.0)
    for token in range(size):
        best = before
        for other in range(len(swaps.codes)):  # all swaps, tried one by one
            codes = swaps.codes.clone()
            codes[[token, other]] = codes[[other, token]]
            best = min(best, bound(confusion, Labels(codes[:size], swaps.width), 1.0))
        swaps.improve(token)
        after = bound(confusion, Labels(swaps.codes[:size].clone(), swaps.width), 1.0)
        assert after == pytest.approx(best, rel=1e-9)
        assert float(swaps.costs.sum()) / 2 == pytest.approx(after, rel=1e-9)  # kept right on the way
        before = after


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_goes_to_opposite_corners(seed: int) -> None:
    """Two tokens confused alone: complementary labels, J = c Z^b, from any start."""
    values = torch.zeros(11, 11, dtype=torch.float64)
    values[3, 8] = values[8, 3] = 0.1
    labels = aware_labels(Dense(values), 0.0, generator(seed))
    assert int(labels.codes[3] ^ labels.codes[8]) == 0b1111
    assert bound(Dense(values), labels, 0.0) == pytest.approx(0.1 * math.exp(-4))


@pytest.mark.parametrize("size", [20, 32])
def test_aware_labels_err_less(size: int) -> None:
    """J, and the union bound of MAP errors itself: for every start below the mean of random labels, mostly far below.

    Descent can only lower J. For the errors it minimises a bound, so they are compared on the mean over six starts.
    """
    following, gamma = model(size), 10**0.2
    shares = torch.full((size,), 1 / size, dtype=torch.float64)
    confusion = of_bigrams(shares, following)
    errors, bounds = {"random": [], "aware": []}, {"random": [], "aware": []}
    for seed in range(6):
        start = permuted_labels(size, generator(seed))
        for name, labels in (("random", start), ("aware", aware_labels(confusion, 2.0, generator(seed)))):
            bounds[name].append(bound(confusion, labels, 2.0))
            errors[name].append(pairwise_errors(labels, following, gamma))
        assert bounds["aware"][-1] < bounds["random"][-1]
    assert max(bounds["aware"]) < min(bounds["random"])
    assert sum(errors["aware"]) < sum(errors["random"])


def pairwise_errors(labels: Labels, following: torch.Tensor, gamma: float) -> float:
    """Mean over contexts of sum_u P(u) sum_v Q(sqrt(2 d g) + ln(P(u) / P(v)) / sqrt(8 d g)), BPSK."""
    d = (labels.bits[:, None] != labels.bits).sum(-1).double()
    logs = following.log()
    ratio = logs[:, :, None] - logs[:, None]  # [contexts, u, v]
    x = (2 * d * gamma).sqrt() + ratio / (8 * d * gamma).sqrt()
    q = torch.special.erfc(x / math.sqrt(2)) / 2
    q[:, torch.arange(len(d)), torch.arange(len(d))] = 0.0
    return float((following[:, :, None] * q).sum() / len(following))


def test_few_movable_tokens_and_a_sparse_model() -> None:
    confusion = of_contexts([model(100).log()], top=8)
    start = permuted_labels(100, generator(0))
    few = aware_labels(confusion, 2.0, generator(0), sweeps=1, movable=10)
    assert int((few.codes != start.codes).sum()) <= 20
    all_ = aware_labels(confusion, 2.0, generator(0))
    assert bound(confusion, all_, 2.0) < bound(confusion, few, 2.0) < bound(confusion, start, 2.0)


def test_protection_goes_where_it_helps() -> None:
    """Two tokens confused alone, labels 01 and 11: only the first bit tells them apart."""
    values = torch.zeros(3, 3, dtype=torch.float64)
    values[0, 1] = values[1, 0] = 0.5
    labels = Labels(torch.tensor([1, 3, 0]), 2)
    assert protected(Dense(values), labels, 0.0, 2) == (3, 1)
    assert bound(Dense(values), labels, 0.0, (3, 1)) == pytest.approx(0.5 * math.exp(-3))
