"""Steps compiled by torch beside the same steps as they are."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch

import spolia.parts.compiled_prior as compiled_prior
from spolia.errors import SpoliaError
from spolia.methods.link.beam import Width, beam
from spolia.methods.link.separate import LMCompressor
from spolia.parts.causal_prior import CausalPrior
from spolia.zoo.tiny_lm import TinyLM

transformers = pytest.importorskip("transformers")
V = 40
compiler = pytest.mark.skipif(not shutil.which("g++"), reason="torch compiles with a C++ compiler")


def gpt2() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=V, n_embd=16, n_layer=1, n_head=2, n_positions=48, bos_token_id=0, eos_token_id=1
    )
    return sharp(transformers.GPT2LMHeadModel(config))


def mistral() -> torch.nn.Module:
    """Rotary positions, fewer keys than queries, and a window shorter than the text."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(
        vocab_size=V, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
        intermediate_size=32, max_position_embeddings=48, sliding_window=5, bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    return sharp(transformers.MistralForCausalLM(config))


def sharp(model: torch.nn.Module) -> torch.nn.Module:
    with torch.no_grad():  # far from even, so that an error shows
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.mul_(20)
    return model.eval()


@pytest.fixture(scope="module")
def priors() -> Iterator[tuple[CausalPrior, CausalPrior]]:
    """With compiled steps and without, of one model. Usual products of frozen weights: trying others takes minutes, and
    benchmarks/link.py compares those.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compiled_prior, "_TUNED", {"freezing": True})
        model = mistral()
        yield CausalPrior(model, compiled=True), CausalPrior(model)


@compiler
@pytest.mark.slow
def test_compiled_steps_are_the_steps(priors):
    """Contexts of two lengths, a window shorter than the text; rows split, vanish, and are filled up to 4."""
    contexts, counts = [(3, 4, 5), (7,), (9, 2), (1,)], (4, 4, 3, 4, 3, 3, 4, 4)
    draws = torch.Generator().manual_seed(1)
    ours, theirs = (prior.start(contexts, len(counts) + 1) for prior in priors)
    torch.testing.assert_close(ours.log_probs, theirs.log_probs, rtol=0, atol=1e-4)
    rows = len(contexts)
    for step, count in enumerate(counts):
        parents = torch.arange(4) if step == 0 else torch.randint(rows, (count,), generator=draws)
        tokens, rows = torch.randint(V, (count,), generator=draws), count
        # the same sums in another order, at logits of size 100 in fp32
        torch.testing.assert_close(ours.step(parents, tokens), theirs.step(parents, tokens), rtol=0, atol=1e-4)


@compiler
@pytest.mark.slow
def test_the_search_finds_the_same_texts_with_compiled_steps(priors):
    """From two rows to four, and to three, which are filled up."""
    heard = torch.randn(2, 9, V, generator=torch.Generator().manual_seed(2)) * 4
    for width in (Width(2), Width(2, threshold=6.0)):
        found = [beam(lambda t: heard[:, t], 9, prior, [(3, 4, 5), (7,)], 1.0, width) for prior in priors]
        assert torch.equal(found[0].tokens, found[1].tokens)
        torch.testing.assert_close(found[0].scores, found[1].scores, rtol=0, atol=1e-3)  # nine sums of 100 in fp32
        assert found[0].rows == found[1].rows  # filling is not counted


def test_a_model_without_their_cache_is_not_compiled():
    model = TinyLM(V, 24, 16, 1, 2, generator=torch.Generator().manual_seed(0)).eval()
    with pytest.raises(SpoliaError, match="TinyLM has no cache of transformers"):
        CausalPrior(model, compiled=True)


@pytest.mark.slow
def test_what_two_ends_must_reckon_alike_is_not_compiled(monkeypatch):
    prior = CausalPrior(gpt2(), compiled=True)
    monkeypatch.setattr(prior, "compiled", lambda *_: pytest.fail("an end asked for compiled steps"))
    coder, tokens = LMCompressor(prior), [5, 9, 30, 2]
    assert coder.expand(coder.compress(tokens), 4) == tokens
