from __future__ import annotations

import math

import pytest
import torch

from spolia.bench import link as bench
from spolia.bench.link import (
    BIT,
    CHARACTER,
    EXACT,
    FRAME,
    READS,
    SYMBOL,
    TOKEN,
    UNDETECTED,
    Batch,
    Point,
    Yardstick,
    edits,
    ratio,
    sweep,
)
from spolia.core.journal import Interrupted, Journal
from spolia.core.modulation import bit_error_rate, constellation
from spolia.core.seeds import generator
from spolia.errors import SpoliaError
from spolia.methods.link import bounds
from spolia.methods.link.llm_sc import LLMSC, llm_sc
from spolia.methods.link.separate import TextCompressor, separate
from spolia.methods.link.source import Source, source_code
from spolia.parts.channel import Channel
from spolia.parts.prior import UniformPrior
from spolia.parts.textcode import TextCode
from spolia.parts.textcode_labels import index_labels
from spolia.parts.textcode_tokens import ByteTokenizer

CODE = TextCode(ByteTokenizer(), index_labels(256), check_bits=8)
QPSK = constellation("qpsk")


def links(**more):
    return {"ml": llm_sc(UniformPrior(256), CODE, QPSK, LLMSC(beam=1))} | more


def draw(number: int) -> Batch:
    """Ten frames of eight small letters."""
    letters = generator(1, "text", number).integers(97, 123, (10, 8))
    return Batch(torch.from_numpy(letters))


def by(**more) -> Yardstick:
    return Yardstick(Channel(), CODE, bits_per_symbol=2, **more)


@pytest.mark.slow
def test_error_rates_are_the_closed_forms():
    """Hard decisions of QPSK at 4 dB: 1600 frames' worth of bits."""
    (point,) = sweep(links(), draw, [4.0], by(keep_texts=False), errors=10**6, batches=100)
    p = bit_error_rate("qpsk", 10**0.4)
    expected = {
        BIT: (p, 64000), SYMBOL: (1 - (1 - p) ** 2, 32000), TOKEN: (bounds.token_error(p, 8), 8000),
        FRAME: (bounds.token_error(p, 64), 1000),
    }  # fmt: skip
    for metric, (rate, count) in expected.items():
        found = point.measure(metric)
        assert abs(found.mean - rate) < 4 * math.sqrt(rate * (1 - rate) / count), metric  # 4 standard errors
        assert found.low < found.mean < found.high
    assert point.frames == 1000


def test_a_point_ends_at_enough_errors_and_the_rest_go_on():
    seen = []
    points = sweep(
        links(), draw, [-5.0, 9.0], by(), errors=15, batches=6, told=lambda p: seen.append([x.frames for x in p])
    )
    noisy, clear = points
    assert noisy.wrong >= 15 and noisy.frames == 20  # every frame is wrong at -5 dB: two batches
    assert clear.frames == 60 and seen[-1] == [20, 60]


def test_exact_frames_are_the_others_and_reads_are_counted():
    one, wide = (
        sweep({"x": llm_sc(UniformPrior(256), CODE, QPSK, LLMSC(beam=b))}, draw, [6.0], by(), batches=1)[0]
        for b in (1, 3)
    )
    exact, wrong = one.measure(EXACT), one.measure(FRAME)
    assert exact.mean == pytest.approx(1 - wrong.mean) and exact.low == pytest.approx(1 - wrong.high)
    assert one.metrics[:2] == [EXACT, FRAME]
    # a frame begins with one hypothesis; three live at the other seven places
    assert one.measure(READS).mean == pytest.approx(1) and wide.measure(READS).mean == pytest.approx(22 / 8)


def test_systems_meet_the_same_noise_and_text():
    again = llm_sc(UniformPrior(256), CODE, QPSK, LLMSC(beam=1, rows=3))  # the same, in other groups
    one, other = sweep(links(again=again), draw, [3.0], by(), errors=10**6, batches=3)
    assert one.counts[TOKEN] == other.counts[TOKEN] and one.counts["text"] == other.counts["text"]
    assert one.counts["sent"] == [CODE.text(row) for number in range(3) for row in draw(number).tokens]


