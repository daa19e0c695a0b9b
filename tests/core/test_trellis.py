from __future__ import annotations

import itertools

import pytest
import torch

from spolia.core import trellis
from spolia.errors import SpoliaError


@pytest.mark.parametrize("memory", [0, 1, 2])
def test_best_path_and_marginals_are_those_of_all_paths(memory):
    """4 symbols, 5 places: all 1024 paths, in fp64."""
    count, length = 4, 5
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        table = torch.randn((count + 1) ** memory, count, generator=rng, dtype=torch.float64).mul(2).log_softmax(1)
        scores = torch.randn(length, count, generator=rng, dtype=torch.float64) * 2
        first = torch.tensor([count] * memory)
        weights = {}
        for path in itertools.product(range(count), repeat=length):
            history, total = [count] * memory, 0.0
            for t, symbol in enumerate(path):
                number = 0
                for h in history[len(history) - memory :]:
                    number = number * (count + 1) + h
                total += float(table[number, symbol] + scores[t, symbol])
                history.append(symbol)
            weights[path] = total
        best = max(weights, key=weights.__getitem__)
        found, value = trellis.best_path(table, first, scores)
        assert found.tolist() == list(best) and float(value) == pytest.approx(weights[best], abs=1e-12)
        every = torch.tensor(list(weights.values()), dtype=torch.float64)
        paths = torch.tensor(list(weights))
        share, whole = trellis.marginals(table, first, scores)
        assert float(whole) == pytest.approx(float(every.logsumexp(0)), abs=1e-12)
        for t in range(length):
            own = torch.stack([every[paths[:, t] == v].logsumexp(0) for v in range(count)]) - every.logsumexp(0)
            torch.testing.assert_close(share[t], own, rtol=0, atol=1e-12)


def test_histories_are_numbered_oldest_first():
    assert trellis.histories(2, 2).tolist() == [[a, b] for a in range(3) for b in range(3)]
    assert trellis.histories(5, 0).shape == (1, 0)
    with pytest.raises(SpoliaError, match="search with beams"):
        trellis.histories(50257, 1)
