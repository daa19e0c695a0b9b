from __future__ import annotations

import math
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.bench.language import BITS, Likelihood, exponential, ledger_rows, likelihood, mean_nats
from spolia.bench.multitask import t_interval
from spolia.errors import SpoliaError

# Losses are fp32 log-softmax of single tokens, summed in fp64: a few roundings of 6e-8 each.
CLOSE = 1e-6


def uniform(vocabulary):
    return lambda ids: torch.zeros(*ids.shape, vocabulary)


def bigram(vocabulary, seed=0):
    """log P(next | token) [token, next] in fp64, and the model that has it."""
    table = torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed)).double()
    logs = table.log_softmax(1)
    return logs, lambda ids: table.float()[ids]


def stream(n, vocabulary, seed=1):
    return torch.randint(vocabulary, (n,), generator=torch.Generator().manual_seed(seed))


def test_uniform_model_has_the_vocabulary_as_its_perplexity():
    found = likelihood(uniform(7), stream(50, 7), context=8, size=100)
    assert found.tokens == 49 and found.perplexity == pytest.approx(7, rel=CLOSE)
    assert found.bits == pytest.approx(49 * math.log2(7) / 100, rel=CLOSE)
    assert likelihood(uniform(7), stream(50, 7), context=8).bits is None


@pytest.mark.parametrize("context", [1, 2, 7, 59, 60, 200])
@pytest.mark.parametrize("part", [0.01, 0.5, 1.0])
def test_bigram_model_has_its_closed_form_whatever_the_windows(context, part):
    logs, model = bigram(5)
    tokens = stream(60, 5)
    exact = -float(logs[tokens[:-1], tokens[1:]].sum())
    for batch in (1, 3, 100):
        found = likelihood(model, tokens, context=context, stride=max(1, int(part * context)), batch=batch)
        assert found.tokens == 59 and found.nats == pytest.approx(exact, rel=CLOSE)


def test_a_model_that_knows_the_next_token_has_perplexity_one():
    cycle = torch.arange(40) % 4
    sure = lambda ids: 100.0 * torch.nn.functional.one_hot((ids + 1) % 4, 4).float()  # noqa: E731
    assert likelihood(sure, cycle, context=6, stride=2).perplexity == 1.0  # exp(-100) is nothing in fp32


@settings(max_examples=50)
@given(st.integers(2, 40), st.integers(1, 12), st.data())
def test_each_token_is_predicted_by_the_first_window_that_reaches_it(n, context, data):
    """A model whose loss tells the place in the window: 1, 2, 3 … nats, all exact in fp32 up to rounding."""
    stride, batch = data.draw(st.integers(1, context)), data.draw(st.integers(1, 9))

    def place(ids):  # log P(token 1) = -(place + 1) by log-odds against token 0
        nats = torch.arange(1, ids.shape[1] + 1).double()
        odds = -nats - torch.log1p(-torch.exp(-nats))
        logits = torch.stack([torch.zeros_like(odds), odds], 1).float()
        return logits.expand(len(ids), -1, -1)

    expected = 0
    for target in range(1, n):
        start = 0
        while start + context < target:
            start += stride
        expected += target - start
    found = likelihood(place, torch.ones(n, dtype=torch.long), context=context, stride=stride, batch=batch)
    assert found.tokens == n - 1
    assert found.nats == pytest.approx(expected, rel=1e-5)  # the log-odds above lose a digit to cancellation


def test_the_filling_of_the_last_window_is_not_scored():
    def poisoned(ids):  # the filling is token 0, which the text does not hold
        return torch.where(ids[..., None] == 0, math.nan, torch.zeros(*ids.shape, 4))

    assert likelihood(poisoned, stream(23, 3) + 1, context=10).perplexity == pytest.approx(4, rel=CLOSE)


def test_half_precision_logits_lose_nothing_more():
    """In bf16 the loss log 7 would be 1.9453 and a running sum would stand still at 256 of it."""
    logs, model = bigram(7)
    tokens = stream(3000, 7)
    for dtype in (torch.bfloat16, torch.float16):
        flat = likelihood(lambda ids, d=dtype: uniform(7)(ids).to(d), tokens, context=100)
        assert flat.mean == pytest.approx(math.log(7), rel=CLOSE)
        rounded = likelihood(lambda ids, d=dtype: model(ids).to(d), tokens, context=100)
        assert rounded == likelihood(lambda ids, d=dtype: model(ids).to(d).float(), tokens, context=100)
        # a logit below 4 is off by 2^-7 at most, so each loss is by twice that
        assert rounded.mean == pytest.approx(-float(logs[tokens[:-1], tokens[1:]].mean()), abs=2**-6)


