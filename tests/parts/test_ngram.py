"""N-grams: probabilities that add up, a corpus counted by hand, a naive model of dictionaries."""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from fractions import Fraction

import pytest
import torch

from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.parts.ngram import NGram
from spolia.parts.prior import NGramPrior, log_likelihood

V = 5


def corpus(seed: int, lines: int = 30, vocabulary: int = V) -> list[list[int]]:
    rng = generator(seed, "corpus")
    return [
        rng.choice(vocabulary, rng.integers(0, 9), p=rng.dirichlet([0.5] * vocabulary)).tolist() for _ in range(lines)
    ]


def perplexity(model: NGram, texts: list[list[int]]) -> float:
    prior = NGramPrior(model)
    scores = torch.cat([log_likelihood(prior, torch.tensor([text])).flatten() for text in texts])
    return float(scores.double().mean().neg().exp())


def histories(width: int) -> torch.Tensor:
    return torch.tensor(list(itertools.product(range(V + 1), repeat=width)), dtype=torch.int64)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", [0, 1])
def test_every_history_has_a_distribution(order: int, seed: int) -> None:
    """All histories, among them many never seen, and some that cannot be."""
    model = NGram.fit(corpus(seed), V, order)
    found = model.log_probs(histories(order - 1))
    assert found.shape == ((V + 1) ** (order - 1), V)
    assert found.dtype == torch.float32
    assert found.isfinite().all()
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(len(found)))


def test_a_corpus_counted_by_hand() -> None:
    """Texts 'a b a' and 'a b b', V = 3 with c never seen, order 2; S is the start.

    Bigrams: Sa 2, ab 2, ba 1, bb 1: D = 2 / (2 + 2 2) = 1/3. Unigrams are continuations: a after S and b, b after a and b:
    a 2, b 2, no count is 1: D = 1/2. P1 = (2 - 1/2) / 4 + (1/2 2 / 4) / 3 = 11/24 for a and b, 1/12 for c.
    """
    model = NGram.fit([[0, 1, 0], [0, 1, 1]], 3, 2)
    one = [Fraction(11, 24), Fraction(11, 24), Fraction(1, 12)]
    third = Fraction(1, 3)
    after = {
        3: [(2 - third) / 2 + third / 2 * one[0], third / 2 * one[1], third / 2 * one[2]],  # S: a twice
        0: [third / 2 * one[0], (2 - third) / 2 + third / 2 * one[1], third / 2 * one[2]],  # a: b twice
        1: [(1 - third) / 2 + third * p if i < 2 else third * p for i, p in enumerate(one)],  # b: a and b once
        2: one,  # c: never seen
    }
    for history, expected in after.items():
        found = model.log_probs(torch.tensor([history])).exp().tolist()
        assert found == pytest.approx([float(p) for p in expected], abs=1e-6)
    chosen = [after[3][0], after[0][1], after[1][0], after[3][0], after[0][1], after[1][1]]
    by_hand = math.exp(-sum(math.log(p) for p in chosen) / 6)
    assert perplexity(model, [[0, 1, 0], [0, 1, 1]]) == pytest.approx(by_hand, rel=1e-6)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_is_the_model_of_dictionaries(order: int) -> None:
    texts = corpus(2)
    model, naive = NGram.fit(texts, V, order), Naive(texts, V, order)
    table = model.log_probs(histories(order - 1)).exp()
    for history, row in zip(histories(order - 1).tolist(), table.tolist(), strict=True):
        assert row == pytest.approx([naive.probability(tuple(history), w) for w in range(V)], abs=1e-6)


class Naive:
    """The formula of the module, word by word."""

    def __init__(self, texts: list[list[int]], vocabulary: int, order: int):
        self.vocabulary, self.order = vocabulary, order
        grams = [Counter() for _ in range(order + 1)]
        for text in texts:
            padded = [vocabulary] * (order - 1) + text
            for end in range(order - 1, len(padded)):
                for k in range(1, order + 1):
                    grams[k][tuple(padded[end - k + 1 : end + 1])] += 1
        self.counts = [defaultdict(Counter) for _ in range(order + 1)]
        for k in range(1, order + 1):
            for gram, count in grams[k].items():
                if k < order and gram[0] != vocabulary:
                    count = len({longer[0] for longer in grams[k + 1] if longer[1:] == gram})
                self.counts[k][gram[:-1]][gram[-1]] = count

    def probability(self, history: tuple[int, ...], word: int) -> float:
        return self._at(self.order, history, word)

    def _at(self, k: int, history: tuple[int, ...], word: int) -> float:
        if k == 0:
            return 1 / self.vocabulary
        lower = self._at(k - 1, history[1:], word)
        after = self.counts[k].get(history)
        if after is None:
            return lower
        every = [count for counter in self.counts[k].values() for count in counter.values()]
        once, twice = every.count(1), every.count(2)
        discount = once / (once + 2 * twice) if once and twice else 0.5
        total = sum(after.values())
        return max(after[word] - discount, 0) / total + discount * len(after) / total * lower


def test_learns_a_grammar() -> None:
    """A cycle 0 1 2 3 4 0 …: as near to certain as the discounts allow, and all tokens alike without order."""
    texts = [[i % V for i in range(start, start + 50)] for start in range(V)]
    assert perplexity(NGram.fit(texts, V, 2), texts) < 1.1
    assert perplexity(NGram.fit(texts, V, 1), texts) == pytest.approx(V)


def test_order_helps_on_text_that_has_one() -> None:
    from pydoc_data.topics import topics

    pages = [list(topics[name].encode("ascii", "replace")) for name in sorted(topics)]
    held = [page[:500] for page in pages[::9]]
    train = [page[:2500] for i, page in enumerate(pages) if i % 9]
    perplexities = [perplexity(NGram.fit(train, 256, order), held) for order in (1, 2, 3, 4)]
    # English letters: from 4 to 5 bits without context to near 2; each order saves more than a tenth
    assert all(after < 0.9 * before for before, after in itertools.pairwise(perplexities))


def test_fingerprints_and_devices() -> None:
    texts = corpus(7)
    model = NGram.fit(texts, V, 3)
    assert model.fingerprint == NGram.fit([torch.tensor(t) for t in texts], V, 3).fingerprint
    assert model.fingerprint == model.to("cpu").fingerprint
    assert model.fingerprint != NGram.fit(texts[1:], V, 3).fingerprint


def test_mistakes_are_told() -> None:
    with pytest.raises(SpoliaError, match="no text"):
        NGram.fit([[], []], V)
    with pytest.raises(SpoliaError, match="token 5 of 5"):
        NGram.fit([[0, 5]], V)
    with pytest.raises(SpoliaError, match="order"):
        NGram.fit([[0]], 50_000, 6)
