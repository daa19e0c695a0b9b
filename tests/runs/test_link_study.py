from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch

import spolia
from spolia.core.journal import Journal
from spolia.core.seeds import generator
from spolia.core.snr import n0_of
from spolia.errors import SpoliaError
from spolia.parts.channel import Channel
from spolia.parts.prior import UniformPrior, UnigramPrior
from spolia.parts.textcode_tokens import ByteTokenizer
from spolia.reports import figures, plots
from spolia.runs.engine import plan_recipe, run_recipe
from spolia.runs.link_ends import ends_of
from spolia.runs.link_frames import LONGEST, Frame, batches, chosen, cut
from spolia.runs.link_problems import ProseLink, Way
from spolia.runs.link_schemes import schemes_of
from spolia.runs.recipe import load_recipe
from spolia.runs.store import RunFolder

SMALL = ["problem.vocabulary=256", "problem.sentences=12", "problem.batch=4", "problem.snr=[1, 8]", "seeds=1"]


def small(*overrides: str, name: str = "link/llm_sc-tiny"):
    return load_recipe(name, [*SMALL, *overrides])


def test_the_recipes_own_scheme_stands_last_and_once():
    assert [s.label for s in schemes_of(small())] == [
        "no model", "llm_sc as published", "separate", "huffman", "utf8", "llm_sc",
    ]  # fmt: skip
    own = schemes_of(small("problem.beside=[utf8, deepsc]", "problem.beams=[1, 16, 64]", "method.lm_weight=0.5"))
    assert [s.label for s in own] == ["utf8", "deepsc", "llm_sc, beam 1", "llm_sc, beam 64", "llm_sc"]
    assert [s.baseline for s in own] == [True, True, False, False, False]
    assert {s.settings.lm_weight for s in own[2:]} == {0.5}
    assert [s.label for s in schemes_of(small("problem.beside=[utf8, huffman]", name="link/source-tiny"))] == [
        "huffman", "utf8",
    ]  # fmt: skip
    assert schemes_of(small(name="link/deepsc-tiny"))[-1].settings.width == 32  # `small`


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["problem.source=pros"], "did you mean `prose`"),
        (["problem.channel=raleigh"], "did you mean `rayleigh`"),
        (["problem.channel={fadin: rayleigh}"], "did you mean `fading`"),
        (["problem.channel={csi_error: 0.5}"], "problem.channel.csi_error"),
        (["problem.check_bits=7"], "problem.check_bits"),
        (["problem.snr=[1, 1]"], "give different levels"),
        (["problem.beside=[llmsc]"], "did you mean `llm_sc`"),
        (["problem.prior=uniform", "problem.labels=aware"], "a uniform model likes no labels"),
        (["problem.prior=tiny_lm", "method.search=viterbi"], "viterbi needs counts"),
        (["problem.interleave=true", "method.metric=symbol"], "symbols are not whole"),
        (["problem={source: text}"], "problem.files"),
        (["method.beem=4"], "did you mean `beam`"),
    ],
)
def test_a_mistake_is_told_before_any_work(overrides, said):
    with pytest.raises(SpoliaError) as told:
        load_recipe("link/llm_sc-tiny", overrides)
    assert said in str(told.value)


def test_what_is_missing_is_told_by_the_plan(tmp_path):
    with pytest.raises(SpoliaError, match=r"there is no sent_europarl_en_train\.txt\.gz"):
        plan_recipe(load_recipe("link/llm_sc", [f"problem.folder={tmp_path}"]))
    with pytest.raises(SpoliaError, match="did you mean `ngram`"):
        plan_recipe(small("problem.prior=ngrams"))
    with pytest.raises(SpoliaError, match=r"problem\.compiled: tiny_lm takes no steps that can be compiled"):
        plan_recipe(small("problem.prior=tiny_lm", "problem.compiled=true"))
    with pytest.raises(SpoliaError, match="is no folder of a model"):
        plan_recipe(small(f"problem.embedding={tmp_path}"))
    with pytest.raises(SpoliaError, match="is no file"):
        plan_recipe(small(f"problem={{source: text, files: [{tmp_path / 'none.txt'}]}}"))