def test_resumed_counts_are_those_of_a_sweep_that_was_left_alone(tmp_path):
    whole = sweep(links(), draw, [0.0, 6.0], by(), errors=25, batches=5)

    def stop(label: str, done: int, total: int, numbers) -> None:
        if done == 2:
            journal.request_stop()

    journal, kept = Journal(tmp_path, progress=stop), []
    with pytest.raises(Interrupted):
        sweep(links(), draw, [0.0, 6.0], by(), errors=25, batches=5, journal=journal, told=kept.append)
    assert [p.frames for p in kept[-1]] == [20, 20]
    resumed = sweep(links(), draw, [0.0, 6.0], by(), errors=25, batches=5, journal=Journal(tmp_path))
    assert [p.counts for p in resumed] == [p.counts for p in whole]


def test_receivers_of_characters_are_judged_by_text():
    source = source_code(Source(kind="utf8"))
    text = separate(TextCompressor(source, CODE.tokenizer), QPSK, lambda length: 12 * length)
    clear, noisy = sweep({"utf8": text}, draw, [12.0, -8.0], by(), errors=100, batches=2)
    assert clear.measure(FRAME).mean == 0 and clear.measure(CHARACTER).mean == 0
    assert noisy.measure(FRAME).mean == 1 and noisy.measure(CHARACTER).mean > 0.3
    assert TOKEN not in clear.metrics and UNDETECTED in clear.metrics
    with pytest.raises(SpoliaError, match="`token error` was not measured"):
        clear.measure(TOKEN)


@pytest.mark.parametrize(
    ("a", "b", "distance"), [("", "abc", 3), ("kitten", "sitting", 3), ("ab", "ab", 0), ("aé", "é", 1)]
)
def test_edits(a, b, distance):
    assert edits(a, b) == edits(b, a) == distance


def test_edits_are_those_of_the_plain_recursion():
    def plain(a: str, b: str) -> int:
        if not a or not b:
            return len(a) + len(b)
        return min(plain(a[1:], b) + 1, plain(a, b[1:]) + 1, plain(a[1:], b[1:]) + (a[0] != b[0]))

    rng = generator(0, "edits")
    for _ in range(30):
        a, b = ("".join("abc"[i] for i in rng.integers(0, 3, int(rng.integers(0, 6)))) for _ in range(2))
        assert edits(a, b) == plain(a, b)


def test_intervals_come_from_frames_because_errors_go_together():
    alone, together = [1] * 50 + [0] * 450, [10] * 5 + [0] * 495  # the same 50 errors of 5000 places
    one, other = (ratio(errors, [10] * 500) for errors in (alone, together))
    assert one.mean == other.mean == 0.01
    assert one.high - one.low < 0.6 * (other.high - other.low)  # sqrt(10) wider, but for 5 frames being few
    assert ratio([0, 0, 0], [10, 10, 10]).high > 0.1  # none of three frames says little


def test_bleu_is_sacrebleus():
    pytest.importorskip("sacrebleu")
    sent = ["the cat sat on the mat", "a dog ran off with the bone"]
    same = Point("x", 0.0, {FRAME: [0, 0], "text": list(sent), "sent": sent})
    assert same.measure("bleu-4").mean == pytest.approx(100)
    part = Point(
        "x", 0.0, {FRAME: [1, 1], "text": ["the cat lay on the mat", "a dog ran off with a bone"], "sent": sent}
    )
    assert part.measure("bleu-4").mean < part.measure("bleu-1").mean < 100


def test_rows_say_system_noise_and_metric():
    points = sweep(links(), draw, [2.0], by(), errors=5, batches=1)
    rows = bench.rows(points, baselines=["ml"])
    frame = next(row for row in rows if row["metric"] == FRAME)
    assert frame["method"] == "ml" and frame["task"] == "2 dB" and frame["n"] == 10 and frame["baseline"]
    assert {TOKEN, BIT, SYMBOL, CHARACTER, UNDETECTED} <= {row["metric"] for row in rows}
    with pytest.raises(SpoliaError, match="nothing to measure"):
        sweep({}, draw, [2.0], by())
