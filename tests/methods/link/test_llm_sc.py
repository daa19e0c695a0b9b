from __future__ import annotations

import itertools
import math

import pytest
import torch

from spolia.core import trellis
from spolia.core.modulation import constellation
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.data.prose import prose
from spolia.errors import SpoliaError
from spolia.methods.link import bounds
from spolia.methods.link.beam import Width, beam, greedy
from spolia.methods.link.confidence import Calibration, calibrate, calibration_error
from spolia.methods.link.llm_sc import LLMSC, llm_sc
from spolia.parts.causal_prior import CausalPrior
from spolia.parts.channel import Channel
from spolia.parts.ngram import NGram
from spolia.parts.prior import NGramPrior, UniformPrior, UnigramPrior
from spolia.parts.textcode import TextCode
from spolia.parts.textcode_labels import Labels, index_labels, permuted_labels
from spolia.zoo.tiny_lm import TinyLM

BPSK = constellation("bpsk")


class Letters:
    """A tokenizer of V letters."""

    def __init__(self, size: int):
        self.size, self.fingerprint = size, f"letters {size}"

    def encode(self, text: str) -> list[int]:
        return [ord(c) - 0x4E00 for c in text]

    def decode(self, tokens) -> str:
        return "".join(chr(0x4E00 + int(t)) for t in tokens)


class Table:
    """A random n-gram of order 3 over V tokens, ln P [(V + 1)^2, V], sharp enough to matter."""

    order = 3

    def __init__(self, count: int, seed: int, order: int = 3):
        self.vocab_size, self.order = count, order
        rng = torch.Generator().manual_seed(seed)
        self.table = (torch.randn((count + 1) ** (order - 1), count, generator=rng) * 1.5).log_softmax(1)

    def log_probs(self, history: torch.Tensor) -> torch.Tensor:
        number = torch.zeros(history.shape[:-1], dtype=torch.long)
        for i in range(self.order - 1):
            number = number * (self.vocab_size + 1) + history[..., i]
        return self.table[number]


def code_of(count: int, check_bits: int = 0, **more) -> TextCode:
    return TextCode(Letters(count), index_labels(count), check_bits=check_bits, **more)


def drawn(count: int, frames: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, count, (frames, length), generator=torch.Generator().manual_seed(seed))


def heard_of(scores: torch.Tensor):
    return lambda t: scores[:, t]


def written(table: Table, frames: int, length: int, seed: int = 2) -> torch.Tensor:
    """Text drawn from a bigram."""
    tokens, rng = torch.full((frames, 1), table.vocab_size), torch.Generator().manual_seed(seed)
    for _ in range(length):
        p = table.log_probs(tokens[:, -1:]).exp()
        tokens = torch.cat([tokens, torch.multinomial(p, 1, generator=rng)], dim=1)
    return tokens[:, 1:]


# --- oracles ---------------------------------------------------------------------------------------------------------


def test_a_wide_beam_is_the_best_of_all_texts():
    """4 tokens, 5 places, B = 4^4: all 1024 texts. A beam of one fails for some draws."""
    length, failed = 5, 0
    for seed in range(20):
        prior = NGramPrior(Table(4, seed))
        scores = torch.randn(1, length, 4, generator=torch.Generator().manual_seed(seed + 100)) * 1.5
        every = torch.tensor(list(itertools.product(range(4), repeat=length)))
        p = prior.log_probs(every, [()] * len(every)).gather(2, every[:, :, None]).squeeze(2).sum(1)
        total = p + scores[0].gather(1, every.T).sum(0)
        order = total.argsort(descending=True)
        found = beam(heard_of(scores), length, prior, [()], 1.0, Width(256))
        assert torch.equal(found.tokens[0, 0], every[order[0]])
        # fp32 sums of ten numbers of size 3
        torch.testing.assert_close(found.scores[0], total[order[:256]], rtol=0, atol=1e-5)
        one = beam(heard_of(scores), length, prior, [()], 1.0, Width(1))
        assert float(one.scores[0, 0]) <= float(total.max()) + 1e-5
        failed += not torch.equal(one.tokens[0, 0], found.tokens[0, 0])
    assert failed > 0


def test_a_uniform_prior_or_no_weight_decides_each_token_by_likelihood():
    code, tokens = code_of(16), drawn(16, 20, 6)
    for prior, weight in ((UniformPrior(16), 1.0), (NGramPrior(Table(16, 1)), 0.0)):
        link = llm_sc(prior, code, BPSK, LLMSC(beam=3, lm_weight=weight))
        received = Channel().transmit(link.send(tokens), n0_of(0.0), generator(0, "noise"))
        nearest = code.labels.scores(received.llrs(BPSK).float().unflatten(1, (6, 4))).argmax(-1)
        assert torch.equal(link.receive(received, 6).best, nearest)


