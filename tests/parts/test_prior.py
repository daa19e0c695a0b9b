from __future__ import annotations

import math

import pytest
import torch

from spolia.errors import SpoliaError
from spolia.parts.causal_prior import CausalPrior
from spolia.parts.ngram import NGram
from spolia.parts.prior import NGramPrior, UniformPrior, UnigramPrior, fingerprint_of, log_likelihood
from spolia.zoo.tiny_lm import TinyLM

V = 30


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def tiny(context: int = 24) -> TinyLM:
    model = TinyLM(V, context, 16, 2, 2, generator=seeded()).eval()
    with torch.no_grad():  # far from even, so that an error shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return model


class Bare(torch.nn.Module):
    """The same model without a cache, as any module of ids to logits."""

    def __init__(self, inner: TinyLM):
        super().__init__()
        self.inner, self.vocabulary = inner, inner.vocabulary

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.inner(tokens)


def walk(prior, contexts, moves) -> list[torch.Tensor]:
    """Log-probabilities at the start and after every move (parents, tokens)."""
    reading = prior.start(contexts, len(moves) + 1)
    return [reading.log_probs, *(reading.step(torch.tensor(p), torch.tensor(t)) for p, t in moves)]


MOVES = [([0, 0, 1, 1, 1], [3, 4, 5, 6, 7]), ([4, 0, 0, 1, 4], [1, 2, 3, 4, 5]), ([0, 1, 2], [9, 9, 8])]
CONTEXTS = [[2, 5, 7], [11]]


def texts(contexts, moves) -> list[list[list[int]]]:
    """What every row has read, after each move."""
    rows = [list(c) for c in contexts]
    found = [rows]
    for parents, tokens in moves:
        rows = [[*rows[p], t] for p, t in zip(parents, tokens, strict=True)]
        found.append(rows)
    return found


def by_hand(model, begin, rows) -> torch.Tensor:
    return torch.stack([model(torch.tensor([begin + row]))[0, -1].log_softmax(-1) for row in rows])


@pytest.mark.parametrize("form", ["cache", "again"])
def test_a_reading_is_the_model_on_the_whole_text(form):
    """Rows split, vanish, and begin with contexts of unequal length."""
    model = tiny()
    prior = CausalPrior(model if form == "cache" else Bare(model).eval(), start=[0])
    with torch.no_grad():
        for seen, rows in zip(walk(prior, CONTEXTS, MOVES), texts(CONTEXTS, MOVES), strict=True):
            # the same sums in another order, at logits of size 10 in fp32
            torch.testing.assert_close(seen, by_hand(model, [0], rows), rtol=0, atol=1e-5)


def test_rows_that_stay_in_place_are_not_copied_and_more_rows_find_room():
    model = tiny()
    cache = model.cache(2, 6)
    model(torch.tensor([[1, 2], [3, 4]]), cache)
    held = cache._held.data_ptr()
    cache.select(torch.tensor([0, 1]))
    assert cache._held.data_ptr() == held
    cache.select(torch.tensor([1, 1, 0, 1, 0]))
    assert cache.rows == 5 and cache._held.data_ptr() != held
    with pytest.raises(SpoliaError, match="7 tokens, where room was made for 6"):
        cache.reserve(5)


def test_one_pass_over_known_tokens_is_the_reading_step_by_step():
    model = tiny()
    tokens = torch.randint(0, V, (2, 6), generator=seeded(3))
    for prior in (
        CausalPrior(model, start=[0]),
        NGramPrior(NGram.fit([torch.arange(V).repeat(2)], vocabulary=V, order=3)),
    ):
        reading, own = prior.start(CONTEXTS, 6), prior.log_probs(tokens, CONTEXTS)
        for t in range(6):
            torch.testing.assert_close(own[:, t], reading.log_probs, rtol=0, atol=1e-5)  # as above
            if t < 5:
                reading.step(torch.arange(2), tokens[:, t])
        total = own.gather(2, tokens[:, :, None]).squeeze(2)
        torch.testing.assert_close(log_likelihood(prior, tokens, CONTEXTS), total)


