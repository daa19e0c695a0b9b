"""What `spolia new` writes of a link: the problem, and time, score and data in the header."""

from __future__ import annotations

from spolia.catalog import Method
from spolia.runs.link_problems import LinkProblem, PackedLink, ProseLink, TextLink


def problem_text(method: Method, tiny: bool) -> str:
    """The block `problem` of a recipe."""
    learned = method.name == "deepsc" and tiny
    beside = "[no_model, llm_sc]" if learned else "[no_model, published, llm_sc, separate, huffman, utf8]"
    also = "; also: published, separate, huffman, utf8" if learned else "; also: deepsc"
    lines = ["", "problem:"]
    if tiny:
        lines.append(
            "  source: prose  # the language reference of CPython, no download; also: text, europarl, wikitext2"
        )
    else:
        lines.append(
            "  source: europarl  # in the folder SPOLIA_DATA; also: wikitext2, prose, text with `files: [PATH]`"
        )
    lines += [
        f"  vocabulary: {512 if tiny else 1024}  # byte pairs learned from the training part; 256: bytes",
        f"  length: {16 if tiny else 'null'}  # tokens of a frame; null: a sentence is a frame",
        "  prior: ngram  # uniform, unigram, ngram, tiny_lm (trained here), or a folder of any causal language model",
        "  order: 3  # tokens that an n-gram spans",
        "  labels: permuted  # bits of tokens: index, permuted, or aware of the model",
        "  check_bits: 8  # of a frame: 0, 6, 8, 11, 16, 24, 32",
        "  channel: awgn  # rayleigh, rician, bursts, erasures, or {fading: rayleigh, block: null, csi_error: 0.05}",
        "  modulation: bpsk  # qpsk, 16qam, 64qam, 256qam",
        "  snr: [0, 2, 4, 6]  # levels of noise, in dB",
        "  convention: esn0  # what they count: ebn0_coded, ebn0, ebn0_info, energy_per_char, real_noise, deepsc",
        f"  beside: {beside}  # measured too{also}",
        "  beams: []  # further beams of llm_sc, a line each",
        "  errors: 100  # wrong frames at which a point ends",
        f"  sentences: {48 if tiny else 1000}  # frames of a point, at most",
    ]
    if learned:
        lines.append("  small: true  # networks trained here are cut down to what learns in seconds")
    if not tiny:
        lines.append("  # embedding: ./encoder  # folder of a text encoder that compares sent and read")
    return "\n".join(lines)


def told(method: Method, tiny: bool) -> tuple[str, str, str]:
    """Time, score and data touched, for the head of a new recipe."""
    score = "exact frames, error rates and BLEU at every level of noise, beside the other schemes and the bounds"
    data = data_of(ProseLink() if tiny else PackedLink(source="europarl"), method.name)
    time = "under a minute on one core" if tiny else "minutes with n-grams; `spolia plan` estimates it"
    if method.name == "deepsc" and not tiny:
        time = "hours on a processor; `spolia plan` estimates it"
    return time, score, "; ".join(data.values())


def data_of(problem: LinkProblem, method: str) -> dict[str, str]:
    """What each phase touches."""
    if isinstance(problem, TextLink):
        names = ", ".join(file.name for file in problem.files)
        last = ", ".join(file.name for file in problem.test) or "their last tenth"
        parts = (f"nine tenths of the lines of {names} that train", "the rest of those", f"lines of {last}")
    elif isinstance(problem, PackedLink):
        name = "Europarl" if problem.source == "europarl" else "WikiText-2"
        parts = (f"nine tenths of the train part of {name}", "the rest of it", "its test part")
    else:
        parts = ("topics of Python's language reference", "six other topics", "eight more")
    model = "" if isinstance(problem.prior, str) else ", and whatever the model was trained on"
    networks = " and DeepSC" if method == "deepsc" or "deepsc" in problem.beside else ""
    return {
        "training": f"tokenizer, model, source codes{networks} from {parts[0]}{model}",
        "choice": f"labels and constellations on {parts[1]}",
        "test": f"sent: {parts[2]}",
    }