def test_token_error_without_a_prior_is_the_closed_form():
    code, tokens = code_of(16), drawn(16, 4000, 5)
    link = llm_sc(UniformPrior(16), code, BPSK, LLMSC(beam=1, rows=4000))
    esn0 = 10**0.2
    received = Channel().transmit(link.send(tokens), 1 / esn0, generator(0, "noise"))
    wrong = float((link.receive(received, 5).best != tokens).float().mean())
    expected = bounds.token_error(bounds.q(math.sqrt(2 * esn0)), 4)
    assert abs(wrong - expected) < 4 * math.sqrt(expected / tokens.numel())  # 4 standard errors


def test_two_tokens_are_confused_as_often_as_the_formula_says():
    """Labels 3 bits apart, P(u) = 0.9: u sent and v preferred, and the other way round."""
    labels = Labels(torch.tensor([0b000, 0b111]), 3)
    code = TextCode(Letters(2), labels, check_bits=0)
    prior = UnigramPrior(torch.tensor([0.9, 0.1]).log())
    link = llm_sc(prior, code, BPSK, LLMSC(beam=1, rows=20000))
    for sent, log_ratio in ((0, math.log(9)), (1, -math.log(9))):
        tokens = torch.full((20000, 1), sent)
        received = Channel().transmit(link.send(tokens), 2.0, generator(sent, "noise"))
        wrong = float((link.receive(received, 1).best != tokens).float().mean())
        expected = bounds.pairwise_error(3, log_ratio, 0.5)
        assert abs(wrong - expected) < 4 * math.sqrt(expected * (1 - expected) / 20000)  # 4 standard errors


def test_a_binary_source_is_decided_by_its_posterior():
    code = TextCode(Letters(2), index_labels(2), check_bits=0)
    link = llm_sc(UnigramPrior(torch.tensor([0.8, 0.2]).log()), code, BPSK, LLMSC(beam=1, rows=2000))
    tokens = (torch.rand(2000, 20, generator=torch.Generator().manual_seed(0)) < 0.2).long()
    received = Channel().transmit(link.send(tokens), n0_of(2.0), generator(0, "noise"))
    wrong = float((link.receive(received, 20).best != tokens).float().mean())
    expected = bounds.binary_map_error(0.8, 10**0.2)
    # 4 standard errors, those of the share of ones that were drawn included: the error is .02 or .06 by bit
    assert abs(wrong - expected) < 4 * math.sqrt(expected / tokens.numel())


def test_no_beam_beats_viterbi_and_a_wide_one_reaches_it():
    count, length, frames = 24, 12, 80
    ngram = Table(count, 3, order=2)
    prior, code, tokens = NGramPrior(ngram), code_of(count), written(ngram, frames, length)
    send = llm_sc(prior, code, BPSK)
    received = Channel().transmit(send.send(tokens), n0_of(1.0), generator(0, "noise"))
    exact = llm_sc(prior, code, BPSK, LLMSC(search="viterbi")).receive(received, length)
    reached = {}
    for width in (1, 4, 64):
        found = llm_sc(prior, code, BPSK, LLMSC(beam=width)).receive(received, length)
        assert (found.scores[:, 0] <= exact.scores[:, 0] + 1e-3).all()  # fp32 sums of size 100
        reached[width] = float((found.best == exact.best).all(1).float().mean())
    assert reached[1] < reached[4] <= reached[64] and reached[64] >= 0.95  # 64 of 24 tokens: hardly ever short


def test_nothing_heard_is_the_prior_alone_and_clear_hearing_the_text():
    prior, code, tokens = NGramPrior(Table(16, 5)), code_of(16), drawn(16, 8, 6)
    link = llm_sc(prior, code, BPSK, LLMSC(beam=4))
    symbols = link.send(tokens)
    clear = Channel().transmit(symbols, 1e-4, generator(0, "noise"))
    assert torch.equal(link.receive(clear, 6).best, tokens)  # the table is nowhere zero
    silent = [link.receive(Channel(erasure=1.0).transmit(symbols, 1.0, generator(s, "noise")), 6) for s in (0, 1)]
    assert torch.equal(silent[0].tokens, silent[1].tokens)
    alone = beam(lambda t: torch.zeros(1, 16), 6, prior, [()], 1.0, Width(4))
    assert torch.equal(silent[0].best[0], alone.tokens[0, 0])


