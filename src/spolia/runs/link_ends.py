"""Both ends of a link as a recipe describes them: tokenizer, language model, labels, made once a seed and kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spolia.core import tensorfile
from spolia.core.lazy import torch
from spolia.core.modulation import constellation
from spolia.core.seeds import entropy, generator
from spolia.core.snr import Rates, to_esn0
from spolia.errors import SpoliaError
from spolia.parts.causal_prior import CausalPrior
from spolia.parts.ngram import NGram
from spolia.parts.prior import NGramPrior, UniformPrior
from spolia.parts.textcode import TextCode
from spolia.parts.textcode_confusion import of_contexts
from spolia.parts.textcode_labels import Labels, aware_labels, index_labels, permuted_labels, width_of
from spolia.parts.textcode_tokens import Bpe, ByteTokenizer, HfTokenizer, train_bpe
from spolia.runs.link_frames import LONGEST, Frame, batches, chosen, cut
from spolia.runs.link_problems import LinkProblem, texts_of
from spolia.runs.store import write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from spolia.core.journal import Journal
    from spolia.core.modulation import Constellation
    from spolia.data.texts import Texts
    from spolia.parts.channel import Channel
    from spolia.parts.prior import Prior
    from spolia.parts.textcode_tokens import Tokenizer

_DESIGNED = 4000  # contexts that labels are chosen on
_DENSE, _TOP, _MOVABLE = 2048, 32, 2000  # tokens; above the first: the likeliest of a context, and those that may move
_HELD = 1 << 24  # log-probabilities at once
_AT_ONCE = 32  # frames
SMALL = {"width": 32, "depth": 1, "steps": 200}  # of tiny_lm


@dataclass(frozen=True, eq=False)
class Ends:
    """Everything a scheme is made of. Frames by part; `rates` are those of the recipe's labels."""

    texts: Texts
    tokenizer: Tokenizer
    prior: Prior
    code: TextCode
    constellation: Constellation
    channel: Channel
    train: list[Frame]
    design: list[Frame]
    test: list[Frame]

    def uses(self, length: int) -> int:
        """Channel uses of a frame."""
        return -(-self.code.sent(length) // self.constellation.bits)


def ends_of(problem: LinkProblem, seed: int, folder: Path, journal: Journal, *, symbols: bool = False) -> Ends:
    """The ends of a seed; what takes long is read from `folder` where it was made before. `symbols`: aligned labels."""
    texts = texts_of(problem, seed)
    theirs = problem.prior if isinstance(problem.prior, Path) else None
    own = opened(theirs, problem.device, "problem.prior", compiled=problem.compiled) if theirs else None
    tokenizer = own[0] if own else _tokenizer(problem, texts, folder / f"tokenizer-{seed}.json")
    parts = {p: cut(getattr(texts, p), tokenizer, problem.length, problem.context) for p in ("train", "design", "test")}
    for part, frames in parts.items():
        if len(frames) < 2:
            mend = "give more text, or choose shorter frames"
            raise SpoliaError(f"{len(frames)} frames in the {part} part", where="problem", mend=mend)
    test = chosen(parts["test"], problem.sentences, seed, "frames")
    prior = own[1] if own else _prior(problem, tokenizer.size, parts["train"], seed, folder, journal)
    c = constellation(problem.modulation, device=problem.device)
    labels = labels_of(problem, prior, parts["design"], c.bits, seed, folder / f"labels-{seed}.safetensors")
    labels = labels.to(problem.device)
    interleave = seed if problem.interleave else None
    code = TextCode(tokenizer, labels, problem.check_bits, interleave=interleave, align=c.bits if symbols else 1)
    channel = problem.channel.channel()
    return Ends(texts, tokenizer, prior, code, c, channel, parts["train"], parts["design"], test)


def rates_of(ends: Ends, bits: float) -> Rates:
    """For converting noise. `bits`: of the source, a token, under the model."""
    tokens = sum(len(frame.tokens) for frame in ends.test)
    sent = sum(ends.code.sent(len(frame.tokens)) for frame in ends.test)
    characters = sum(len(ends.tokenizer.decode(frame.tokens)) for frame in ends.test)
    uses = sum(ends.uses(len(frame.tokens)) for frame in ends.test)
    width = ends.code.labels.width
    return Rates(ends.constellation.bits, tokens * width / sent, max(bits, 1e-6) / width, uses / max(1, characters))


def opened(folder: str | Path, device: str, where: str, *, compiled: bool = False) -> tuple[HfTokenizer, CausalPrior]:
    """A causal model of transformers and its tokenizer; no code of the folder is run."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        tokenizer = HfTokenizer(AutoTokenizer.from_pretrained(str(folder), local_files_only=True))
        model: Any = AutoModelForCausalLM.from_pretrained(str(folder), local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        mend = "a folder of a causal model and its tokenizer, as transformers saves them"
        raise SpoliaError(f"cannot be opened: {error}", where=f"{where} {folder}", mend=mend) from None
    return tokenizer, CausalPrior(model.to(device).eval(), tokens=tokenizer.model_ids, compiled=compiled)


# --- tokens and model ------------------------------------------------------------------------------------------------


def _tokenizer(problem: LinkProblem, texts: Texts, kept: Path) -> Bpe | ByteTokenizer:
    if problem.vocabulary == 256:
        return ByteTokenizer()
    if not kept.exists():
        kept.parent.mkdir(parents=True, exist_ok=True)
        write_whole(kept, train_bpe(texts.train, problem.vocabulary).to_json())
    return Bpe(kept.read_text(encoding="utf-8"))


def _prior(
    problem: LinkProblem, vocabulary: int, frames: list[Frame], seed: int, folder: Path, journal: Journal
) -> Prior:
    if problem.prior == "uniform":
        return UniformPrior(vocabulary, problem.device)
    if problem.prior == "tiny_lm":
        return _tiny_lm(problem, vocabulary, frames, seed, folder / f"prior-{seed}", journal)
    order = 1 if problem.prior == "unigram" else problem.order
    ngram = NGram.fit([frame.before + frame.tokens for frame in frames], vocabulary, order)
    return NGramPrior(ngram.to(problem.device), problem.device)


def _tiny_lm(
    problem: LinkProblem, vocabulary: int, frames: list[Frame], seed: int, folder: Path, journal: Journal
) -> CausalPrior:
    """TinyLM trained on the frames that train, each after a token of its own that says that a frame begins."""
    from spolia.methods.distill.train import Training
    from spolia.runs.distill_pair import taught
    from spolia.zoo.tiny_lm import TinyLM

    size = SMALL if problem.small else {"width": problem.width, "depth": problem.depth, "steps": problem.steps}
    steps = size["steps"]
    pace: dict[str, Any] = {"steps": steps, "batch": 32, "optimizer": "adamw", "lr": 3e-3, "weight_decay": 0.01}
    training = Training(**pace, schedule="cosine", warmup=steps // 10, task="tokens", watch="loss", keep="last")
    rows = _windows(frames, vocabulary, 1 + problem.context + (problem.length or LONGEST))
    draws = torch.Generator().manual_seed(entropy(seed, "link", "tiny_lm") % 2**63)
    blank = TinyLM(vocabulary + 1, rows.shape[1], size["width"], size["depth"], 4, generator=draws)
    with journal.phase(f"seed {seed} model"):
        model = taught(blank.to(problem.device), rows.to(problem.device), training, seed, folder, journal)
    return CausalPrior(model, tokens=range(vocabulary), start=[vocabulary])


def _windows(frames: list[Frame], start: int, length: int) -> Tensor:
    """A row for each frame [rows, length]: `start`, what stands before, its tokens, and then the frames that follow."""
    flat, places = list[int](), list[int]()
    for frame in frames:
        places.append(len(flat))
        flat += [*frame.tokens, start]
    flat *= 2 + length // len(flat)  # after the last frame comes the first
    rows = [[start, *frame.before, *flat[at : at + length]] for at, frame in zip(places, frames, strict=True)]
    return torch.tensor([row[:length] for row in rows])


# --- labels ----------------------------------------------------------------------------------------------------------


def labels_of(problem: LinkProblem, prior: Prior, design: list[Frame], bits: int, seed: int, kept: Path) -> Labels:
    size = prior.vocabulary
    if problem.labels == "index":
        return index_labels(size)
    draws = generator(seed, "link", "labels")
    if problem.labels == "permuted":
        return permuted_labels(size, draws)
    if not kept.exists():
        middle = problem.snr[len(problem.snr) // 2]
        rates = Rates(bits_per_symbol=bits)  # of a bit on the air; what a level says of the source is left out here
        coded_db = to_esn0(middle, problem.convention, rates) - to_esn0(0.0, "ebn0_coded", rates)
        dense = size <= _DENSE
        confusion = of_contexts(_after(prior, design, seed), top=None if dense else _TOP)
        labels = aware_labels(confusion, coded_db, draws, movable=None if dense else _MOVABLE)
        tensorfile.write(kept, {"codes": labels.codes})
    _, tensors = tensorfile.read(kept, "delete it: it is made again")
    return Labels(tensors["codes"], width_of(size))


def _after(prior: Prior, frames: list[Frame], seed: int) -> Iterator[Tensor]:
    """Log-probabilities of the next token in some thousand places [places, V]."""
    left = _DESIGNED
    for batch in batches(chosen(frames, _DESIGNED, seed, "design"), _AT_ONCE, seed):
        length = batch.tokens.shape[1]
        rows = max(1, min(left // length + 1, _HELD // (length * prior.vocabulary)))
        contexts = list(batch.contexts or [()] * len(batch.tokens))
        yield prior.log_probs(batch.tokens[:rows], contexts[:rows]).flatten(0, 1)
        left -= rows * length
        if left <= 0:
            return