def test_planning_never_imports_torch():
    code = (
        "import sys; from spolia.runs.recipe import load_recipe; from spolia.runs.engine import plan_recipe\n"
        "for name in ('llm_sc', 'separate', 'deepsc', 'source'):\n"
        "    plan = plan_recipe(load_recipe(f'link/{name}-tiny')); assert plan.phases and plan.seconds > 0\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_frames_cover_a_text_once_and_know_what_stands_before():
    text = "The quick brown fox jumps over the lazy dog."
    frames = cut([text, "no"], ByteTokenizer(), 8, context=3)
    assert bytes(t for frame in frames for t in frame.tokens) == text.encode()[:40]
    assert [bytes(frame.before) for frame in frames[:2]] == [b"", text.encode()[5:8]]
    whole = cut([text, "no", "x" * (LONGEST + 5)], ByteTokenizer(), None)
    assert [len(frame.tokens) for frame in whole] == [len(text), LONGEST, 5]  # too short, too long


def test_batches_hold_every_frame_once_by_length():
    frames = [Frame([i] * (4 + i % 3), []) for i in range(20)]
    found = batches(frames, 4, 0)
    assert sorted(int(row[0]) for batch in found for row in batch.tokens) == list(range(20))
    assert max(len(batch.tokens) for batch in found) == 4
    assert chosen(frames, 5, 1, "frames") == chosen(frames, 5, 1, "frames") != chosen(frames, 5, 2, "frames")


def test_channels_have_names():
    assert ProseLink(channel="rayleigh").channel == Way(fading="rayleigh")
    assert ProseLink(channel="bursts").channel.channel().burst is not None
    assert ProseLink(channel={"fading": "rician", "block": None}).channel.channel() == Channel("rician", block=None)
    assert ProseLink.model_validate(ProseLink(channel="erasures").model_dump(mode="json")).channel.erasure == 0.05


@pytest.mark.slow
def test_ends_are_the_same_when_they_are_read_again(tmp_path):
    problem = ProseLink(vocabulary=300, sentences=6, labels="aware", order=2, context=4)
    one, again, other = (
        ends_of(problem, 0, tmp_path / name, Journal(), symbols=name == "other") for name in ("a", "a", "other")
    )
    assert one.code.fingerprint == again.code.fingerprint == other.code.fingerprint  # BPSK fills its symbols
    assert one.test == again.test and len(one.test) == 6 and len(one.test[1].before) == 4
    texts = [" ".join(getattr(one.texts, part)) for part in ("train", "design", "test")]
    assert all(len(text) > 1000 for text in texts)
    assert one.tokenizer.decode(one.test[0].tokens) in texts[2]


def test_a_door_sends_and_reads():
    link = spolia.link(UniformPrior(256), tokenizer=ByteTokenizer(), modulation="qpsk", settings={"beam": 2})
    sent = link.send("héllo")
    assert sent.length == 6 and sent.symbols.shape == (28,)  # 6 bytes, 8 check bits, two a symbol
    read = link.read(Channel("rayleigh").transmit(sent.symbols, n0_of(60.0), generator(0)), sent.length)
    assert read.text == "héllo" and read.passes and read.confidence > 0.9
    letters = torch.zeros(256).index_fill_(0, torch.tensor(list(b" ,abcdefghijklmnopqrstuvwxyz")), 6.0)
    apart = spolia.link(UnigramPrior(letters), tokenizer=ByteTokenizer(), method="separate", modulation="16qam")
    sent = apart.send("a longer text, for the header")  # 5 bits a letter of 8
    assert apart.read(Channel().transmit(sent.symbols, n0_of(40.0), generator(0)), sent.length).passes
    for mistake, said in (
        ({"method": "deepsc"}, "no receiver of a language model"),
        ({"method": "ties"}, "no receiver of a language model"),
        ({"labels": "permutd"}, "did you mean `permuted`"),
        ({"settings": {"beem": 1}}, "did you mean `beam`"),
        ({"tokenizer": None}, "a model alone reads no text"),
    ):
        with pytest.raises(SpoliaError, match=said):
            spolia.link(UniformPrior(256), **{"tokenizer": ByteTokenizer(), **mistake})
    with pytest.raises(SpoliaError, match="is no prior over 256 tokens"):
        spolia.link(UniformPrior(300), tokenizer=ByteTokenizer())
    with pytest.raises(SpoliaError, match="is no folder of a model"):
        spolia.link("nowhere")


@pytest.mark.slow
def test_a_figure_of_texts_and_one_of_a_logarithmic_scale():
    texts = {"kind": "texts", "title": "t", "rows": ["sent", "a: wrong"], "texts": ["one <two>", "x " * 400]}
    figure = figures.read_figure(texts)
    drawn = plots.draw(figure, "f")
    assert "one <two>" in [t.text for t in ElementTree.fromstring(drawn).iter("text")]
    assert figures.to_csv(figure).startswith("row,text\nsent,one <two>\n") and "sent: one" in figures.describe(figure)
    with pytest.raises(ValueError, match="2 rows and holds 1"):
        figures.read_figure(texts | {"texts": ["one"]})
    line = {"kind": "lines", "log": True, "series": [{"name": "a", "x": [0, 1, 2], "y": [0.5, 0.0, 1e-3]}]}
    assert figures.read_figure(line).log
    scale = plots.draw(figures.read_figure(line), "g")
    ElementTree.fromstring(scale)
    assert ">0.1<" in scale and "mathdefault" not in scale
    ElementTree.fromstring(plots.draw(figures.read_figure(line | {"series": [{"x": [], "y": []}]}), "h"))


def files(folder: Path) -> dict[str, object]:
    ledger = json.loads((folder / "results.json").read_text())
    kept = json.loads((folder / "checkpoints/link-seed-0.json").read_text())
    return {"rows": ledger["rows"], "kept": kept, "figures": json.loads((folder / "figures.json").read_text())}


class Stop(Exception):
    """What ends a run from outside."""


class Bar:
    """Progress that stops the run after so many steps."""

    def __init__(self, most: int):
        self.left = most

    def start(self, *told):
        pass

    def advance(self, count, **numbers):
        self.left -= count
        if self.left <= 0:
            raise Stop

    def finish(self):
        pass


def share(ledger_rows, label: str, task: str, metric: str = "exact frames") -> float:
    return next(r["mean"] for r in ledger_rows if (r["method"], r["task"], r["metric"]) == (label, task, metric))


@pytest.mark.slow
def test_a_run_leaves_curves_and_goes_on_after_a_kill_to_the_bit(tmp_path, monkeypatch):
    model = ["problem.prior=tiny_lm", "problem.small=false", "problem.width=8", "problem.depth=1", "problem.steps=20"]
    recipe = small(*model, "problem.length=12", "problem.beside=[no_model, separate, utf8]")
    whole = files(run_recipe(recipe, RunFolder(tmp_path / "whole")))
    made = whole["rows"]
    assert {row["method"] for row in made} == {"no model", "separate", "utf8", "llm_sc"}
    assert share(made, "llm_sc", "8 dB") == 1.0  # 96 bits at a bit error rate of 2e-4, and a model: 12 frames
    assert share(made, "no model", "1 dB", "token error") > share(made, "llm_sc", "1 dB", "token error")
    own = [row for row in made if row["metric"] == "exact frames" and row["method"] == "llm_sc"]
    assert all(row["low"] <= row["mean"] <= row["high"] and row["n"] == 12 for row in own)
    assert {figure["kind"] for figure in whole["figures"]} == {"lines", "points", "texts"}
    page = (tmp_path / "whole" / "report.html").read_text()
    assert "Constellation" in page and "could not be drawn" not in page
    assert json.loads((tmp_path / "whole/result/code.json").read_text())["vocabulary"] == 256
    monkeypatch.setattr("spolia.runs.verbs.report", lambda path: None)  # drawn once is enough
    for steps in (10, 22):  # while the model learns, and in the sweep
        folder = RunFolder(tmp_path / f"stopped-{steps}")
        with pytest.raises(Stop):
            run_recipe(recipe, folder, progress=Bar(steps))
        assert files(run_recipe(recipe, folder)) == whole


@pytest.mark.slow
def test_seeds_are_pooled_and_other_ways_run(tmp_path):
    text = tmp_path / "mine.txt"
    text.write_text("\n".join(f"line number {i} of a text that repeats itself, {i % 7} times" for i in range(200)))
    recipe = load_recipe(
        "link/llm_sc-tiny",
        [
            f"problem={{source: text, files: [{text}], length: null, vocabulary: 300, sentences: 10, snr: [-2, 6]}}",
            "problem.channel={fading: rayleigh, block: null}", "problem.modulation=qpsk", "problem.labels=aware",
            "problem.convention=ebn0_info", "problem.interleave=true", "problem.beside=[published, huffman]",
            "problem.context=8", "problem.beams=[1]", "seeds=2",
        ],
    )  # fmt: skip
    ledger = json.loads((run_recipe(recipe, RunFolder(tmp_path / "run")) / "results.json").read_text())
    rows = ledger["rows"]
    assert {row["n"] for row in rows if row["metric"] == "exact frames"} == {20}
    assert {row["task"] for row in rows} >= {"-2 dB ebn0_info", "6 dB ebn0_info", "all levels"}
    assert {row["method"] for row in rows} == {"llm_sc as published", "huffman", "llm_sc, beam 1", "llm_sc"}
    assert "lines of mine.txt" in ledger["data"]["training"] and ledger["seeds"] == [0, 1]


@pytest.mark.slow
def test_a_folder_of_a_model_drops_in(tmp_path):
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    plain = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)} | {"<s>": 256}, merges=[]))
    plain.pre_tokenizer, plain.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=plain, bos_token="<s>", eos_token="<s>")
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=260, n_embd=16, n_layer=1, n_head=2, n_positions=64, bos_token_id=256, eos_token_id=256
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    fast.save_pretrained(tmp_path / "model")
    recipe = small(
        f"problem.prior={tmp_path / 'model'}", f"problem.embedding={tmp_path / 'model'}", "problem.beside=[separate]",
        "problem.length=10", "problem.sentences=4", "problem.snr=[12]",
    )  # fmt: skip
    rows = json.loads((run_recipe(recipe, RunFolder(tmp_path / "run")) / "results.json").read_text())["rows"]
    assert share(rows, "llm_sc", "12 dB") == 1.0  # BPSK at 12 dB: a bit error in 1e8
    assert share(rows, "llm_sc", "12 dB", "similarity") == pytest.approx(1)
    assert share(rows, "llm_sc", "12 dB", "reads") > 1
    link = spolia.link(tmp_path / "model", settings={"beam": 2})
    sent = link.send("any text")
    assert link.read(Channel().transmit(sent.symbols, n0_of(20.0), generator(0)), sent.length).text == "any text"