# --- the search ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("loud", [0.3, 3.0, 30.0])
def test_pruning_changes_nothing(loud):
    """Whether the tokens nearest to what was heard are enough (loud) or not, the candidates are those of the whole."""
    count, frames = 300, 6
    prior = NGramPrior(Table(count, 2, order=2))
    scores = torch.randn(frames, 5, count, generator=torch.Generator().manual_seed(4)) * loud
    every = beam(heard_of(scores), 5, prior, [()] * frames, 1.0, Width(8, near=count))
    cut = beam(heard_of(scores), 5, prior, [()] * frames, 1.0, Width(8, near=12))
    assert torch.equal(every.tokens, cut.tokens) and torch.equal(every.scores, cut.scores)


def test_a_batch_is_read_as_each_frame_alone():
    count, length = 20, 6
    model = TinyLM(count, 32, 16, 2, 2, generator=torch.Generator().manual_seed(0)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8)
    prior, code = CausalPrior(model, start=[0]), code_of(count, 8)
    tokens, contexts = drawn(count, 5, length), [[], [3], [1, 2, 3, 4], [9, 9], [7]]
    for settings in (LLMSC(beam=4), LLMSC(beam=4, threshold=2.0), LLMSC(beam=4, rows=8)):
        link = llm_sc(prior, code, BPSK, settings)
        received = Channel().transmit(link.send(tokens), n0_of(0.0), generator(0, "noise"))
        together = link.receive(received, length, contexts)
        for i in range(5):
            one = Channel().transmit(link.send(tokens), n0_of(0.0), generator(0, "noise"))
            own = type(one)(one.y[i : i + 1], one.n0)
            alone = link.receive(own, length, contexts[i : i + 1])
            assert torch.equal(alone.best[0], together.best[i])
            # fp32 logits of size 10, summed over six places, in another order of rows
            torch.testing.assert_close(alone.scores[0, 0], together.scores[i, 0], rtol=0, atol=1e-3)


def test_the_threshold_saves_rows_and_keeps_the_best():
    prior, code, tokens = NGramPrior(Table(16, 5)), code_of(16), drawn(16, 30, 8)
    wide = llm_sc(prior, code, BPSK, LLMSC(beam=16))
    cut = llm_sc(prior, code, BPSK, LLMSC(beam=16, threshold=15.0))
    received = Channel().transmit(wide.send(tokens), n0_of(6.0), generator(0, "noise"))
    a, b = wide.receive(received, 8), cut.receive(received, 8)
    assert torch.equal(a.best, b.best)  # 15 nats behind at 6 dB is not made good
    assert b.cost["rows read a token"] < 0.7 * a.cost["rows read a token"]
    lost = b.scores == -math.inf
    assert lost.any() and torch.equal(b.tokens[lost], b.tokens[:, :1].expand_as(b.tokens)[lost])


def test_greedy_by_drafts_is_the_sequential_choice():
    count, length, frames = 30, 10, 40
    prior = NGramPrior(Table(count, 7))
    for loud in (0.5, 2.0, 6.0):
        scores = torch.randn(frames, length, count, generator=torch.Generator().manual_seed(1)) * loud
        one = beam(heard_of(scores), length, prior, [()] * frames, 1.0, Width(1))
        draft = greedy(heard_of(scores), length, prior, [()] * frames, 1.0)
        assert torch.equal(draft.tokens, one.tokens) and 1 <= draft.calls <= length
        torch.testing.assert_close(draft.scores, one.scores, rtol=0, atol=1e-4)  # another order of ten sums


def test_whole_symbols_and_bits_agree_where_bits_of_a_symbol_are_apart():
    """QPSK: exactly; of 16-QAM the symbol metric is -|y - x|^2 / N0 summed, here for all 32 tokens by hand."""
    count, tokens = 32, drawn(32, 10, 4)
    prior, qpsk, qam = NGramPrior(Table(count, 9, order=2)), constellation("qpsk"), constellation("16qam")
    code = code_of(count, align=2)
    links = [llm_sc(prior, code, qpsk, LLMSC(beam=8, metric=metric)) for metric in ("bit", "symbol")]
    received = Channel().transmit(links[0].send(tokens), n0_of(3.0), generator(0, "noise"))
    bit, symbol = (link.receive(received, 4) for link in links)
    assert torch.equal(bit.tokens, symbol.tokens)
    code = code_of(count, align=4)
    link = llm_sc(UniformPrior(count), code, qam, LLMSC(beam=1, metric="symbol"))
    received = Channel().transmit(link.send(tokens), n0_of(6.0), generator(0, "noise"))
    each = link.send(torch.arange(count)[:, None])  # [V, 2]: a token takes two symbols
    y = received.y.unflatten(1, (4, 2))
    distance = (y[:, :, None] - each).abs().square().sum(-1)
    assert torch.equal(link.receive(received, 4).best, distance.argmin(-1))


