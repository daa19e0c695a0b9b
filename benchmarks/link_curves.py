"""Text through noise on real sentences: LLM-SC by labels, check bits and beams, beside separate coding, Huffman and DeepSC.

    SPOLIA_DATA=FOLDER python benchmarks/link_curves.py --work FOLDER        everything, about ninety minutes of one core
    … --only europarl,awgn                    some curves: names of corpora, channels and schemes, or parts of them
    … --estimate                              measures a little of each curve and tells its time
    … --quick                                 few frames and steps: does everything run?

Corpora: Europarl's sentences as DeepSC prepares them, and windows of 24 tokens of WikiText-2; byte pairs of 1024 tokens, and a
causal model of three layers, both learned from the train part, of which a tenth chooses labels. Europarl once more by
stories260k: a model of children's stories, made by others, with 512 tokens. Channels: Gaussian noise, and Rayleigh fading of
every symbol by itself, known to the receiver. BPSK. All schemes but DeepSC beside them take the channel uses of the labels with
their check bits; DeepSC takes ten complex uses a token, as many as a label has bits. Separate coding has a convolutional code,
and where sionna is installed 5G's LDPC too.

Ledgers: docs/results/link_europarl.json, link_wikitext2.json, link_stories260k.json: error rates by Es/N0, and what each scheme
needs for 50 and 90 % exact frames in Es/N0, in Eb/N0 of a bit of the model's entropy, and in energy a character; pictures
beside them. Every curve goes on where it stopped; finished ones stay in the work folder.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import sys
import time
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import measure
from stages import keep

from spolia.bench.link import EXACT, FRAME, Point, Yardstick, rows, sweep
from spolia.core.journal import Journal
from spolia.data.images import data_folder
from spolia.methods.link.deepsc import DeepSC, deepsc
from spolia.methods.link.llm_sc import LLMSC, llm_sc
from spolia.methods.link.separate import LMCompressor, Separate, separate
from spolia.methods.link.source import Source
from spolia.parts.channel import Channel
from spolia.parts.link import Link
from spolia.parts.ngram import NGram
from spolia.parts.prior import NGramPrior, UniformPrior
from spolia.parts.textcode import TextCode
from spolia.reports.figures import read_figure
from spolia.reports.plots import draw, standalone
from spolia.runs.link_ends import Ends, ends_of, labels_of
from spolia.runs.link_frames import batches, by_length, tokens_of
from spolia.runs.link_measuring import bounds_of, source_bits
from spolia.runs.link_problems import PackedLink
from spolia.runs.link_schemes import classical

PACKAGES = ["torch", "numpy", "tokenizers", "spolia"]
LEVELS = {
    "awgn": [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, 8.0],
    "rayleigh": [0.0, 2.0, 4.0, 6.0, 8.0, 10.0, 14.0],
}
SHARES = (0.5, 0.9)  # of exact frames, that the needed noise is told for
LABELS = ("index", "permuted", "aware")
BEAM, CHECKS, BEAMS = 16, 8, (1, 4, 64)
TRAINED = DeepSC(width=128, depth=2, inner=256, uses=10, steps=1000, batch=64, lr=5e-4)
SEPARATE = ("separate", "separate, trigrams", "separate, LDPC")  # the last needs sionna
CORPORA = ("europarl", "wikitext2", "stories260k")
QUICK = {"sentences": 12, "steps": 4, "width": 16, "depth": 1}
SHOWN = ("labels by themselves", "index labels", "aware labels, 8 check bits, beam 64", "separate", "huffman", "deepsc")


@cache
def problem_of(corpus: str, quick: bool) -> PackedLink:
    asked: dict[str, Any] = {"length": 24} if corpus == "wikitext2" else {}
    asked["prior"] = data_folder() / corpus if corpus == "stories260k" else "tiny_lm"
    problem = PackedLink(
        source="europarl" if corpus == "stories260k" else corpus, width=128, depth=3, steps=1000, labels="index",
        sentences=120, errors=60, snr=[2.0], **asked,
    )  # fmt: skip
    return problem.model_copy(update=QUICK) if quick else problem


@cache
def ends(work: Path, corpus: str, quick: bool) -> Ends:
    """Tokenizer, model and frames of a corpus, kept in the work folder."""
    folder = work / corpus / "ends"
    return ends_of(problem_of(corpus, quick), 0, folder, Journal(folder))


@cache
def code_of(work: Path, corpus: str, quick: bool, labels: str, checks: int) -> TextCode:
    own, problem = ends(work, corpus, quick), problem_of(corpus, quick).model_copy(update={"labels": labels})
    made = labels_of(problem, own.prior, own.design, 1, 0, work / corpus / "ends" / "aware.safetensors")
    return TextCode(own.tokenizer, made, checks)


def schemes(corpus: str) -> list[str]:
    if corpus == "stories260k":
        beside = [name for name in SHOWN if name not in ("huffman", "deepsc")]
        return [*beside, f"aware labels, {CHECKS} check bits"]
    found = ["labels by themselves"]
    for labels in LABELS:
        found += [f"{labels} labels", f"{labels} labels, {CHECKS} check bits"]
    found += [f"aware labels, {CHECKS} check bits, beam {beam}" for beam in BEAMS]
    found += [f"aware labels, {CHECKS} check bits, trigrams", *SEPARATE, "huffman", "utf8"]
    return [*found, "deepsc"]


def link_of(work: Path, corpus: str, channel: str, scheme: str, quick: bool, folder: Path) -> Link:
    own, words = ends(work, corpus, quick), scheme.split(", ")
    labels, checks = words[0].removesuffix(" labels"), CHECKS if len(words) > 1 else 0
    code = code_of(work, corpus, quick, labels if labels in LABELS else "index", checks)
    prior, c = trigrams(work, corpus, quick) if words[-1] == "trigrams" else own.prior, own.constellation
    if scheme == "labels by themselves":
        return llm_sc(UniformPrior(own.prior.vocabulary), code, c, LLMSC(beam=1))
    if words[0] == "separate":
        code_kind = "ldpc" if words[-1] == "LDPC" else "convolutional"
        return separate(LMCompressor(prior), c, own.uses, Separate(code=code_kind))
    if scheme in ("huffman", "utf8"):
        return classical(Source(kind=scheme), own)
    if scheme == "deepsc":
        groups = [tokens_of(frames) for frames in by_length(own.train).values()]
        settings = TRAINED.model_copy(update={"steps": 3, "width": 16} if quick else {})
        return deepsc(groups, own.prior.vocabulary, Channel(fading=fading(channel)), settings, Journal(folder))
    beam = int(words[-1].removeprefix("beam ")) if words[-1].startswith("beam ") else BEAM
    return llm_sc(prior, code, c, LLMSC(beam=beam))


@cache
def trigrams(work: Path, corpus: str, quick: bool) -> NGramPrior:
    own = ends(work, corpus, quick)
    return NGramPrior(NGram.fit([frame.tokens for frame in own.train], own.prior.vocabulary))


def fading(channel: str) -> Any:
    return "none" if channel == "awgn" else channel


def stage(work: Path, corpus: str, channel: str, scheme: str, quick: bool) -> dict[str, Any]:
    """Points of one curve, counts by frame, with its seconds and channel uses."""
    place = work / corpus / channel / scheme.replace(", ", "-").replace(" ", "_")
    file = place.with_suffix(".json")
    if file.exists():
        return json.loads(file.read_text())
    start, own, problem = time.process_time(), ends(work, corpus, quick), problem_of(corpus, quick)
    link = link_of(work, corpus, channel, scheme, quick, place)
    made = time.process_time()
    levels, by = (
        LEVELS[channel][::3] if quick else LEVELS[channel],
        Yardstick(Channel(fading=fading(channel)), own.code),
    )
    order, names = batches(own.test, problem.batch, 0), {scheme: link}
    points = sweep(
        names, lambda i: order[i], levels, by, errors=problem.errors, batches=len(order), journal=Journal(place)
    )
    uses = [int(link.send(batch.tokens[:1]).shape[1]) * len(batch.tokens) for batch in order]
    kept = {
        "points": [{"esn0": p.esn0_db, "counts": p.counts} for p in points],
        "uses": sum(uses),
        "seconds": {"training": made - start, "sweep": time.process_time() - made},
    }
    keep(file, kept)
    told = " ".join(f"{p.esn0_db:g}: {p.measure(EXACT).mean:.2f}" for p in points)
    print(f"{corpus} {channel} {scheme}: {told}, {sum(kept['seconds'].values()):.0f} s", flush=True)
    return kept


# --- the ledger ------------------------------------------------------------------------------------------------------


def needed(points: list[Point], share: float) -> float | None:
    """Es/N0 at which that share of frames is exact, between the two levels around it; None where it is never reached."""
    for one, other in itertools.pairwise(points):
        low, high = one.measure(EXACT).mean, other.measure(EXACT).mean
        if low < share <= high:
            return one.esn0_db + (share - low) / (high - low) * (other.esn0_db - one.esn0_db)
    return None


def write_ledger(work: Path, corpus: str, out: Path, quick: bool, command: str) -> None:
    """docs/results/link_CORPUS.json and a picture, of what is finished."""
    made: list[dict[str, Any]] = []
    curves: dict[str, list[Point]] = {}
    own = ends(work, corpus, quick)
    bits, characters = sum(source_bits(own)), sum(len(own.tokenizer.decode(frame.tokens)) for frame in own.test)
    for channel in LEVELS:
        for scheme in schemes(corpus):
            file = work / corpus / channel / f"{scheme.replace(', ', '-').replace(' ', '_')}.json"
            if not file.exists():
                continue
            kept = json.loads(file.read_text())
            points = [Point(scheme, point["esn0"], point["counts"]) for point in kept["points"]]
            curves |= {scheme: points} if channel == "awgn" else {}
            beside = "labels" not in scheme or scheme == "labels by themselves"
            flag = {"baseline": True} if beside else {}
            made += [row | {"task": f"{channel} {row['task']}"} | flag for row in rows(points)]
            offsets = {
                "Es/N0": 0.0,
                "Eb/N0 of information": 10 * math.log10(kept["uses"] / bits),
                "energy a character": 10 * math.log10(kept["uses"] / characters),
            }
            for share in SHARES:
                found = needed(points, share)
                for name, offset in offsets.items() if found is not None else ():
                    row = {"method": scheme, "task": f"{channel}, {name}", "metric": f"needed for {share:.0%} exact"}
                    row |= {"unit": "dB", "mean": round((found or 0.0) + offset, 3), "low": None, "high": None}
                    made.append(row | {"n": points[0].frames} | flag)
    if not made:
        return
    tokens = sum(len(frame.tokens) for frame in own.test)
    ledger = {
        "name": f"link_{corpus}", "average": False, "command": command, "commit": measure.commit(),
        "date": datetime.date.today().isoformat(), "machine": measure.machine(),
        "versions": measure.versions(sys.executable, PACKAGES),
        "data": {
            "training": "nine tenths of the train part", "choice of labels": "the rest of it", "test": "the test part"
        },
        "seeds": [0], "rows": made,
        "notes": f"{len(own.test)} frames of {tokens / len(own.test):.1f} tokens; a token has {bits / tokens:.2f} bits under"
        f" the model, {characters / tokens:.2f} characters. Points end after {problem_of(corpus, quick).errors} wrong frames."
        " Needed noise is interpolated between levels. Receivers are told the length; beams are 16 where none is named.",
    }  # fmt: skip
    out.mkdir(parents=True, exist_ok=True)
    (out / f"link_{corpus}.json").write_text(json.dumps(ledger, indent=1) + "\n")
    picture(own, corpus, curves, out, bits=source_bits(own), quick=quick)


def picture(own: Ends, corpus: str, curves: dict[str, list[Point]], out: Path, bits: list[float], quick: bool) -> None:
    """Frames that are not exact against Es/N0, Gaussian noise, with the bound of separate coding."""
    series = []
    for name in SHOWN:
        if seen := [(p.esn0_db, p.measure(FRAME)) for p in curves.get(name, []) if p.wrong]:
            low, high = ([getattr(one, end) for _, one in seen] for end in ("low", "high"))
            series.append({"name": name, "x": [x for x, _ in seen], "y": [one.mean for _, one in seen]})
            series[-1] |= {"low": low, "high": high}
    levels = LEVELS["awgn"]
    bound = bounds_of(own, problem_of(corpus, quick), levels, bits)[FRAME]
    pairs = [(x, y) for x, y in zip(levels, bound, strict=True) if y > 1e-3]
    series.append({"name": "best separate code", "x": [x for x, _ in pairs], "y": [y for _, y in pairs]})
    axes = {"x_label": "Es/N0 (dB)", "y_label": FRAME, "log": True}
    drawn = draw(read_figure({"kind": "lines", "title": "Frames that are not exact", **axes, "series": series}), "link")
    (out / f"link_{corpus}.svg").write_text(standalone(drawn), encoding="utf-8", newline="\n")


def estimate(work: Path, wanted: list[tuple[str, str, str]]) -> None:
    """Seconds of each curve, from one small batch at a middle level and a few steps of training."""
    total, clock = 0.0, time.process_time
    for corpus in dict.fromkeys(corpus for corpus, _, _ in wanted):
        problem, marks = problem_of(corpus, False), []
        for steps in (1, 1, 11):  # the first pays what is paid once
            start = clock()
            with TemporaryDirectory() as folder:
                ends_of(problem.model_copy(update={"steps": steps}), 0, Path(folder), Journal())
            marks.append(clock() - start)
        total += (seconds := max(0.0, marks[2] - marks[1]) / 10 * problem.steps + marks[1])
        print(f"{corpus} model: {seconds:.0f} s", flush=True)
    for corpus, channel, scheme in wanted:
        own, problem = ends(work / "estimate", corpus, True), problem_of(corpus, False)
        start = clock()
        place, levels = work / "estimate", LEVELS[channel]
        link = link_of(place, corpus, channel, scheme, True, place / "links")
        by, order = Yardstick(Channel(fading=fading(channel)), own.code), batches(own.test, 4, 0)
        made = clock()
        sweep({scheme: link}, lambda i, order=order: order[i], levels[2:4], by, batches=1)
        frames = len(order[0].tokens) * 2
        seconds = made - start + (clock() - made) / frames * problem.sentences * len(levels)
        total += seconds
        print(f"{corpus} {channel} {scheme}: {seconds:.0f} s, with a model that is smaller", flush=True)
    print(f"all: {total / 60:.0f} minutes of one core and more, DeepSC's training apart")


def chosen(only: str) -> list[tuple[str, str, str]]:
    every = [(corpus, channel, scheme) for corpus in CORPORA for channel in LEVELS for scheme in schemes(corpus)]
    if find_spec("sionna") is None:
        every = [one for one in every if not one[2].endswith("LDPC")]
    parts = [part.strip() for part in only.split(",") if part.strip()]
    return [one for one in every if all(any(part in name for name in one) for part in parts)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder outside the repository that keeps everything")
    parser.add_argument("--only", default="", help="names that all must occur in a curve's corpus, channel or scheme")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--json", type=Path, default=measure.REPOSITORY / "docs" / "results", help="folder of the ledgers"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--estimate", action="store_true")
    asked = parser.parse_args()
    import torch

    torch.set_num_threads(asked.threads)
    data_folder()
    wanted = chosen(asked.only)
    if asked.estimate:
        estimate(asked.work, wanted)
        return
    if asked.quick and asked.json == measure.REPOSITORY / "docs" / "results":
        parser.error("with --quick also --json FOLDER")
    for corpus in dict.fromkeys(corpus for corpus, _, _ in wanted):
        for channel, scheme in [one[1:] for one in wanted if one[0] == corpus]:
            stage(asked.work, corpus, channel, scheme, asked.quick)
        write_ledger(asked.work, corpus, asked.json, asked.quick, "python benchmarks/link_curves.py --work FOLDER")


if __name__ == "__main__":
    main()
