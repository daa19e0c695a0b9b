"""Text codes: tokenizers, frames, check bits, soft scores against probabilities."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from spolia.core.crc import crc
from spolia.core.modulation import constellation, modulate
from spolia.core.seeds import generator
from spolia.errors import SpoliaError, SpoliaWarning
from spolia.parts.channel import Channel
from spolia.parts.textcode import TextCode, length_bits, read_length
from spolia.parts.textcode_labels import index_labels, permuted_labels
from spolia.parts.textcode_tokens import Bpe, ByteTokenizer, HfTokenizer, train_bpe

TEXTS = ["the stones of an old wall hold up the new one", "an old stone holds the wall", "0 1 2 3 4 5"] * 5


class Numbers:
    """Words that are numbers: a vocabulary of any size."""

    def __init__(self, size: int):
        self.size, self.fingerprint = size, f"numbers {size}"

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, tokens) -> str:
        return " ".join(map(str, tokens))


def tokens_of(code: TextCode, *shape: int) -> torch.Tensor:
    return torch.from_numpy(generator(0, *shape).integers(0, code.tokenizer.size, shape))


# --- tokenizers


@settings(max_examples=25, deadline=None)
@given(st.text(max_size=30))
def test_bytes_and_pairs_hold_every_text(text: str) -> None:
    for tokenizer in (ByteTokenizer(), BPE):
        found = tokenizer.encode(text)
        assert tokenizer.decode(found) == text
        assert all(0 <= token < tokenizer.size for token in found)


BPE = train_bpe(TEXTS, 280)


def test_pairs_have_the_size_asked_for_and_come_back_from_json() -> None:
    assert BPE.size == 280
    assert 280 < train_bpe(TEXTS, 1000).size < 1000  # no pairs are left
    assert len(BPE.encode(TEXTS[0])) < len(TEXTS[0]) / 2
    again = Bpe(BPE.to_json())
    assert again.fingerprint == BPE.fingerprint == train_bpe(TEXTS, 280).fingerprint
    assert again.encode(TEXTS[0]) == BPE.encode(TEXTS[0])
    assert train_bpe(TEXTS, 256).size == 256
    with pytest.raises(SpoliaError, match="256 or more"):
        train_bpe(TEXTS, 255)


@pytest.mark.slow  # it imports transformers
def test_a_tokenizer_of_transformers_loses_its_specials() -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<s>", "</s>"]
    bpe.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(vocab_size=290, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    tokenizer = HfTokenizer(PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>"))
    assert tokenizer.size == 288
    assert tokenizer.model_ids == list(range(2, 290))
    found = tokenizer.encode(TEXTS[0])
    assert [tokenizer.model_ids[token] for token in found] == bpe.encode(TEXTS[0]).ids
    assert tokenizer.decode(found) == TEXTS[0]
    with pytest.raises(SpoliaError, match="special token"):
        tokenizer.encode("a</s>b")


def test_a_text_that_is_lost_is_told() -> None:
    code = TextCode(Numbers(16), index_labels(16))
    assert code.lossless("1 2 3")
    assert not code.lossless("1  2")
    with pytest.warns(SpoliaWarning, match="another text"):
        assert code.tokens("1  2").tolist() == [1, 2]
    assert code.text(code.tokens("3 2")) == "3 2"


# --- frames

FRAMES = [
    {},
    {"check_bits": 0},
    {"check_bits": 16, "interleave": 3},
    {"repeats": (1, 2, 1, 1, 3, 1, 1)},
    {"repeats": (2,) * 7, "interleave": 1},
    {"align": 4},
    {"align": 6, "check_bits": 11},
]


@pytest.mark.parametrize("kind", FRAMES)
def test_a_clear_frame_is_read(kind: dict) -> None:
    code = TextCode(Numbers(100), permuted_labels(100, generator(0)), **kind)
    tokens = tokens_of(code, 2, 3, 9)
    bits = code.bits(tokens)
    assert bits.shape == (2, 3, code.sent(9))
    llrs = 1 - 2 * bits.float()
    heard = code.heard(torch.nn.functional.pad(llrs, (0, 3)), 9)  # what filled the last symbol is left out
    assert torch.equal(code.labels.scores(heard.labels).argmax(-1), tokens)
    assert heard.checks.shape == (2, 3, code.check_bits)
    assert code.passes(tokens, heard.checks).all()
    assert code.text(tokens[0, 0]) == " ".join(map(str, tokens[0, 0].tolist()))


def test_bits_by_hand() -> None:
    """V = 3: labels 0, 1, 2 of two bits; 6 check bits of all four."""
    code = TextCode(Numbers(3), index_labels(3), check_bits=6)
    plain = torch.tensor([1, 0, 0, 1], dtype=torch.uint8)
    assert code.bits(torch.tensor([2, 1])).tolist() == [*plain.tolist(), *crc(plain, 6).tolist()]
    twice = TextCode(Numbers(3), index_labels(3), check_bits=0, repeats=(2, 1))
    assert twice.bits(torch.tensor([2, 1])).tolist() == [1, 1, 0, 0, 0, 1]
    filled = TextCode(Numbers(3), index_labels(3), check_bits=0, align=4)
    assert filled.bits(torch.tensor([2, 1])).tolist() == [1, 0, 0, 0, 0, 1, 0, 0]


def test_copies_add_up_and_order_is_undone() -> None:
    code = TextCode(Numbers(4), index_labels(4), check_bits=6, repeats=(1, 3), interleave=7)
    plain = TextCode(Numbers(4), index_labels(4), check_bits=6, repeats=(1, 3))
    sent, order = plain.sent(5), code.bits(torch.tensor([0, 1, 2, 3, 0]))
    assert not torch.equal(order, plain.bits(torch.tensor([0, 1, 2, 3, 0])))
    assert torch.equal(order.sort().values, plain.bits(torch.tensor([0, 1, 2, 3, 0])).sort().values)
    heard = plain.heard(torch.arange(float(sent)), 5)
    assert heard.labels.tolist() == [[4 * t, 3 * (4 * t + 2)] for t in range(5)]
    assert heard.checks.tolist() == list(range(20, 26))


def test_check_scores_rank_hypotheses_as_the_density_does() -> None:
    code = TextCode(Numbers(16), permuted_labels(16, generator(0)), check_bits=8)
    c, tokens = constellation("bpsk", torch.complex128), tokens_of(code, 5, 6)
    received = Channel().transmit(modulate(code.bits(tokens), c), 1.0, generator(1))
    heard = code.heard(received.llrs(c), 6)
    hypotheses = tokens_of(code, 5, 7, 6)
    found = code.labels.scores(heard.labels)  # [5, T, V]
    labels = found.unsqueeze(1).expand(-1, 7, -1, -1).gather(-1, hypotheses.unsqueeze(-1)).squeeze(-1).sum(-1)
    total = labels + code.check_scores(hypotheses, heard.checks)
    sent = modulate(code.bits(hypotheses), c)
    apart = total + (received.y[:, None] - sent).abs().square().sum(-1) / 1.0
    assert (apart - apart[:, :1]).abs().max() < 1e-9
    none = TextCode(Numbers(16), index_labels(16), check_bits=0)
    assert not none.check_scores(hypotheses, heard.checks[..., :0]).any()
    assert none.passes(hypotheses, heard.checks[:, None, :0]).all()


def test_wrong_hypotheses_pass_rarely() -> None:
    """8 bits, 4000 random hypotheses: 2^-8 of them, within 5 binomial deviations."""
    code = TextCode(Numbers(256), permuted_labels(256, generator(0)), check_bits=8)
    checks = 1 - 2 * code.bits(tokens_of(code, 10))[-8:].float()
    passed = code.passes(tokens_of(code, 4000, 10), checks)
    assert abs(float(passed.float().mean()) - 2**-8) <= 5 * math.sqrt(2**-8 / 4000)


@pytest.mark.parametrize("name", ["bpsk", "qpsk", "16qam", "64qam"])
def test_symbol_scores_are_exact(name: str) -> None:
    """Against the density of every token's symbols, also where the bits of a symbol depend on each other."""
    c = constellation(name, torch.complex128)
    code = TextCode(Numbers(50), permuted_labels(50, generator(0)), check_bits=6, align=c.bits)
    tokens = tokens_of(code, 4, 3)
    received = Channel("rayleigh").transmit(modulate(code.bits(tokens), c), 0.2, generator(1))
    per = code.symbol_table(c).shape[1]
    scores = received.log_likelihoods(c)[:, : 3 * per].unflatten(1, (3, per))
    found = code.symbol_scores(scores, c)
    sent = c.points[code.symbol_table(c)]  # [V, s]
    y, gain = (part[:, : 3 * per].reshape(4, 3, 1, per) for part in (received.y, received.gain))
    expected = -((y - gain * sent).abs().square() / 0.2).sum(-1)
    torch.testing.assert_close(found, expected)
    if c.bits <= 2:
        apart = found - code.labels.scores(code.heard(received.llrs(c), 3).labels)
        assert (apart - apart[..., :1]).abs().max() < 1e-9