def test_other_numbers_for_tokens_read_the_same_text():
    """Tokens renumbered, the prior's columns and the labels with them."""
    count = 16
    new = torch.randperm(count, generator=torch.Generator().manual_seed(0))  # old number to new
    table = Table(count, 2, order=2)
    moved = Table(count, 2, order=2)
    rows = torch.cat([new, torch.tensor([count])])
    moved.table = torch.empty_like(table.table)
    moved.table[rows[:, None], new] = table.table
    labels = index_labels(count)
    codes = torch.empty_like(labels.codes)
    codes[new] = labels.codes
    tokens = drawn(count, 20, 6)
    one = llm_sc(NGramPrior(table), code_of(count), BPSK, LLMSC(beam=4))
    other = llm_sc(
        NGramPrior(moved), TextCode(Letters(count), Labels(codes, labels.width), check_bits=0), BPSK, LLMSC(beam=4)
    )
    received = Channel().transmit(one.send(tokens), n0_of(0.0), generator(0, "noise"))
    assert torch.equal(one.send(tokens), other.send(new[tokens]))
    assert torch.equal(new[one.receive(received, 6).best], other.receive(received, 6).best)


# --- check bits, posterior, confidence -------------------------------------------------------------------------------


def test_check_bits_weigh_the_list():
    count, length = 16, 6
    prior, tokens = NGramPrior(Table(count, 4)), drawn(count, 200, length)
    code = code_of(count, 8)
    link = llm_sc(prior, code, BPSK, LLMSC(beam=16))
    received = Channel().transmit(link.send(tokens), n0_of(1.0), generator(0, "noise"))
    found = link.receive(received, length)
    heard = code.heard(received.llrs(BPSK).float(), length)
    plain = beam(heard_of(code.labels.scores(heard.labels)), length, prior, [()] * 200, 1.0, Width(16))
    weighed = plain.scores + code.check_scores(plain.tokens, heard.checks)
    torch.testing.assert_close(found.scores[:, 0], weighed.max(1).values)
    inside = (found.tokens == tokens[:, None]).all(2).any(1)
    exact, before = (found.best == tokens).all(1), (plain.tokens[:, 0] == tokens).all(1)
    assert not (exact & ~inside).any() and exact.sum() > before.sum()
    assert (
        found.passes is not None and not (found.passes & ~exact).float().mean() > 16 * 2**-8 + 0.05
    )  # B 2^-c, and chance
    none = llm_sc(prior, code_of(count), BPSK).receive(received, length)
    assert none.passes is None


def test_posterior_is_exact_where_the_list_holds_everything():
    """Of all 64 texts, and with check bits, whose likelihood enters."""
    prior, code = NGramPrior(Table(4, 1)), code_of(4, 6)
    link = llm_sc(prior, code, BPSK, LLMSC(beam=64))
    tokens = drawn(4, 5, 3)
    received = Channel().transmit(link.send(tokens), 1.0, generator(0, "noise"))
    found = link.receive(received, 3)
    torch.testing.assert_close(found.log_posterior.exp().sum(1), torch.ones(5), rtol=0, atol=1e-4)  # 1e-7 is set apart
    torch.testing.assert_close(found.log_posterior.log_softmax(1), found.scores.log_softmax(1))
    assert (found.token_confidence >= found.confidence[:, None] - 1e-6).all()


def test_confidence_is_near_the_share_that_is_right():
    """Text drawn from the prior itself; 600 frames of it, at three levels of noise."""
    count, length, frames = 16, 8, 600
    table = Table(count, 6, order=2)
    tokens = written(table, frames, length)
    link = llm_sc(NGramPrior(table), code_of(count, 8), BPSK, LLMSC(beam=8))
    for db in (-3.0, 0.0, 3.0):
        received = Channel().transmit(link.send(tokens), n0_of(db), generator(1, "noise"))
        found = link.receive(received, length)
        right = (found.best == tokens).all(1)
        gap = abs(float(found.confidence.mean()) - float(right.float().mean()))
        assert gap < 0.06 + 4 * 0.5 / math.sqrt(frames)  # what the search dropped is an estimate; 4 standard errors