def test_tokens_of_their_own_numbers_take_the_rest_out_before_the_softmax():
    model, ids = tiny(), [4, 9, 2, 17]
    prior = CausalPrior(model, tokens=ids, start=[0])
    assert prior.vocabulary == 4
    with torch.no_grad():
        expected = model(torch.tensor([[0, 9, 17]]))[0, -1, ids].log_softmax(-1)
    reading = prior.start([[1]], 2)  # dense 1 is the model's 9
    found = reading.step(torch.tensor([0]), torch.tensor([3]))
    torch.testing.assert_close(found[0], expected, rtol=0, atol=1e-5)


def test_a_context_longer_than_the_model_takes_loses_its_oldest_tokens():
    model = tiny(context=8)
    prior = CausalPrior(model, start=[0])
    long = list(range(1, 20))
    # 8 positions: the start, 4 tokens of context, 3 of the 4 to come
    found = prior.start([long], 4).log_probs
    assert torch.equal(found, prior.start([long[-4:]], 4).log_probs)
    with pytest.raises(SpoliaError, match="9 tokens do not fit the model's 8 positions"):
        CausalPrior(model).start([[1]], 9)


def test_a_model_without_a_first_token_needs_a_context():
    prior = CausalPrior(tiny())
    assert prior.start([[3]], 2).log_probs.shape == (1, V)
    with pytest.raises(SpoliaError, match="no token to begin with"):
        prior.start([[]], 2)
    with pytest.raises(SpoliaError, match="training mode"):
        CausalPrior(tiny().train())


def test_without_memory_every_row_is_alike():
    assert torch.allclose(UniformPrior(8).start([[]] * 3, 4).log_probs, torch.full((3, 8), -math.log(8)))
    shares = torch.tensor([0.5, 0.25, 0.25, 0.0])
    reading = UnigramPrior(shares.log()).start([[1], [2]], 3)
    torch.testing.assert_close(reading.log_probs.exp(), shares.expand(2, 4))
    assert reading.step(torch.tensor([1, 1, 0]), torch.tensor([0, 1, 2])).shape == (3, 4)


def test_ngram_rows_are_the_models_and_worked_out_once():
    text = torch.randint(0, 6, (400,), generator=seeded(1))
    ngram = NGram.fit([text], vocabulary=6, order=3)
    asked = []

    class Counting:
        order, vocab_size = 3, 6

        def log_probs(self, history):
            asked.append(len(history))
            return ngram.log_probs(history)

    prior = NGramPrior(Counting())
    contexts = [[], [2], [1, 2], [5, 1, 2]]
    found = prior.start(contexts, 2).log_probs
    histories = torch.tensor([[6, 6], [6, 2], [1, 2], [1, 2]])  # 6: a text that has not begun
    assert torch.equal(found, ngram.log_probs(histories)) and sum(asked) == 3
    prior.start(contexts, 2)
    assert sum(asked) == 3


def test_fingerprints_tell_models_apart():
    one, same, other = (CausalPrior(tiny(), start=[s]) for s in (0, 0, 1))
    assert fingerprint_of(one) == same.fingerprint != other.fingerprint


# --- transformers ----------------------------------------------------------------------------------------------------


def theirs(kind: str) -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"intermediate_size": 24, "max_position_embeddings": 24, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "gpt2":
        config = transformers.GPT2Config(vocab_size=V, n_embd=16, n_layer=2, n_head=2, n_positions=24, bos_token_id=1)
        model = transformers.GPT2LMHeadModel(config)
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape, **more))
    else:
        config = transformers.Qwen2Config(**shape, **more, num_key_value_heads=1)
        model = transformers.Qwen2ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(10)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen2"])
def test_models_of_transformers_read_as_they_do_on_the_whole_text(kind):
    model = theirs(kind)
    prior = CausalPrior(model)
    assert prior.begin == [1] and prior.vocabulary == V and prior.positions == 24
    with torch.no_grad():
        for seen, rows in zip(walk(prior, CONTEXTS, MOVES), texts(CONTEXTS, MOVES), strict=True):
            expected = by_hand(lambda ids: model(ids).logits, [1], rows)
            torch.testing.assert_close(seen, expected, rtol=0, atol=1e-4)  # fp32, logits of size 10
    tokens = torch.randint(0, V, (2, 4), generator=seeded())
    reading = prior.start(CONTEXTS, 4)
    torch.testing.assert_close(prior.log_probs(tokens, CONTEXTS)[:, 0], reading.log_probs, rtol=0, atol=1e-4)
