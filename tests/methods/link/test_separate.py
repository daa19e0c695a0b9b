from __future__ import annotations

import math

import pytest
import torch

from spolia.core.modulation import constellation
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.errors import SpoliaError
from spolia.methods.link import bounds
from spolia.methods.link.separate import LMCompressor, Separate, TextCompressor, separate
from spolia.methods.link.source import Source, source_code
from spolia.parts.causal_prior import CausalPrior
from spolia.parts.channel import Channel
from spolia.parts.ngram import NGram
from spolia.parts.prior import NGramPrior, UnigramPrior
from spolia.parts.textcode_tokens import ByteTokenizer
from spolia.zoo.tiny_lm import TinyLM

BPSK = constellation("bpsk")
COUNT, LENGTH = 32, 30


def uses(length: int) -> int:
    return 5 * length + 10


def text(frames: int, seed: int = 0) -> torch.Tensor:
    """Tokens of a skewed source: 2.6 bits each."""
    shares = torch.arange(COUNT).float().neg().div(3).exp()
    return torch.multinomial(
        shares, frames * LENGTH, replacement=True, generator=torch.Generator().manual_seed(seed)
    ).view(frames, LENGTH)


def prior_of(order: int = 2) -> NGramPrior:
    return NGramPrior(NGram.fit(text(300, 9), vocabulary=COUNT, order=order))


def test_a_text_comes_back_from_its_bits_for_any_prior():
    model = TinyLM(COUNT, 40, 16, 1, 2, generator=torch.Generator().manual_seed(0)).eval()
    sure = UnigramPrior(torch.tensor([50.0] + [0.0] * (COUNT - 1)))  # all but certain of token 0
    for prior in (prior_of(), CausalPrior(model, start=[0]), sure):
        compressor = LMCompressor(prior)
        for own in text(5):
            bits = compressor.compress(own.tolist(), [3, 4])
            assert compressor.expand([*bits, 0, 0, 0], LENGTH, [3, 4]) == own.tolist()
            ideal = float(bounds.source_bits(prior, own[None], [[3, 4]]))
            if prior is not sure:  # whose smallest chances the table of 2^24 rounds up
                assert len(bits) <= ideal + 3  # from below it has no bound: zeros at the end are not written


@pytest.mark.slow
def test_without_noise_every_text_that_fits_arrives_and_passes():
    prior, tokens = prior_of(), text(25)
    link = separate(LMCompressor(prior), BPSK, uses)
    symbols = link.send(tokens)
    assert symbols.shape == (25, uses(LENGTH))
    found = link.receive(Channel().transmit(symbols, 1e-6, generator(0, "noise")), LENGTH)
    lengths = torch.tensor([len(LMCompressor(prior).compress(own.tolist())) for own in tokens])
    fits = lengths + 16 <= 0.9 * (uses(LENGTH) - 16) - 12  # rate .95, six bits of tail, a step of five
    assert fits.float().mean() > 0.8
    assert (found.best == tokens).all(1)[fits].all() and found.passes[fits].all()


@pytest.mark.slow
def test_more_uses_and_more_energy_lose_fewer_frames_and_none_beats_the_bound():
    prior, tokens = prior_of(), text(60)
    lost = {}
    for name, room in (("near", uses), ("far", lambda length: 10 * length)):
        link = separate(LMCompressor(prior), BPSK, room)
        symbols = link.send(tokens)
        for db in (0.0, 3.0):
            found = link.receive(Channel().transmit(symbols, n0_of(db), generator(0, "noise")), LENGTH)
            lost[name, db] = 1 - float((found.best == tokens).all(1).float().mean())
            bits = bounds.source_bits(prior, tokens).tolist()
            least = bounds.separate_frame_error(BPSK, 10 ** (db / 10), room(LENGTH), bits)
            assert lost[name, db] > least - 4 * math.sqrt(0.25 / 60)  # 4 standard errors at most
    assert lost["near", 3.0] < lost["near", 0.0] and lost["far", 0.0] < lost["near", 0.0]


@pytest.mark.slow
def test_another_model_at_the_receiver_is_caught_by_the_check():
    """Trained on a little less: almost every text comes out wrong, and none of those passes."""
    tokens, whole = text(20), text(300, 9)
    other = NGramPrior(NGram.fit(whole[:250], vocabulary=COUNT, order=2))
    link = separate(LMCompressor(prior_of()), BPSK, uses, receiver=LMCompressor(other))
    found = link.receive(Channel().transmit(link.send(tokens), 1e-6, generator(0, "noise")), LENGTH)
    wrong = (found.best != tokens).any(1)
    assert wrong.float().mean() > 0.5
    assert not (found.passes & wrong).any()  # each with 2^-16: once in a thousand such tests


def test_characters_by_a_source_code_and_denser_symbols():
    tokenizer, said = ByteTokenizer(), ["the quick brown fox jumps over", "a lazy dog, and then it sleeps"]
    tokens = torch.tensor([tokenizer.encode(s) for s in said])
    qam = constellation("16qam")
    for kind in ("utf8", "huffman"):
        source = source_code(Source(kind=kind), said)
        link = separate(TextCompressor(source, tokenizer), qam, lambda length: 5 * length)
        found = link.receive(Channel().transmit(link.send(tokens), 1e-6, generator(0, "noise")), 30)
        assert found.texts == said and found.passes.all()
        bad = link.receive(Channel().transmit(link.send(tokens), 10.0, generator(0, "noise")), 30)
        assert not bad.passes.any() and bad.texts != said


def test_contexts_reach_both_ends():
    prior, tokens = prior_of(), text(10)
    contexts = [[i] for i in range(10)]
    link = separate(LMCompressor(prior), BPSK, uses)
    received = Channel().transmit(link.send(tokens, contexts), 1e-6, generator(0, "noise"))
    right, without = link.receive(received, LENGTH, contexts), link.receive(received, LENGTH)
    assert right.passes.float().mean() > 0.8 > without.passes.float().mean()


def test_a_frame_too_short_for_a_header_is_refused():
    with pytest.raises(SpoliaError, match="a frame has 20 bits on the air"):
        separate(LMCompressor(prior_of()), BPSK, lambda length: 20).send(text(1))


def test_ldpc_of_5g():
    pytest.importorskip("sionna.phy")
    prior, tokens = prior_of(), text(20)
    link = separate(LMCompressor(prior), BPSK, lambda length: 7 * length, Separate(code="ldpc"))
    found = link.receive(Channel().transmit(link.send(tokens), n0_of(4.0), generator(0, "noise")), LENGTH)
    assert (found.best == tokens).all(1).float().mean() > 0.8