def test_models_and_functions_are_judged_alike():
    logs, model = bigram(5)
    tokens = stream(30, 5)
    as_transformers = likelihood(lambda ids: SimpleNamespace(logits=model(ids)), tokens, context=9)
    assert as_transformers == likelihood(model, tokens, context=9)
    module = torch.nn.Embedding.from_pretrained(logs.float()).eval()
    assert likelihood(module, tokens, context=9).nats == pytest.approx(as_transformers.nats, rel=CLOSE)
    with pytest.raises(SpoliaError, match="training mode"):
        likelihood(module.train(), tokens, context=9)


def test_nan_and_overflow_are_kept():
    broken = likelihood(lambda ids: torch.full((*ids.shape, 4), math.nan), stream(9, 4), context=4)
    assert math.isnan(broken.perplexity)
    assert Likelihood(1e6, 10).perplexity == math.inf and exponential(0.0) == 1.0


@pytest.mark.parametrize(
    ("tokens", "asked", "word"),
    [
        (torch.zeros(5), {}, "tokens: is"),
        (torch.zeros(1).long(), {}, "two token ids"),
        (torch.zeros(2, 5).long(), {}, "in one row"),
        (torch.zeros(5).long(), {"context": 0}, "context"),
        (torch.zeros(5).long(), {"batch": 0}, "batch"),
        (torch.zeros(5).long(), {"stride": 0}, "stride"),
        (torch.zeros(5).long(), {"stride": 5}, "leave tokens out"),
        (torch.tensor([0, 3, 1]), {}, "own tokenizer"),
    ],
)
def test_what_does_not_fit_is_told(tokens, asked, word):
    with pytest.raises(SpoliaError, match=word):
        likelihood(uniform(3), tokens, **{"context": 4} | asked)


def test_outputs_of_another_shape_are_told():
    with pytest.raises(SpoliaError, match="return logits"):
        likelihood(lambda ids: torch.zeros(len(ids), 3), stream(5, 3), context=4)


# --- rows ------------------------------------------------------------------------------------------------------------


def scores(*pairs):
    """Perplexities (a, b) of each seed, texts of 10 tokens and 20 bytes."""
    return [{k: Likelihood(10 * math.log(p), 10, 20) for k, p in zip("ab", pair, strict=True)} for pair in pairs]


def test_the_mean_over_texts_is_the_geometric_one():
    (one,) = scores((4.0, 9.0))
    assert exponential(mean_nats(one)) == pytest.approx(6.0)


def test_rows_over_seeds():
    found = {"base": scores((8, 2), (8, 8)), "average": scores((4, 9), (4, 16)), "ties": scores((5, 9), (6, 16))}
    rows = ledger_rows(found, baselines=["base"], against="average")
    assert [(r["method"], r["task"]) for r in rows[:3]] == [("base", "a"), ("base", "b"), ("base", "average")]
    assert rows[0]["baseline"] is True and "baseline" not in rows[3]
    mean = next(r for r in rows if r["method"] == "average" and r["task"] == "average")
    assert mean["mean"] == pytest.approx(7.0) and mean["n"] == 2 and "paired_difference" not in mean
    assert mean["high"] == pytest.approx(t_interval([6.0, 8.0]).high) and mean["low"] == 1.0  # no perplexity is less
    ties = next(r for r in rows if r["method"] == "ties" and r["task"] == "a")
    assert ties["paired_difference"]["against"] == "average"
    assert ties["paired_difference"]["mean"] == pytest.approx(fmean([1, 2]))


def test_rows_of_bits_and_of_one_seed():
    rows = ledger_rows({"average": scores((4, 16)), "pair": [{"a": Likelihood(1.0, 2, 3)}]}, metric=BITS)
    assert [(r["task"], r["mean"]) for r in rows[:2]] == [("a", pytest.approx(1.0)), ("b", pytest.approx(2.0))]
    assert rows[2]["mean"] == pytest.approx(1.5) and rows[2]["low"] is None and rows[2]["n"] == 1
    assert [r["task"] for r in rows if r["method"] == "pair"] == ["a"]  # fewer texts: no average