def test_calibration_finds_the_curve_and_leaves_few_frames_alone():
    rng = torch.Generator().manual_seed(0)
    truth = torch.rand(20000, generator=rng).double()
    right = torch.rand(20000, generator=rng) < truth
    said = Calibration(2.0, 1.0)(truth)  # over-confident
    fitted = calibrate(said, right)
    # the inverse: logit(truth) = (logit(said) - 1) / 2; four standard errors of 20000 draws are some hundredths
    assert fitted.slope == pytest.approx(0.5, abs=0.04) and fitted.offset == pytest.approx(-0.5, abs=0.08)
    assert calibration_error(fitted(said), right) < calibration_error(said, right) / 3
    few = calibrate(torch.tensor([0.9, 0.95]), torch.tensor([True, True]))
    assert 0.5 < few.slope < 2 and abs(few.offset) < 1
    assert torch.allclose(Calibration()(truth), truth.clamp(1e-9, 1 - 1e-9))


def test_forward_backward_tokens_are_wrong_less_often_than_the_best_text():
    """By each token's own posterior the expected share of wrong tokens is the least there is."""
    count, length = 12, 6
    ngram = Table(count, 8, order=2)
    table = ngram.log_probs(trellis.histories(count, 1))
    for seed in range(10):
        scores = torch.randn(length, count, generator=torch.Generator().manual_seed(seed))
        posterior, _ = trellis.marginals(table, torch.tensor([count]), scores)
        best, _ = trellis.best_path(table, torch.tensor([count]), scores)
        by_text = posterior.gather(1, best[:, None]).exp().sum()
        assert float(posterior.max(1).values.exp().sum()) >= float(by_text) - 1e-5


def test_what_does_not_fit_is_refused():
    with pytest.raises(SpoliaError, match="the prior has 8 tokens, the text code 16"):
        llm_sc(UniformPrior(8), code_of(16), BPSK)
    with pytest.raises(SpoliaError, match="viterbi needs an n-gram prior"):
        llm_sc(UniformPrior(16), code_of(16), BPSK, LLMSC(search="viterbi"))
    with pytest.raises(SpoliaError, match="align"):
        llm_sc(UniformPrior(16), code_of(16), constellation("64qam"), LLMSC(metric="symbol"))
    link = llm_sc(UniformPrior(16), code_of(16), BPSK)
    received = Channel().transmit(link.send(drawn(16, 3, 2)), 1.0, generator(0))
    with pytest.raises(SpoliaError, match="2 contexts for 3 frames"):
        link.receive(received, 2, [[], []])


@pytest.mark.slow
def test_real_text_a_trigram_and_labels():
    """English prose, 512 byte pairs, 2 dB, two noises: what the published scheme gains, and what labels and checks add.

    Bounds are loose, as the text changes with the Python version; measured: ML .29, B = 1 .09, 8 .03, random labels .025.
    """
    from spolia.parts.textcode_tokens import train_bpe

    parts = prose(0)
    train, test = ("".join(parts.characters[i] for i in own.tolist()) for own in (parts.train, parts.test))
    bpe, length, frames = train_bpe([train], 512), 24, 100
    prior = NGramPrior(NGram.fit([bpe.encode(train)], vocabulary=512, order=3))
    own = torch.tensor(bpe.encode(test))
    places = torch.arange(1, frames + 1) * (len(own) // length - 1) // frames
    tokens = torch.stack([own[p * length : (p + 1) * length] for p in places])
    contexts = [own[max(0, p * length - 2) : p * length].tolist() for p in places.tolist()]

    def error(labels, width: int, prior=prior, check_bits: int = 0) -> tuple[float, float]:
        link = llm_sc(prior, TextCode(bpe, labels, check_bits=check_bits), BPSK, LLMSC(beam=width))
        wrong, exact = [], []
        for seed in (0, 1):
            received = Channel().transmit(link.send(tokens), n0_of(2.0), generator(seed, "noise"))
            found = link.receive(received, length, contexts).best
            wrong.append(float((found != tokens).float().mean()))
            exact.append(float((found == tokens).all(1).float().mean()))
        return sum(wrong) / 2, sum(exact) / 2

    index = index_labels(512)
    shuffled = [permuted_labels(512, generator(seed, "labels")) for seed in range(2)]
    likelihood, narrow, wide = error(index, 1, UniformPrior(512))[0], error(index, 1)[0], error(index, 8)[0]
    expected = bounds.token_error(bounds.q(math.sqrt(2 * 10**0.2)), 9)
    assert likelihood == pytest.approx(expected, abs=0.03)
    assert wide < likelihood / 4 and wide < 0.6 * narrow
    assert sum(error(labels, 8)[0] for labels in shuffled) / 2 < 0.95 * wide
    assert error(shuffled[0], 16, check_bits=8)[1] > error(shuffled[0], 16)[1] + 0.1