def test_headers_are_read_through_noise() -> None:
    for count in (0, 1, 24, 1023):
        llrs = 1 - 2 * length_bits(count).float()
        llrs[::7] *= -0.9  # 8 of 50, no bit more than twice of five times
        assert int(read_length(llrs)) == count
    with pytest.raises(SpoliaError, match="1023"):
        length_bits(1024)


def test_both_ends_must_agree() -> None:
    def code(**changed) -> TextCode:
        size, seed = changed.pop("size", 100), changed.pop("seed", 0)
        return TextCode(Numbers(size), permuted_labels(size, generator(seed)), **changed)

    own = code()
    own.check(code().config)
    assert code().fingerprint == own.fingerprint
    changes = [{"size": 99}, {"seed": 1}, {"check_bits": 6}, {"interleave": 0}, {"align": 2}, {"repeats": (1,) * 7}]
    for changed in changes:
        assert code(**changed).fingerprint != own.fingerprint
        with pytest.raises(SpoliaError, match="make both ends from one"):
            own.check(code(**changed).config)


def test_mistakes_are_told_together() -> None:
    with pytest.raises(SpoliaError) as caught:
        TextCode(Numbers(5), index_labels(4), check_bits=7, repeats=(1, 0), align=0)
    assert len(caught.value.problems) == 4
    with pytest.raises(SpoliaError, match="neither repeated nor interleaved"):
        TextCode(Numbers(4), index_labels(4), align=2, interleave=0)
    code = TextCode(Numbers(4), index_labels(4))
    with pytest.raises(SpoliaError, match="26 bits"):
        code.heard(torch.zeros(20), 9)
    with pytest.raises(SpoliaError, match="align=2"):
        code.symbol_table(constellation("qpsk"))


def test_inputs_stay_as_they_were() -> None:
    code = TextCode(Numbers(4), index_labels(4), repeats=(1, 2), interleave=0)
    tokens, llrs = torch.tensor([1, 2, 3]), torch.from_numpy(np.arange(17.0))
    kept = tokens.clone(), llrs.clone()
    code.bits(tokens)
    code.heard(llrs, 3)
    assert torch.equal(tokens, kept[0])
    assert torch.equal(llrs, kept[1])
